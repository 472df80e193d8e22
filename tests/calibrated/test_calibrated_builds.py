"""Calibrated targets as whole builds of a real model: what runs, what is shared, what changes cost, what is refused."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Build, Done, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qbuild import staged
from qbuild.running import IDLE
from qbuild.store import Store

ONCE = {"calibration.tokens": 1, "calibration.statistics": 3}


def actions(document: dict[str, Any]) -> dict[str, int]:
    return document["totals"]["actions"]


def test_one_forward_pass_serves_every_format_and_a_second_group_size_none(build: Build) -> None:
    auto = ["targets.q4_k_m.imatrix=auto", "targets.iq2_xs.imatrix=auto"]
    made = build("target=[awq/w4_g64,gptq/w4_g64,ct/w4a16_g64,imatrix,gguf/q4_k_m,gguf/iq2_xs]", *auto)
    # GPTQ's layout and compressed-tensors hold the same codes, so three layers are solved twice, not three times.
    solved = {"quant.layer": 6, "calibration.imatrix": 1, "checkpoint.directory": 3}
    assert actions(made) == ONCE | solved
    assert made["totals"]["computed"] > 29

    again = build("target=[awq/w4_g64,gptq/w4_g64,ct/w4a16_g64,imatrix,gguf/q4_k_m,gguf/iq2_xs]", *auto)
    assert actions(again) == {}
    assert all(set(target["verdicts"]) == {"hit"} for target in again["targets"].values())

    other = build("target=awq/w4_g32")
    assert actions(other) == {"quant.layer": 3, "checkpoint.directory": 1}


@pytest.mark.slow
def test_a_pass_that_was_done_here_in_part_tells_no_rate(
    build: Build, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "MEASURABLE", 0)
    index, lock = project.parent / "cache" / "qbuild" / "store" / "index.sqlite", Store.lock

    def ask(query: str, rows: Sequence[Any] = ()) -> list[Any]:
        with contextlib.closing(sqlite3.connect(index, isolation_level=None)) as db:
            for row in rows:
                db.execute(query, row)
            return [] if rows else db.execute(query).fetchall()

    def passes(meanwhile: Callable[[Store, str], bool]) -> int:
        """How many rates are known after a build, where something happens before its pass has the lock."""

        @contextlib.contextmanager
        def locked(store: Store, name: str, **more: Any) -> Iterator[bool]:
            with lock(store, name, **more) as waited:
                yield meanwhile(store, name) if name.startswith("states ") else waited

        with monkeypatch.context() as patch:
            patch.setattr(Store, "lock", locked)
            build("target=imatrix")
        return len(ask("SELECT * FROM rates WHERE name = 'forward'"))

    def another_build(_store: Store, _name: str) -> bool:
        ask("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?)", layers[:2])
        return True

    def a_kill(store: Store, name: str) -> bool:
        (store.root / "states" / name.split()[1][:32]).mkdir(parents=True)
        return False

    assert passes(lambda _store, _name: False) == 1
    layers = ask("SELECT * FROM results WHERE kind = 'calibration.statistics'")
    for meanwhile in (another_build, a_kill):
        ask("DELETE FROM results WHERE kind LIKE 'calibration.%'")
        assert passes(meanwhile) == 1


@pytest.mark.slow
def test_threads_and_spilled_states_change_no_byte(build: Build, project: Path) -> None:
    digests = []
    for number, words in enumerate((["budget.threads=1"], ["budget.threads=2"], ["calibration.spill=true"])):
        made = build("target=[awq/w4_g64,gptq/w4_g64,imatrix]", f"store.dir={project}/store{number}", *words)
        digests.append([target["digest"] for target in made["targets"].values()])
    assert digests == [digests[0]] * 3


def test_gc_frees_statistics_and_codes_and_what_was_made_of_them_still_counts(build: Build, qbuild: Run) -> None:
    build("target=awq/w4_g64")
    planned = build("plan", "target=imatrix")["targets"]["imatrix"]["bytes"]
    alone = build("target=imatrix")  # the diagonals are in the store, within Gram matrices
    assert planned == alone["targets"]["imatrix"]["bytes"]
    assert actions(alone) == {"calibration.imatrix": 1}
    made = build("target=[awq/w4_g64,imatrix]")
    assert actions(made) == {}
    qbuild("gc")
    again = build("target=[awq/w4_g64,imatrix]", "keep_going=true")  # another command line: not the null build
    assert actions(again) == {}
    assert [t["digest"] for t in again["targets"].values()] == [t["digest"] for t in made["targets"].values()]

    other = build("target=awq/w4_g32")
    assert actions(other) == ONCE | {"quant.layer": 3, "checkpoint.directory": 1}
    elsewhere = build("target=imatrix", "store.dir=elsewhere", "out=there")
    assert actions(elsewhere) == ONCE | {"calibration.imatrix": 1}
    assert elsewhere["targets"]["imatrix"]["digest"] == alone["targets"]["imatrix"]["digest"]


def test_a_file_with_imatrix_auto_alone_tells_what_it_was_calibrated_on(build: Build, qbuild: Run) -> None:
    words = ["target=gguf/q2_k_s", "targets.q2_k_s.imatrix=auto"]
    made = build(*words)
    assert actions(made) == ONCE | {"calibration.imatrix": 1}
    told = made["targets"]["q2_k_s"]["calibration"]
    assert told["samples"] == 4
    assert told["digest"]
    qbuild("gc")  # the tokens are gone, their digest is not
    again = build(*words, "keep_going=true")
    assert actions(again) == {}
    assert again["targets"]["q2_k_s"]["calibration"] == told


def test_a_file_with_imatrix_auto_has_the_tensors_of_one_that_names_the_matrix(build: Build) -> None:
    made = build("target=[imatrix,gguf/q2_k_s]", "targets.q2_k_s.imatrix=auto")
    matrix = made["targets"]["imatrix"]["path"]
    named = build("target=gguf/q2_k_s", f"targets.q2_k_s.imatrix={matrix}", "targets.q2_k_s.suffix=named")
    assert named["totals"]["computed"] == 0
    assert named["targets"]["q2_k_s"]["verdicts"] == {"hit": 29}


def test_directories_hold_what_their_config_says(build: Build, model: Path) -> None:
    made = build("target=[awq/w4_g64,gptq/w4_g32,ct/w4a16_g32]")
    for name, method in (("awq_w4_g64", "awq"), ("gptq_w4_g32", "gptq"), ("ct_w4a16_g32", "compressed-tensors")):
        folder = Path(made["targets"][name]["path"])
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == method
        assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
        with safe_open(folder / "model.safetensors", framework="np") as opened:
            held = set(opened.keys())
        linears = {n.rpartition(".")[0] for n in held if n.endswith(("qweight", "weight_packed"))}
        assert len(linears) == 21
        assert not {f"{linear}.weight" for linear in linears} & held
        assert made["targets"][name]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_targets_that_differ_only_in_how_codes_are_found_do_not_wait_for_each_other(build: Build) -> None:
    other = ["+targets.plain.format=awq", "+targets.plain.group_size=64", "+targets.plain.rounding=nearest"]
    made = build("target=awq/w4_g64", *other, "+targets.plain.scaled=false", "+targets.plain.suffix=plain")
    one, two = made["targets"]["awq_w4_g64"], made["targets"]["plain"]
    assert one["bytes"] == two["bytes"]
    assert one["digest"] != two["digest"]


def test_a_file_in_shards_is_as_far_from_its_source_as_the_whole_file_and_stays_measured_after_gc(
    build: Build, qbuild: Run, text: Path
) -> None:
    words = [f"evaluation.source={text}", "evaluation.samples=2", "evaluation.length=64"]
    whole = build("target=gguf/q8_0", *words)["evaluation"]["targets"]["q8_0"]
    cut = build("target=gguf/q8_0", "targets.q8_0.max_shard_size=1MB", *words)
    assert actions(cut) == {"evaluation.result": 1}
    assert cut["evaluation"]["targets"]["q8_0"] == whole
    qbuild("gc")  # frees tokens and states of the source
    words.append("keep_going=true")  # another command line: not the null build
    again = build("target=gguf/q8_0", "targets.q8_0.max_shard_size=1MB", *words)
    assert actions(again) == {}
    idle = IDLE | {"verdicts": {"hit": 1}}
    assert again["evaluation"] == cut["evaluation"] | idle


def test_shards_that_a_build_no_longer_has_go(build: Build) -> None:
    sharded = Path(
        build("target=gptq/w4_g64", "targets.gptq_w4_g64.max_shard_size=500KB")["targets"]["gptq_w4_g64"]["path"]
    )
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    (sharded / "notes.txt").write_text("mine")
    whole = Path(build("target=gptq/w4_g64")["targets"]["gptq_w4_g64"]["path"])
    assert whole == sharded
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    assert (whole / "notes.txt").read_text() == "mine"


def test_a_change_in_the_last_layer_leaves_the_layers_before_it(build: Build, model: Path) -> None:
    build("target=awq/w4_g64")
    _change(model / "model.safetensors", "model.layers.2.mlp.up_proj.weight")
    assert actions(build("target=awq/w4_g64")) == {
        "calibration.statistics": 1, "quant.layer": 1, "checkpoint.directory": 1,
    }  # fmt: skip


def test_a_new_head_changes_no_statistics(build: Build, model: Path) -> None:
    build("target=awq/w4_g64")
    _change(model / "model.safetensors", "model.norm.weight")
    assert actions(build("target=awq/w4_g64")) == {"checkpoint.directory": 1}


def test_error_propagation_is_a_chain_of_the_targets_own(build: Build, model: Path) -> None:
    words = ["target=[gptq/w4_g64,ct/w4a16_g64]", "targets.gptq_w4_g64.propagate=true"]
    both = build(*words, "targets.ct_w4a16_g64.propagate=true")
    propagated = {"calibration.tokens": 1, "quant.propagated": 3}  # both layouts hold the same codes
    assert actions(both) == propagated | {"checkpoint.directory": 2}

    plain = build("target=gptq/w4_g64", "targets.gptq_w4_g64.suffix=plain")
    assert actions(plain) == {"calibration.statistics": 3, "quant.layer": 3, "checkpoint.directory": 1}
    assert plain["targets"]["gptq_w4_g64"]["digest"] != both["targets"]["gptq_w4_g64"]["digest"]

    _change(model / "model.safetensors", "model.layers.2.mlp.up_proj.weight")
    assert actions(build("target=gptq/w4_g64", words[1])) == {"quant.propagated": 1, "checkpoint.directory": 1}


def test_error_propagation_is_planned_with_its_memory(attempt: Run) -> None:
    words = ["plan", "target=gptq/w4_g64", "targets.gptq_w4_g64.propagate=true"]
    steps = {step["kind"]: step for step in attempt(*words).document["steps"]}
    assert set(steps) == {"source.hash", "calibration.tokens", "quant.propagated", "checkpoint.directory"}
    assert steps["quant.propagated"]["count"] == 3
    refused(attempt(*words, "budget.ram=300MiB"), 3, "error propagation", "budget.ram=")


def test_all_again_computes_everything_once(build: Build) -> None:
    first = build("target=[awq/w4_g64,gguf/q2_k_s]", "targets.q2_k_s.imatrix=auto")
    again = build("-B", "target=[awq/w4_g64,gguf/q2_k_s]", "targets.q2_k_s.imatrix=auto")
    assert actions(again) == actions(first)
    assert again["totals"]["computed"] == 29
    for name, target in first["targets"].items():
        assert again["targets"][name]["digest"] == target["digest"]


def test_a_damaged_file_of_a_directory_is_made_again(build: Build) -> None:
    folder = Path(build("target=awq/w4_g64")["targets"]["awq_w4_g64"]["path"])
    path = folder / "model.safetensors"
    good = path.read_bytes()
    path.chmod(0o600)  # the store's own file, by a hard link or a reflink
    for file in (path, *Path("..", "cache", "qbuild", "store", "blobs").glob("*/*")):
        if file.stat().st_size == len(good):
            file.chmod(0o600)
            file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert actions(build("target=awq/w4_g64")) == {"checkpoint.directory": 1}
    assert path.read_bytes() == good


def test_a_plan_counts_one_pass_and_what_will_be_read(attempt: Run) -> None:
    words = "target=[awq/w4_g64,gguf/q4_k_m]", "targets.q4_k_m.imatrix=auto", "budget.threads=1"
    done = attempt("plan", *words)
    steps = {step["kind"]: step["count"] for step in done.document["steps"]}
    made = {"quant.layer": 3, "calibration.imatrix": 1, "checkpoint.directory": 1, "gguf.pass": 1}
    assert steps == ONCE | made | {"source.hash": 29}
    assert done.document["predicted"]["ram"] > 100 << 20
    read = attempt(*words).document["totals"]["read_bytes"]  # norms that took over a scale are not read again
    assert done.document["predicted"]["read_bytes"] == pytest.approx(read, rel=1e-3)


def test_targets_are_measured_against_their_source_once(build: Build, project: Path) -> None:
    (project / "license.txt").write_bytes((TINY.parent.parent.parent / "LICENSE").read_bytes())
    words = ["evaluation.source=license.txt", "evaluation.samples=8", "evaluation.length=128"]
    made = build("target=[gguf/f32,gguf/q8_0,gguf/q2_k,awq/w4_g64]", *words)
    assert {k: n for k, n in actions(made).items() if "evaluation" in k} == {
        "evaluation.states": 1, "evaluation.result": 4,
    }  # fmt: skip
    found = made["evaluation"]["targets"]
    assert made["evaluation"]["verdicts"] == {"run": 4}
    for key in ("peak_ram", "predicted_ram"):  # of its worker, and of this process beside it
        assert 100 << 20 < made["jobs"]["evaluation of 4 targets"][key] < made["evaluation"][key]
    # llama-perplexity -m tiny-llama-F32.gguf -f license.txt -c 128 --chunks 8 -ctk f32 -ctv f32 -fa off
    assert found["f32"]["perplexity_llama"] == pytest.approx(44.6888, rel=1e-4)
    assert {result["source_perplexity_llama"] for result in found.values()} == {found["f32"]["perplexity_llama"]}
    assert (found["f32"]["kl"], set(found["f32"]["weights"].values())) == (0, {0})
    assert 0 <= found["q8_0"]["kl"] < 0.01 < found["q2_k"]["kl"]
    assert found["awq_w4_g64"]["tokens"] == 8 * 128
    errors = [found[name]["weights"]["model.layers.1.mlp.up_proj.weight"] for name in ("q8_0", "awq_w4_g64", "q2_k")]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.2
    assert all(len(result["weights"]) == 3 * 7 + 1 for result in found.values())
    again = build("target=[gguf/q8_0,gguf/q2_k,gguf/q4_0]", *words)
    assert actions(again) == {"evaluation.result": 1}
    assert again["evaluation"]["targets"]["q2_k"] == found["q2_k"]


# refusals ------------------------------------------------------------------------------------------------------------


def refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.out
    said = " ".join(done.error[key] for key in ("place", "fact", "remedy"))
    assert not [word for word in words if word not in said], said


def test_a_group_size_that_does_not_divide_is_refused_when_planned(attempt: Run) -> None:
    refused(attempt("plan", "target=gptq/w4_g128", "targets.gptq_w4_g128.group_size=80"), 2, "gptq_w4_g128", "80")


def test_text_that_is_too_short_is_refused_before_the_source_is_read(attempt: Run, text: Path) -> None:
    text.write_text("Internationalization, " * 4)
    done = attempt("target=imatrix")
    refused(done, 4, "calibration.source", "tokens", "a window needs 64")
    assert "hashing" not in done.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no text"),
        (b"Hello.", "it has 6 bytes, a window needs 64 tokens"),
        (b"one\ncaf\xe9 au lait", "text.txt:2 is not UTF-8"),
    ],
)
def test_text_that_cannot_do_is_refused_when_planned(attempt: Run, text: Path, content: bytes, said: str) -> None:
    text.write_bytes(content)
    refused(attempt("plan", "target=imatrix"), 4, said)


def test_a_line_that_is_no_json_is_refused_when_planned(attempt: Run, text: Path) -> None:
    broken = text.with_suffix(".jsonl")
    broken.write_text('{"text": "one two"}\n{"text": oops')
    refused(attempt("plan", "target=imatrix", f"calibration.source={broken}"), 4, "text.jsonl:2", "not JSON")


def test_a_data_set_is_not_asked_for_offline(attempt: Run) -> None:
    words = "target=imatrix", "calibration.source=org/texts/train.jsonl", "offline=true"
    refused(attempt(*words), 4, "org/texts/train.jsonl", "the Hub cannot be asked")


def test_a_tokenizer_of_another_model_is_refused(attempt: Run, model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        tensors[name] = tensors[name][:256].clone()
    save_file(tensors, path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    refused(attempt("target=imatrix"), 4, "its embedding has 256 rows", "tokenizer")


def test_a_weight_that_is_no_number_is_named(attempt: Run, model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _change(model / "model.safetensors", name, b"\xc0\x7f")
    refused(attempt("target=imatrix"), 4, name, "NaN or infinite", "[0, 0]")


def test_text_that_is_not_there_is_refused_when_planned(attempt: Run, text: Path) -> None:
    text.unlink()
    refused(attempt("plan", "target=imatrix"), 4, "text.txt", "no such file")


def test_a_model_without_a_tokenizer_is_refused(attempt: Run, model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(attempt("target=awq/w4_g64"), 4, "tokenizer")


def test_a_gguf_file_cannot_be_calibrated_on(attempt: Run, build: Build) -> None:
    made = build("target=gguf/bf16")["targets"]["bf16"]["path"]
    for words in (("target=imatrix",), ("target=gguf/q8_0", "evaluation.source=builtin")):
        refused(attempt("plan", f"model.source={made}", *words), 4, "GGUF", "safetensors")


def test_a_budget_that_no_pass_fits_is_refused_with_what_helps(attempt: Run) -> None:
    refused(attempt("plan", "target=imatrix", "budget.ram=200MiB"), 3, "calibration", "budget.ram=")


def _change(path: Path, name: str, to: bytes = b"") -> None:
    """Flip a low bit of the first weight of a tensor, or put other bytes in its place."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + json.loads(data[8:start])[name]["data_offsets"][0]
    data[at : at + max(1, len(to))] = to or bytes([data[at] ^ 1])
    path.write_bytes(data)
