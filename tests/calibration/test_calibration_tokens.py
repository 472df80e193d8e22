"""Calibration data from strangers: what is in the windows, in which order, and everything that can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from qbuild.calibration.texts import check, documents
from qbuild.calibration.tokens import Packed, Shape, begin_token, load_tokenizer, windows
from qbuild.digest import digest_bytes
from qbuild.errors import InputError
from qbuild.inputs import InputFile

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
FILES = {path.name: path for path in TINY.iterdir()}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(FILES, "tiny")


@pytest.fixture(scope="module")
def prose() -> str:
    return "\n".join(f"Line {n} of a long text: {n * n} is the square of {n}." for n in range(400))


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_one_text_is_cut_from_its_beginning_without_gaps(tokenizer: Any, prose: str) -> None:
    found = windows([prose], tokenizer, Shape(5, 64))
    assert found.ids.dtype == np.int32
    assert found.ids.reshape(-1).tolist() == plain(tokenizer, prose)[: 5 * 64]
    assert found.notice == f"5 windows of 64 tokens: 320 of {len(plain(tokenizer, prose)):,} tokens"


def test_the_seed_changes_nothing_of_one_text(tokenizer: Any, prose: str) -> None:
    assert np.array_equal(
        windows([prose], tokenizer, Shape(5, 64, seed=1)).ids, windows([prose], tokenizer, Shape(5, 64)).ids
    )


def test_several_documents_are_joined_by_the_end_token_and_packed(tokenizer: Any, prose: str) -> None:
    texts = [f"{n}. {prose[n * 50 : n * 50 + 90]}" for n in range(12)]
    found = windows(texts, tokenizer, Shape(1000, 16))
    stream = found.ids.reshape(-1).tolist()
    at, seen = 0, []
    while at < len(stream):  # every document is there once, whole but for the end of the last
        n = next(i for i, text in enumerate(texts) if plain(tokenizer, text)[:6] == stream[at : at + 6])
        ids = plain(tokenizer, texts[n])
        assert stream[at : at + len(ids)] == ids[: len(stream) - at]
        at += len(ids)
        assert at >= len(stream) or stream[at] == tokenizer.eos_token_id
        at += 1
        seen.append(n)
    assert sorted(seen) == list(range(12))
    assert seen != sorted(seen)


def test_fewer_windows_than_asked_for_are_said(tokenizer: Any) -> None:
    found = windows(["a b c d e f g h", "i j k l m n o p"], tokenizer, Shape(100, 4))
    total = found.notice.split(" of ")[2].split()[0]
    assert found.ids.shape == (int(total) // 4, 4)
    assert found.notice.endswith(f"{len(found.ids) * 4} of {total} tokens of 2 documents; 100 windows were asked for")


def test_only_as_many_documents_are_read_as_needed_and_the_rest_is_said(tokenizer: Any, prose: str) -> None:
    many = [prose] * 50
    found = windows(many, tokenizer, Shape(2, 64))
    assert "of 1 out of 50 documents" in found.notice


def test_the_order_of_documents_is_the_seeds_and_stays_what_it_is(tokenizer: Any, prose: str) -> None:
    parts = prose.split("\n")[:40]
    first = windows(parts, tokenizer, Shape(3, 32, seed=0))
    assert np.array_equal(first.ids, windows(parts, tokenizer, Shape(3, 32, seed=0)).ids)
    assert not np.array_equal(first.ids, windows(parts, tokenizer, Shape(3, 32, seed=1)).ids)
    expected = plain(tokenizer, parts[15])
    assert first.ids.reshape(-1)[: len(expected)].tolist() == expected


def test_windows_of_llama_imatrix_begin_with_the_begin_token(tokenizer: Any, prose: str) -> None:
    begin = begin_token(tokenizer)
    assert begin == tokenizer.bos_token_id == 1
    found = windows([prose], tokenizer, Shape(4, 32), begin).ids
    stream = np.array(tokenizer(prose)["input_ids"][: 4 * 32]).reshape(4, 32)  # with special tokens, as it tokenizes
    assert np.array_equal(found[:, 1:], stream[:, 1:])
    assert (found[:, 0] == begin).all()


def test_not_even_one_window_is_refused_with_both_lengths(tokenizer: Any) -> None:
    with pytest.raises(
        InputError, match=r"calibration.source: the text is too short: it has \d tokens, a window needs 64"
    ):
        windows(["short"], tokenizer, Shape(4, 64))


def test_the_same_tokens_are_the_same_bytes(tokenizer: Any, prose: str) -> None:
    found = windows([prose], tokenizer, Shape(5, 64))
    assert windows([prose, ""][:1], tokenizer, Shape(5, 64)).to_bytes() == found.to_bytes()
    assert np.array_equal(Packed.from_bytes(found.to_bytes()).ids, found.ids)
    assert len(found.to_bytes()) == 8 + 4 * 5 * 64
    with pytest.raises(ValueError):
        Packed.from_bytes(found.to_bytes()[:-4])


def test_conversations_go_through_the_models_template(tokenizer: Any) -> None:
    said = [{"role": "user", "content": "How far is the sea?"}, {"role": "assistant", "content": "An hour on foot."}]
    bare = windows([said], tokenizer, Shape(1, 8)).ids
    assert bare[0].tolist() == plain(tokenizer, "How far is the sea?\n\nAn hour on foot.")[:8]
    templated = load_tokenizer(FILES, "tiny")
    templated.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    assert (
        windows([said], templated, Shape(1, 8)).ids[0].tolist() == plain(tokenizer, "[user] How far is the sea?\n")[:8]
    )
    templated.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(InputError, match="refuses messages of user, assistant: no system messages"):
        windows([said], templated, Shape(1, 8))


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \n")
    assert documents(str(tmp_path / "a.txt")) == ["one\r\n\r\ntwo \n"]


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi"}]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps({'text': 'one', 'id': 3})}\n\n{json.dumps({'messages': said})}\n")
    assert documents(str(path)) == ["one", said]


def test_a_directory_is_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert documents(str(tmp_path)) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a.jsonl:2: is not JSON"),
        (b'{"text": "a"}\n\n{"body": "b", "id": 1}\n', r"a.jsonl:3: has neither text nor messages; it has body, id"),
        (b'{"text": 5}\n', r"a.jsonl:1: has neither text nor messages"),
        (b'["a"]\n', r"a.jsonl:1: has neither"),
        (b'{"messages": [{"role": "user"}]}\n', r"a.jsonl:1: has neither"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl:2: is not UTF-8"),
        (rb'{"text": "cut \ud83d here"}', r"a.jsonl:1: has half of a letter in it: '\\ud83d'"),
        (rb'{"messages": [{"role": "user", "content": "\ude00"}]}', r"a.jsonl:1: has half of a letter in it"),
        (b'{"text": ""}\n\n', "has no text in it"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as read:
        documents(str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError) as looked_at:
        check(str(tmp_path / "a.jsonl"), 1, "calibration")
    assert str(looked_at.value) == str(read.value)


def test_a_plan_holds_little_of_a_large_text(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes("\ufeffx".encode() + "é".encode() * (5 << 20))  # cut inside of letters
    lines.write_bytes(b"".join(json.dumps({"text": "x" * 65000}).encode() + b"\n" for _ in range(160)))
    tracemalloc.start()
    try:
        for path, size in ((text, (10 << 20) + 1), (lines, 160 * 65000)):
            with pytest.raises(InputError, match=f"it has {size} bytes, a window needs {2 * size} tokens"):
                check(str(path), 2 * size, "calibration")
            assert InputFile.taken(path).digest == digest_bytes(path.read_bytes())
            tracemalloc.reset_peak()
            check(str(path), 64, "calibration")
            InputFile.taken(path)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    with text.open("ab") as file:
        file.write(b"\n\xe9")
    with pytest.raises(InputError, match=r"a\.txt:2: is not UTF-8"):
        check(str(text), 64, "calibration")
    lines.write_bytes(json.dumps({"text": "x" * (3 << 19)}).encode())  # too long a line is left to the job
    check(str(lines), 1 << 30, "calibration")


def test_files_that_are_not_there_or_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        documents(str(tmp_path / "gone.txt"))
    with pytest.raises(InputError, match="no such file"):
        documents("gone/wiki.txt")  # could be a data set's name too, but is written like a path
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet is no text that can be read here"):
        documents(str(tmp_path / "a.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.txt, \.jsonl, \.json files in it"):
        documents(str(tmp_path / "empty"))


def test_a_data_sets_file_comes_from_the_hub_and_offline_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "from afar"}\n')
    asked = []

    def download(repo: str, name: str, *, repo_type: str, local_files_only: bool) -> str:
        asked.append((repo, name, repo_type, local_files_only))
        return str(tmp_path / name.rpartition("/")[2])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert documents("org/some-texts/data/train.jsonl") == ["from afar"]
    assert documents("org/some-texts/data/train.jsonl", offline=True) == ["from afar"]
    assert asked == [("org/some-texts", "data/train.jsonl", "dataset", offline) for offline in (False, True)]

    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="is not here, and the Hub cannot be asked"):
        documents("org/some-texts/train.jsonl")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="my/model: has no tokenizer: there is no "):
        load_tokenizer({"config.json": TINY / "config.json"}, "my/model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="my/model: transformers cannot load the tokenizer"):
        load_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"}, "my/model")


def test_tokenizing_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; sys.modules['torch'] = None\n"
        "from qbuild.calibration.tokens import *\n"
        "files = {p.name: p for p in Path(sys.argv[1]).iterdir()}\n"
        "print(windows(['one two three four'], load_tokenizer(files, 'tiny'), Shape(1, 3)).ids.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TINY)], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 3)", done.stderr
