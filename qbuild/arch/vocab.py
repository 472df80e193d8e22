"""Vocabularies as llama.cpp's converter writes them: SentencePiece models and byte-level BPE.

Source: convert_hf_to_gguf.py and gguf-py of llama.cpp (ggml 0.25). Its in-tree SpecialVocab differs from the one in the
``gguf`` package of the same number, so those rules stand here.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from qbuild.errors import InputError

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


def sentencepiece(folder: Path, size: int | None) -> tuple[list[str], list[float], list[int]]:
    """(texts, scores, types) of ``tokenizer.model`` with the added tokens of the files beside it."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    model.LoadFromFile(str(folder / "tokenizer.model"))
    size = size or model.vocab_size()
    texts, scores, types = [f"[PAD{i}]" for i in range(size)], [-10000.0] * size, [UNUSED] * size
    for i in range(min(size, model.vocab_size())):
        texts[i], scores[i], types[i] = model.IdToPiece(i), model.GetScore(i), _piece_type(model, i)
    for text, i in (read_json(folder / "added_tokens.json") or {}).items():
        if i < size:
            texts[i], scores[i], types[i] = text, -1000.0, USER_DEFINED
    config = read_json(folder / "tokenizer_config.json") or {}
    for key, entry in config.get("added_tokens_decoder", {}).items():
        if int(key) < size:
            text, kind = added_type(entry, entry["content"])
            texts[int(key)], scores[int(key)], types[int(key)] = text, -1000.0, kind
    return texts, scores, types


def _piece_type(model: Any, i: int) -> int:
    tests = ((model.IsUnknown, UNKNOWN), (model.IsControl, CONTROL), (model.IsUnused, UNUSED), (model.IsByte, BYTE))
    return next((kind for test, kind in tests if test(i)), NORMAL)


def bpe(folder: Path, size: int | None) -> tuple[list[str], list[int], str]:
    """(texts, types, pre-tokenizer name) of a byte-level BPE tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    by_id = {i: text for text, i in vocab.items()}
    texts, types = [], []
    for i in range(size or len(vocab)):
        text, kind = by_id.get(i), NORMAL
        if text is None:
            text, kind = f"[PAD{i}]", UNUSED
        elif i in added:
            if not added[i].normalized:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            text, kind = added_type({"special": added[i].special}, text)
        texts.append(text)
        types.append(kind)
    return texts, types, pretokenizer(tokenizer, folder)


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


class Special:
    """Special token ids, add_*_token flags, chat template and normalizer flags, from the tokenizer's JSON files."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit
        self.ids: dict[str, int] = {}
        self.add: dict[str, bool] = {}
        self.template: Any = None
        self.lowercase: bool | None = None
        self.strip_accents: bool | None = None
        self.names = list(SPECIAL)
        self._from_tokenizer()
        config = read_json(folder / "config.json") or {}
        for name in self.names:
            value = config.get(f"{name}_token_id")
            self._set(name, value if value is not None else config.get("text_config", {}).get(f"{name}_token_id"))

    def _set(self, name: str, value: Any) -> None:
        if isinstance(value, int) and (self.limit is None or value < self.limit):
            self.ids.setdefault(name, value)

    def _from_tokenizer(self) -> None:
        tokenizer = read_json(self.folder / "tokenizer.json")
        config = read_json(self.folder / "tokenizer_config.json")
        if tokenizer:
            self._normalizer(tokenizer.get("normalizer") or {})
            self._post_processor(tokenizer.get("post_processor"), config)
        if config is None:
            return
        template = config.get("chat_template", self._template_file())
        if isinstance(template, str | list):
            self.template = template
        added = (tokenizer or {}).get("added_tokens") or []
        for name in self.names:
            flag, entry = config.get(f"add_{name}_token"), config.get(f"{name}_token")
            if isinstance(flag, bool):
                self.add.setdefault(name, flag)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                self._set(name, next((t.get("id") for t in added if t.get("content") == text), None))

    def _template_file(self) -> Any:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            more = list((self.folder / "additional_chat_templates").glob("*.jinja"))
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

    def _post_processor(self, post: dict[str, Any] | None, config: dict[str, Any] | None) -> None:
        """Whether bos and eos are added: what the tokenizer does, ahead of what its config says."""
        if not post:
            return
        known = config if config is not None else {}
        for mine, other in (("bos", "cls"), ("eos", "sep")):
            if not known.get(f"{mine}_token") and known.get(f"{other}_token"):
                known[f"{mine}_token"] = known[f"{other}_token"]
        for step in post.get("processors", [post]):
            if step.get("type") == "ByteLevel":
                self.add.setdefault("bos", False)
                self.add.setdefault("eos", False)
            elif step.get("type") == "TemplateProcessing":
                self._template_processing(step.get("single", []), known, config is not None)
                self._pair(step, known)

    def _template_processing(self, single: list[dict[str, Any]], known: dict[str, Any], has_config: bool) -> None:
        if len(single) < 2:
            return
        first = single[0].get("SpecialToken", {}).get("id")
        last = single[-1].get("SpecialToken", {}).get("id")
        if first:
            starts = (known.get("bos_token"), known.get("cls_token"))
            if not has_config or first not in starts:
                for name in ("bos", "cls"):
                    if not known.get(f"{name}_token"):
                        known[f"{name}_token"] = first
            self.add["bos"] = first in (known.get("bos_token"), known.get("cls_token"))
        if last:
            if has_config and last != known.get("eos_token"):
                self.names.append("eot")
                known["eot_token"], known["eos_token"] = known.get("eos_token"), last
            self.add["eos"] = True

    def _pair(self, step: dict[str, Any], known: dict[str, Any]) -> None:
        """Whether a separator stands between two sequences: A [sep] [eos] B."""
        ids = [part.get("SpecialToken", {}).get("id") for part in step.get("pair", [])]
        sequences = [part.get("Sequence", {}).get("id") for part in step.get("pair", [])]
        single = step.get("single", [])
        first, last = (single[i].get("SpecialToken", {}).get("id") if len(single) > 1 else None for i in (0, -1))
        start = 1 if first and ids[:1] == [first] else 0
        stop = len(ids) - 1 if last and ids[-1:] == [last] else len(ids)
        ids, sequences = ids[start:stop], sequences[start:stop]
        if len(ids) < 3 or (sequences[0], sequences[-1]) != ("A", "B"):
            return
        between, ends = ids[1:-1], (known.get("sep_token"), known.get("eos_token"))
        add = bool(between[0] and between[0] in ends and not last)
        add |= bool(len(between) == 2 and between[1] and between[1] in ends)
        self.add["sep"] = add
        if add and not known.get("sep_token"):
            known["sep_token"] = known.get("eos_token")
