"""``calibration.tokens``: the windows of tokens that every statistic is taken over, as one artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qbuild.inputs import InputFile

KIND = "calibration.tokens"
SALT = 1
VERSIONS = ("tokenizers", "transformers")
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
BUILTIN = "builtin"


@dataclass(frozen=True)
class Params:
    """At most ``samples`` windows of exactly ``length`` tokens, chosen by ``seed`` where there are more.

    ``begin``: each begins with the token that the tokenizer puts before a text, if it does, as in llama.cpp.
    """

    samples: int
    length: int
    seed: int
    begin: bool


@dataclass(frozen=True)
class Task:
    """``use``: calibration or evaluation; ``texts``: the files of ``source``, none for the built-in text;
    ``tokenizer``: its files by name, which lie in ``folder``; ``rows``: of the model's embedding."""

    use: str
    source: str
    texts: tuple[InputFile, ...]
    model: str
    folder: Path
    tokenizer: Mapping[str, InputFile]
    params: Params
    rows: int


def ram(tokenizer: Mapping[str, Path], text_bytes: int) -> int:
    """Predicted peak bytes: transformers without torch, the tokenizer, and a text with its tokens as Python objects.

    Measured: 0.83 to 0.99 of it, for tokenizers of 2 and 49 thousand tokens and texts of 6 kB to 1.1 MB.
    """
    vocabulary = tokenizer["tokenizer.json"].stat().st_size if "tokenizer.json" in tokenizer else 1 << 20
    return (81 << 20) + 28 * vocabulary + 165 * text_bytes
