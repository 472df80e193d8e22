"""Vocabularies as llama.cpp's converter writes them: SentencePiece models and byte-level BPE.

Source: convert_hf_to_gguf.py and gguf-py of llama.cpp (ggml 0.25). Its in-tree SpecialVocab differs from the one in the
``gguf`` package of the same number, so those rules stand here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from qbuild.errors import InputError

__all__ = ["read_json", "tokenizer"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What a pre-tokenizer does to this text tells which one it is (convert_hf_to_gguf_update.py).
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 "
    "(normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо "
    "на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)


def read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), f"not JSON: {error}", "fetch the file again") from None


class Tokens(NamedTuple):
    """A vocabulary: byte-level BPE has a pre-tokenizer (``pre``) and no scores."""

    model: str
    pre: str
    texts: list[str]
    scores: list[float] | None
    types: list[int]


def tokenizer(arch: str, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of a tokenizer, as {gguf's writer method without add_: value} in its order."""
    if config.get("model_type") == "granitemoehybrid":
        return _sentencepiece_or_bpe(folder, config)
    return TOKENIZERS.get(arch, _bpe_only)(folder, config)


def _written(tokens: Tokens, folder: Path, known: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A vocabulary, then its merges and special tokens. ``known``: texts of those that no file needs to name."""
    bpe = tokens.scores is None
    values: dict[str, Any] = {
        "tokenizer_model": tokens.model,
        "tokenizer_pre": tokens.pre,
        "token_list": tokens.texts,
        "token_scores": tokens.scores,
        "token_types": tokens.types,
        "token_merges": merges(folder) or None if bpe else None,
    }
    special = Special(folder, None if bpe else len(tokens.texts))
    for kind, text in (known or {}).items():
        if text not in tokens.texts:
            raise InputError(str(folder), f"the tokenizer has no {text}", "fetch its files again")
        special.ids.setdefault(kind, tokens.texts.index(text))
    values |= special.written()
    return {name: value for name, value in values.items() if value is not None}


def _bpe_only(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return _written(bpe(folder, config.get("vocab_size")), folder)


def _sentencepiece_only(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    if not (folder / "tokenizer.model").is_file():
        raise InputError(str(folder), "tokenizer.model is missing", "fetch it from where the model came from")
    return _written(sentencepiece(folder, config.get("vocab_size")), folder)


def _sentencepiece_or_bpe(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return (_sentencepiece_only if (folder / "tokenizer.model").is_file() else _bpe_only)(folder, config)


def _llama(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    settings = read_json(folder / "tokenizer_config.json") or {}
    if (folder / "tekken.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise InputError(str(folder), "has a tekken.json only", "fetch its tokenizer.json too")
    prefix = settings.get("add_prefix_space")
    values = {} if prefix is None else {"add_space_prefix": prefix}
    size = config.get("vocab_size", 32000)
    if (folder / "tokenizer.model").is_file() or not _is_llama_hf(folder):
        values |= _sentencepiece_or_bpe(folder, config)
    else:
        values |= _written(llama_hf(folder), folder)
    if size == 32016:  # CodeLlama's; of its four infill tokens only this one has a key
        values |= _other_special(folder, ("prefix", "suffix", "middle", "eot"), eot=32010)
    if size == 49152:  # the converter's rule for granite's small models catches every vocabulary of that size
        values["add_bos_token"] = False
    return values


def _gemma(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    values = _sentencepiece_only(folder, config)
    values |= _other_special(folder, ("prefix", "suffix", "middle", "fsep", "eot"), eot=107)
    return values | {"add_space_prefix": False}


def _gemma2(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return _sentencepiece_only(folder, config) | {"add_space_prefix": False}


def _gemma3(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return (_gemma2 if (folder / "tokenizer.model").is_file() else _bpe_only)(folder, config)


VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')


def _gemma4(folder: Path, _: dict[str, Any]) -> dict[str, Any]:
    """What a chat parser has to see is no control token."""
    tokens = llama_hf(folder)
    types = [USER_DEFINED if text in VISIBLE else kind for text, kind in zip(tokens.texts, tokens.types, strict=True)]
    values = {
        "tokenizer_model": "gemma4",
        "token_list": tokens.texts,
        "token_scores": tokens.scores,
        "token_types": types,
        "token_merges": merges(folder) or None,
        **Special(folder, None).written(),
        "add_space_prefix": False,
        "add_bos_token": True,
    }
    return {name: value for name, value in values.items() if value is not None}


def _phi3(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """As SentencePiece, but added tokens are taken as they are, and those of tokenizer.json as well."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    if settings.get("tokenizer_class") == "GPT2Tokenizer":
        return _bpe_only(folder, config)
    if not (folder / "tokenizer.model").is_file():
        raise InputError(str(folder), "tokenizer.model is missing", "fetch it from where the model came from")
    tokens = sentencepiece(folder, config.get("vocab_size"), plain=True)
    decoder = [(int(i), entry) for i, entry in settings.get("added_tokens_decoder", {}).items()]
    added = (read_json(folder / "tokenizer.json") or {}).get("added_tokens", [])
    for i, entry in [*decoder, *((int(entry["id"]), entry) for entry in added)]:
        kind = CONTROL if entry.get("special") else USER_DEFINED
        tokens.texts[i], tokens.types[i] = entry["content"], kind
        if tokens.scores is not None:
            tokens.scores[i] = -1000.0
    return _written(tokens, folder)


def _glm4(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    end = "<|endoftext|>"
    known = {"eos": end, "eot": "<|user|>", "unk": end, "bos": end}
    return _written(bpe(folder, config.get("vocab_size")), folder, known)


def _glm4_moe(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    known = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
    return _written(bpe(folder, config.get("vocab_size")), folder, known)


def _hunyuan(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The end of a turn and of a text are not where the tokenizer's files say."""
    values = _bpe_only(folder, config)
    bare = read_json(folder / "config.json")
    end = {**bare, **bare.get("text_config", {})}.get("eod_token_id")
    turn = (read_json(folder / "generation_config.json") or {}).get("eos_token_id")
    if end is not None:
        values["eos_token_id"] = end
    if isinstance(turn, list) and len(turn) >= 2:
        values["eot_token_id"] = turn[0]
    return values


def _ernie(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    prefix = (read_json(folder / "tokenizer_config.json") or {}).get("add_prefix_space")
    return _sentencepiece_only(folder, config) | ({} if prefix is None else {"add_space_prefix": prefix})


def _nemotron(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return _sentencepiece_only(folder, config) | {"pad_token_id": 0, "unk_token_id": 1}


TOKENIZERS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _llama,
    "granite": _llama,
    "granitemoe": _llama,
    "arcee": _llama,
    "mistral3": _llama,
    "glm4": _glm4,
    "glm4moe": _glm4_moe,
    "hunyuan-dense": _hunyuan,
    "ernie4_5": _ernie,
    "ernie4_5-moe": _ernie,
    "minicpm": _sentencepiece_only,
    "nemotron": _nemotron,
    "qwen2": _sentencepiece_or_bpe,
    "qwen3": _sentencepiece_or_bpe,
    "qwen2vl": _sentencepiece_or_bpe,
    "qwen3vl": _sentencepiece_or_bpe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "phi3": _phi3,
    "phimoe": _phi3,
}


def _other_special(folder: Path, names: Sequence[str], eot: int) -> dict[str, Any]:
    special = Special(folder, None, names)
    special.ids.setdefault("eot", eot)
    special.template = None
    return special.written()


def looks_special(token: str) -> bool:
    """Tokens that some models forget to mark as special."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return any(token.startswith(a) and token.endswith(b) for a, b in pairs)


def added_type(entry: dict[str, Any], token: str) -> tuple[str, int]:
    """Text and type of an added token."""
    if entry.get("special") or looks_special(token):
        return token, CONTROL
    return token.replace("\u2581", " "), USER_DEFINED


def sentencepiece(folder: Path, size: int | None, *, plain: bool = False) -> Tokens:
    """``tokenizer.model`` with the added tokens of the files beside it; ``plain``: without tokenizer_config.json's."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromFile(str(folder / "tokenizer.model"))
    except (OSError, RuntimeError) as error:
        raise InputError(str(folder / "tokenizer.model"), f"cannot be read: {error}", "fetch it again") from None
    size = size or model.vocab_size()
    texts, scores, types = [f"[PAD{i}]" for i in range(size)], [-10000.0] * size, [UNUSED] * size
    for i in range(min(size, model.vocab_size())):
        texts[i], scores[i], types[i] = model.IdToPiece(i), model.GetScore(i), _piece_type(model, i)
    for text, i in (read_json(folder / "added_tokens.json") or {}).items():
        if i < size:
            texts[i], scores[i], types[i] = text, -1000.0, USER_DEFINED
    settings = {} if plain else read_json(folder / "tokenizer_config.json") or {}
    for key, entry in settings.get("added_tokens_decoder", {}).items():
        if int(key) < size:
            text, kind = added_type(entry, entry["content"])
            texts[int(key)], scores[int(key)], types[int(key)] = text, -1000.0, kind
    return Tokens("llama", "default", texts, scores, types)


def _piece_type(model: Any, i: int) -> int:
    tests = ((model.IsUnknown, UNKNOWN), (model.IsControl, CONTROL), (model.IsUnused, UNUSED), (model.IsByte, BYTE))
    return next((kind for test, kind in tests if test(i)), NORMAL)


def _is_llama_hf(folder: Path) -> bool:
    """Whether tokenizer.json is a SentencePiece model in BPE's clothes."""
    found = read_json(folder / "tokenizer.json") or {}
    model, decoder = found.get("model", {}), found.get("decoder") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and decoder.get("type") == "Sequence"


def _auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(str(folder), "has no tokenizer", "fetch its tokenizer.json, or tokenizer.model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(str(folder), f"transformers cannot load the tokenizer: {error}", "fetch it again") from None


def llama_hf(folder: Path) -> Tokens:
    """Llama's vocabulary without its tokenizer.model: all scores are alike."""
    tokenizer = _auto_tokenizer(folder)
    vocab, specials = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    base, texts, types = tokenizer.vocab_size, [], []
    by_id = {i: text for text, i in vocab.items()}
    for i in range(base):
        texts.append(by_id[i])
        byte = re.fullmatch("<0x[0-9A-Fa-f]{2}>", by_id[i])
        types.append(BYTE if byte else CONTROL if i in specials else NORMAL)
    for text, i in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1]):
        if i >= base:
            texts.append(text)
            types.append(CONTROL if text in tokenizer.all_special_tokens else USER_DEFINED)
    return Tokens("llama", "default", texts, [-1000.0] * len(texts), types)


def bpe(folder: Path, size: int | None) -> Tokens:
    """A byte-level BPE vocabulary."""
    tokenizer = _auto_tokenizer(folder)
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    by_id = {i: text for text, i in vocab.items()}
    size = size or len(vocab)
    if max(by_id) >= size:
        fact = f"the tokenizer has a token {max(by_id)}, the config says {size} tokens"
        raise InputError(str(folder), fact, "config.json and tokenizer do not belong together")
    texts, types = [], []
    for i in range(size):
        text, kind = by_id.get(i), NORMAL
        if text is None:
            text, kind = f"[PAD{i}]", UNUSED
        elif i in added:
            if not added[i].normalized:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            text, kind = added_type({"special": added[i].special}, text)
        texts.append(text)
        types.append(kind)
    return Tokens("gpt2", pretokenizer(tokenizer, folder), texts, None, types)


def pretokenizer(tokenizer: Any, folder: Path) -> str:
    found = hashlib.sha256(str(tokenizer.encode(CHECK_TEXT)).encode()).hexdigest()
    known = json.loads(resources.files(__package__).joinpath("pretokenizers.json").read_text())
    if found not in known:
        remedy = "llama.cpp does not know it either: its converter stops here too"
        raise InputError(str(folder), f"the tokenizer's pre-tokenizer ({found[:12]}…) is not known", remedy)
    return str(known[found])


def merges(folder: Path) -> list[str]:
    """BPE merges as 'left right'; a space inside a part is written as U+0120."""
    found = (read_json(folder / "tokenizer.json") or {}).get("model", {}).get("merges")
    if found:
        return [m if isinstance(m, str) else " ".join(part.replace(" ", "\u0120") for part in m) for m in found]
    path = folder / "merges.txt"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    parts = [line.split() for line in (lines[1:] if lines[:1] and lines[0].startswith("#") else lines)]
    return [" ".join(p) for p in parts if len(p) == 2]


WRITTEN_IDS = ("bos", "eos", "eot", "eom", "unk", "sep", "pad", "mask")  # the kinds that GGUF has a key for
WRITTEN_FLAGS = ("bos", "eos", "sep")


class Special:
    """Special token ids, add_*_token flags, chat template and normalizer flags, from the tokenizer's JSON files."""

    def __init__(self, folder: Path, limit: int | None, names: Sequence[str] = SPECIAL) -> None:
        self.folder, self.limit, self.names = folder, limit, list(names)
        self.ids: dict[str, int] = {}
        self.add: dict[str, bool] = {}
        self.template: Any = None
        self.lowercase: bool | None = None
        self.strip_accents: bool | None = None
        tokenizer = read_json(folder / "tokenizer.json") or {}
        settings = read_json(folder / "tokenizer_config.json") or {}
        if tokenizer:
            self._normalizer(tokenizer.get("normalizer") or {})
            self._post_processor(tokenizer.get("post_processor"), settings)
        if settings:
            self._settings(settings, tokenizer.get("added_tokens") or [])
        config = read_json(folder / "config.json") or {}
        for name in self.names:
            value = config.get(f"{name}_token_id")
            self._set(name, config.get("text_config", {}).get(f"{name}_token_id") if value is None else value)

    def written(self) -> dict[str, Any]:
        """What the converter writes, in its order, as {gguf's writer method without add_: value}."""
        values: dict[str, Any] = {f"{name}_token_id": i for name, i in self.ids.items() if name in WRITTEN_IDS}
        values |= {f"add_{name}_token": flag for name, flag in self.add.items() if name in WRITTEN_FLAGS}
        values |= {
            "chat_template": self.template,
            "normalizer_lowercase": self.lowercase,
            "normalizer_strip_accents": self.strip_accents,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _set(self, name: str, value: Any) -> None:
        if not isinstance(value, int):
            return
        if value < 0:
            fact = f"{name}_token_id is {value}"
            remedy = "write null in its place; llama.cpp's converter stops too"
            raise InputError(str(self.folder / "config.json"), fact, remedy)
        if self.limit is None or value < self.limit:
            self.ids.setdefault(name, value)

    def _settings(self, settings: dict[str, Any], added: list[dict[str, Any]]) -> None:
        template = settings.get("chat_template", self._template_file())
        if isinstance(template, str | list):
            self.template = template
        for name in self.names:
            flag, entry = settings.get(f"add_{name}_token"), settings.get(f"{name}_token")
            if isinstance(flag, bool):
                self.add.setdefault(name, flag)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                self._set(name, next((t.get("id") for t in added if t.get("content") == text), None))

    def _template_file(self) -> Any:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            # The converter takes them as the file system lists them; here the same folder gives the same file.
            more = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
            named = [{"name": p.stem, "template": p.read_text(encoding="utf-8")} for p in more]
            return [{"name": "default", "template": text}, *named] if more else text
        return (read_json(self.folder / "chat_template.json") or {}).get("chat_template")

    def _normalizer(self, normalizer: dict[str, Any]) -> None:
        match normalizer.get("type"):
            case "Lowercase":
                self.lowercase = True
            case "StripAccents":
                self.strip_accents = True
            case "BertNormalizer":
                self.lowercase = normalizer.get("lowercase", self.lowercase)
                self.strip_accents = normalizer.get("strip_accents", self.strip_accents)
            case "Sequence":
                for part in normalizer.get("normalizers", []):
                    self._normalizer(part)

    def _post_processor(self, post: dict[str, Any] | None, settings: dict[str, Any]) -> None:
        """Whether bos and eos are added: what the tokenizer does, ahead of what its settings say.

        ``settings`` is changed where the tokenizer shows what they leave out, if there are any.
        """
        known = {name: settings.get(f"{name}_token") for name in ("bos", "cls", "eos", "sep")}
        for mine, other in (("bos", "cls"), ("eos", "sep")):
            if not known[mine] and known[other] and settings:
                settings[f"{mine}_token"] = known[mine] = known[other]
        for step in (post or {}).get("processors", [post] if post else []):
            match step.get("type"):
                case "ByteLevel":
                    self.add.setdefault("bos", False)
                    self.add.setdefault("eos", False)
                case "RobertaProcessing":
                    self.add |= {"bos": True, "eos": True, "sep": True}
                    for mine, other in (("cls", "bos"), ("sep", "eos")):
                        if not known[mine] and settings:
                            settings[f"{mine}_token"] = known[mine] = step.get(mine, [known[other]])[0]
                case "TemplateProcessing":
                    first, last = self._single(step.get("single", []), known, settings)
                    self._pair(step.get("pair", []), (first, last), known, settings)

    def _single(
        self, single: list[dict[str, Any]], known: dict[str, Any], settings: dict[str, Any]
    ) -> tuple[str | None, str | None]:
        """The special tokens at both ends of one sequence."""
        if len(single) < 2:
            return None, None
        first, last = _special(single[0]), _special(single[-1])
        if first:
            if not settings:
                known["bos"] = first
            elif first not in (known["bos"], known["cls"]):
                for name in ("bos", "cls"):
                    if not known[name]:
                        settings[f"{name}_token"] = known[name] = first
            self.add["bos"] = first in (known["bos"], known["cls"])
        if last:
            if settings and last != known["eos"]:
                spare = next((name for name in ("eot", "eom") if name not in self.names), None)
                if spare:
                    self.names.append(spare)
                    settings[f"{spare}_token"] = known["eos"]
                settings["eos_token"] = last
            known["eos"], self.add["eos"] = last, True
        return first, last

    def _pair(
        self,
        pair: list[dict[str, Any]],
        ends: tuple[str | None, str | None],
        known: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        """Whether a separator stands between two sequences: A [sep] [eos] B."""
        if not pair:
            return
        first, last = ends
        start = 1 if first and _special(pair[0]) == first else 0
        pair = pair[start : -1 if last and _special(pair[-1]) == last else None]
        between = pair[1:-1]
        if not between or [part.get("Sequence", {}).get("id") for part in (pair[0], pair[-1])] != ["A", "B"]:
            return
        closing = [bool(_special(part)) and _special(part) in (known["sep"], known["eos"]) for part in between]
        self.add["sep"] = (closing[0] and not last) or (len(between) == 2 and closing[1])
        if self.add["sep"] and not known["sep"] and settings:
            settings["sep_token"] = known["eos"]


def _special(part: dict[str, Any]) -> str | None:
    found: str | None = part.get("SpecialToken", {}).get("id")
    return found
