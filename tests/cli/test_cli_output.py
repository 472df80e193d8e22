"""What people see: tables and progress, at 80 columns and without colour."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from qbuild import render
from qbuild.progress import Lines, Live, Messages, Sink, Status, duration, sink

STATUS = Status(120, 291, 5 << 30, 12 << 30, 145.4e6, 51.0, 5 << 30, 8 << 30, "disk", "blk.3.attn_k.weight")


def target(name: str, state: str = "run", **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "path": f"/somewhere/outputs/Llama-2-7b/Llama-2-7b-{name.upper()}.gguf", "bytes": 4081004224,
        "exact": False, "at_most": False, "bits_per_weight": 4.845, "weights": 6738415616,
        "verdict": {"state": state, "why": "stored"},
        "types": {"Q4_K": [193, 3 << 30], "Q6_K": [33, 900 << 20], "F32": [65, 1 << 20]},
        "verdicts": {state: 291}, "seconds": 58.0,
    } | changes  # fmt: skip


def step(label: str, **changes: Any) -> dict[str, Any]:
    return {"label": label, "ram": 3 << 30, "disk": 5 << 30, "temporary": 0, "seconds": 58.0, "notes": ()} | changes


def planned(*targets: dict[str, Any], steps: tuple[dict[str, Any], ...] = (step("writing GGUF files"),)) -> Any:
    return {
        "model": {"name": "Llama-2-7b", "source": "meta-llama/Llama-2-7b-hf"},
        "out": "/somewhere/outputs/Llama-2-7b",
        "budget": {"ram": 16 << 30, "vram": 0, "disk": 80 << 30, "threads": 8},
        "predicted": {"ram": 400 << 20, "vram": 0, "disk": 4 << 30, "read_bytes": 12 << 30, "seconds": 58.0},
        "strategy": {"chunk_bytes": 1 << 23, "threads": 8},
        "to_compile": [],
        "notices": [],
        "steps": list(steps),
        "targets": {t["name"]: t for t in targets},
    }


def test_a_plan_says_sizes_needs_and_time() -> None:
    text = render.plan(planned(target("q4_k_m"), target("q5_k_m", exact=True)))
    assert "q4_k_m  ~3.8 GiB  4.84" in text or "q4_k_m  ~3.8 GiB  4.85" in text
    assert "q5_k_m   3.8 GiB" in text
    assert "Q4_K 3.0 GiB in 193, Q6_K 900.0 MiB in 33, F32 1.0 MiB in 65" in text
    assert "reads 12.0 GiB, about 58 s" in text
    assert text.isascii()
    cold = render.plan(planned(target("q4_k_m")) | {"to_compile": ["Q4_K", "Q6_K"]})
    assert cold.endswith("and some 10 s a kernel that this machine has not compiled yet: Q4_K, Q6_K\n")


def test_a_plan_with_nothing_to_do_says_so() -> None:
    text = render.plan(planned(target("q4_k_m", "hit"), steps=()))
    assert text.endswith("nothing to do\n")
    assert "budget" not in text


def test_a_plan_of_several_steps_says_what_each_takes_and_how_it_runs() -> None:
    note = "one pass over 128 windows of 512 tokens, hidden states on disk"
    ahead = step("calibration of 32 layers", temporary=2 << 30, seconds=7500, notes=[note])
    text = render.plan(planned(target("q4_k_m"), steps=(ahead, step("writing GGUF files"))))
    lines = text.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("step "))
    assert re.split("  +", lines[at + 1]) == ["calibration of 32 layers", "3.0 GiB", "5.0 GiB", "2.0 GiB", "2 h 05 min"]
    assert lines[at + 2] == f"  {note}"
    assert re.split("  +", lines[at + 3]) == ["writing GGUF files", "3.0 GiB", "5.0 GiB", "-", "58 s"]
    assert "step" not in render.plan(planned(target("q4_k_m")))


def test_tables_fit_80_columns() -> None:
    steps = step("calibration of 126 layers", seconds=1e6), step("writing GGUF files", disk=999 << 30)
    text = render.plan(planned(target("q4_k_m"), target("iq2_xxs"), steps=steps))
    paths = [line for line in text.splitlines() if "/somewhere" in line]
    assert max(len(line) for line in text.splitlines() if line not in paths) <= 80


def result(**verdicts: int) -> dict[str, Any]:
    made = {"path": "x.gguf", "digest": "d/1", "bytes": 100 << 20, "bits_per_weight": 6.27, "verdicts": verdicts}
    made |= {"seconds": 12.3, "peak_ram": 300 << 20, "predicted_ram": 320 << 20}
    ran = verdicts.get("run", 0)
    totals = {"computed": ran, "reused": 0, "read_bytes": 92 << 20, "written_bytes": 99 << 20, "wall_seconds": 14.2}
    notice = {"place": "targets", "fact": "set, but not chosen: q6_k", "remedy": "chosen: q4_k_m"}
    return {"targets": {"q4_k_m": made}, "totals": totals, "notices": [notice], "evaluation": None}


def test_a_result_shows_predicted_beside_measured_memory() -> None:
    text = render.result(result(run=260, hit=12))
    assert re.fullmatch(r"q4_k_m +100.0 MiB +6.27 +260 +12 +12.3 +300.0 MiB +320.0 MiB", text.splitlines()[1])
    assert text.endswith("done in 14 s: read 92.0 MiB, wrote 99.0 MiB\n")
    assert max(map(len, text.splitlines())) <= 80


def test_the_memory_of_an_evaluation_is_told_beside_that_of_the_files() -> None:
    measured = {"perplexity": 8.5, "kl": 0.25, "top1": 0.75}
    needed = {"seconds": 25.0, "peak_ram": 585 << 20, "predicted_ram": 600 << 20}
    evaluation = needed | {"verdicts": {"run": 1, "hit": 1}, "targets": {"q4_k_m": measured}}
    text = render.result(result(run=260, hit=12) | {"evaluation": evaluation})
    assert re.fullmatch(r"evaluation +- +- +1 +1 +25.0 +585.0 MiB +600.0 MiB", text.splitlines()[2])
    alone = result(hit=272) | {"evaluation": evaluation}
    alone["totals"] |= {"read_bytes": 0, "written_bytes": 0, "actions": {"evaluation.result": 1}}
    assert render.result(alone).endswith("done in 14 s\n")
    null = render.result(result(hit=272) | {"evaluation": evaluation | {"verdicts": {"hit": 2}}})
    assert "evaluation" not in null


def test_a_null_build_says_that_there_was_nothing_to_do_and_what_is_probably_not_meant() -> None:
    text = render.result(result(hit=272))
    assert text.endswith("nothing to do\n\nnotice: targets: set, but not chosen: q6_k\n  chosen: q4_k_m\n")
    assert text.splitlines()[1].split()[-3:] == ["-", "-", "-"]


def test_a_status_has_a_line_for_a_directory_and_not_for_each_of_its_files() -> None:
    def output(path: str, target: str, state: str = "current") -> dict[str, Any]:
        return {"path": f"/somewhere/{path}", "target": target, "state": state, "bytes": 1 << 20}

    folder = [output("m-AWQ/model.safetensors", "awq"), output("m-AWQ/config.json", "awq")]
    files = [*folder, output("m-Q8_0.gguf", "q8_0", "missing"), output("m-Q4_0.gguf", "q4_0")]
    store = {"dir": "/s", "blobs": 4, "blob_bytes": 4 << 20, "partials": 0}
    rows = [line.split("  ") for line in render.status({"store": store, "outputs": files}).splitlines()[:4]]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["output", "target", "state", "files", "size"],
        ["/somewhere/m-AWQ/", "awq", "current", "2", "2.0 MiB"],
        ["/somewhere/m-Q8_0.gguf", "q8_0", "missing", "1", "1.0 MiB"],
        ["/somewhere/m-Q4_0.gguf", "q4_0", "current", "1", "1.0 MiB"],
    ]
    folder[0]["state"] = "changed"
    assert "1 changed, 1 current" in render.status({"store": store, "outputs": folder})


def test_an_error_is_wrapped_below_its_place_and_fact() -> None:
    remedy = "did you mean q4_k_m?\nchoices: " + ", ".join(f"gguf/type_{n}" for n in range(40))
    lines = render.error({"place": "target=x", "fact": "there is none", "remedy": remedy}).splitlines()
    assert lines[:2] == ["qbuild: target=x: there is none", "  did you mean q4_k_m?"]
    assert max(map(len, lines)) <= 80


def test_a_command_to_paste_stays_on_one_line() -> None:
    command = f"rm '/a folder/{'long/' * 20}index.sqlite'*"
    text = render.error({"place": "x", "fact": "is damaged", "remedy": f"remove it:\n  {command}"})
    assert text == f"qbuild: x: is damaged\n  remove it:\n    {command}\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_gc_frees_has_a_line_for_a_reason_and_not_for_each_layer() -> None:
    layers = [{"path": f"/s/{n}", "frees": 2 << 20, "why": "quant.layer, no output needs it"} for n in range(30)]
    items = [*layers, {"path": "/s/p", "frees": 1 << 10, "why": "an unfinished file"}]
    document = {"dry_run": True, "freed": (60 << 20) + (1 << 10), "kept": 1 << 30, "items": items}
    first, second, last = render.collected(document).splitlines()
    assert first.split() == ["60.0", "MiB", "in", "30:", "quant.layer,", "no", "output", "needs", "it"]
    assert second.split() == ["1.0", "KiB", "in", "1:", "an", "unfinished", "file"]
    assert last == "would free 60.0 MiB, 1.0 GiB stay"


def test_a_line_tells_a_number_once_and_one_file_is_no_files() -> None:
    stream = io.StringIO()
    shown = Lines(stream)
    shown.start("m: quantizing 16 layers", 16, 16, 1 << 30, "layers")
    shown.start("m → imatrix", 1, 9, 1 << 30, "files")
    assert stream.getvalue().splitlines() == ["m: quantizing 16 layers", "m → imatrix: 1 file"]


def play(shown: Sink) -> None:
    shown.message("info", "before")
    shown.start("tiny → q4_k_m", 291, 12 << 30, 8 << 30)
    for _ in range(1000):
        shown.update(STATUS)
    shown.message("warning", "near the limit")
    shown.finish()


def test_plain_lines_are_few() -> None:
    stream, now = io.StringIO(), iter(range(10000))
    play(Lines(stream, clock=lambda: next(now) * 0.012))
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["before", "tiny → q4_k_m: 291 tensors, 12.0 GiB to read"]
    assert 3 <= len([line for line in lines if "120/291 tensors" in line]) <= 5
    assert lines[-2:][0] == "warning: near the limit"
    assert " 42%  120/291 tensors  145 M weights/s  RAM 5.0 GiB of 8.0 GiB  bound by disk  51 s left" in lines


def test_the_last_line_comes_once_and_has_nothing_left() -> None:
    stream = io.StringIO()
    lines = Lines(stream, clock=iter([0.0, 9.0, 9.0]).__next__)
    lines.start("t", 3, 100, 100, "files")
    lines.update(Status(3, 3, 99, 100, None, 0.04, 10, 100, "CPU", "", "files"))
    lines.finish()
    assert stream.getvalue().splitlines()[1:] == [" 99%  3/3 files  RAM 10 B of 100 B  bound by CPU"]


def test_json_gets_messages_only() -> None:
    stream = io.StringIO()
    play(Messages(stream))
    assert stream.getvalue() == "before\nwarning: near the limit\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_view_shows_everything_and_ends_clean() -> None:
    stream = Terminal()
    play(Live(stream))
    text = stream.getvalue()
    for fact in ("tiny → q4_k_m", "42%", "120/291 tensors", "145 M weights/s", "5.0 GiB of 8.0 GiB", "disk", "51 s"):
        assert fact in text
    assert "warning: near the limit" in text


def test_nothing_is_shown_that_is_not_known_before_a_worker_reports() -> None:
    stream = Terminal()
    live = Live(stream)
    live.start("tiny → q4_k_m", 291, 1000, 8 << 30)
    live.finish()
    assert "RAM budget 8.0 GiB" in stream.getvalue()
    assert "0 B" not in stream.getvalue()
    assert "weights/s" not in stream.getvalue()


def test_memory_near_the_budget_is_pointed_out() -> None:
    stream = io.StringIO()
    lines = Lines(stream, clock=lambda: 0.0)
    lines.start("t", 1, 1, 100)
    lines.update(Status(1, 1, 1, 1, 1e6, 0.0, 95, 100, "memory", ""))
    lines.finish()
    assert "RAM 95 B of 100 B, near the budget" in stream.getvalue()


def test_the_sink_fits_the_stream() -> None:
    assert type(sink(Terminal(), quiet=False)) is Live
    assert type(sink(io.StringIO(), quiet=False)) is Lines
    assert type(sink(Terminal(), quiet=True)) is Messages
