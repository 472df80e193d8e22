"""The texts that come with qbuild: enough of them, of many kinds, in many scripts, and never the same thing twice."""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from pathlib import Path

from qbuild.calibration import texts
from qbuild.calibration.texts import documents

FOLDER = Path(texts.__file__).with_name("corpus")
FILES = sorted(FOLDER.glob("*.txt"))
SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL", "THAI")


def test_there_is_enough_and_it_is_utf8() -> None:
    assert len(FILES) >= 14
    assert sum(len(path.read_text(encoding="utf-8").encode()) for path in FILES) >= 100_000


def test_hardly_a_line_is_there_twice() -> None:
    lines = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if len(line.strip()) > 12]  # shorter ones are brackets and rules
    assert len(set(lines)) >= 0.98 * len(lines)


def test_it_says_something_new_to_the_end() -> None:
    """Text made by a pattern is small when it is compressed."""
    data = b"".join(path.read_bytes() for path in FILES)
    assert len(zlib.compress(data, 9)) >= 0.3 * len(data)


def test_many_scripts_are_in_it() -> None:
    letters = Counter(
        unicodedata.name(letter, "").partition(" ")[0]
        for found in documents(None)
        for letter in found
        if letter.isalpha()
    )
    assert all(letters[script] >= 150 for script in SCRIPTS), letters


def test_the_documents_are_the_parts_of_the_files_and_nothing_is_lost() -> None:
    found = documents(None)
    assert len(found) >= 100
    assert all(isinstance(document, str) and document.strip() and texts.BREAK not in document for document in found)
    whole = "".join(path.read_text(encoding="utf-8") for path in FILES)
    assert "".join("".join(map(str, found)).split()) == "".join(whole.replace(texts.BREAK, "").split())
