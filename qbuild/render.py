"""Documents (the values that ``format=json`` prints) as text for people: at most 80 columns wherever the facts allow.

Only what is in a document is shown, so the two outputs cannot tell different stories.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qbuild.budget import format_size
from qbuild.errors import WIDTH, told
from qbuild.progress import duration
from qbuild.report.facts import source_perplexity

__all__ = ["collected", "error", "plan", "result", "status", "sweep", "table", "verified"]

Document = Mapping[str, Any]


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns two blanks apart, the first ``left`` of them aligned to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def plan(document: Document) -> str:
    """What a build would do: sizes and types of each target, verdicts, what it needs of the budget."""
    model, targets, needs, budget = (document[k] for k in ("model", "targets", "predicted", "budget"))
    lines = [f"plan for {model['name']} from {model['source']}", ""]
    rows = [["target", "size", "bits", "tensors", "hit", "run", "unknown"]]
    for name, target in targets.items():
        counts = target["verdicts"]
        mark = "" if target["exact"] else "≤" if target["at_most"] else "~"
        size = mark + format_size(target["bytes"])
        tally = [str(counts.get(state, 0)) for state in ("hit", "run", "unknown")]
        rows.append([name, size, f"{target['bits_per_weight']:.2f}", str(sum(counts.values())), *tally])
    head, *body = table(rows)
    lines.append(head)
    for line, target in zip(body, targets.values(), strict=True):
        lines += [line, *_types(target["types"]), f"  {_short(target['path'])}: {_outlook(target['verdict'])}"]
    lines.append("")
    if not document["steps"]:
        return _text([*lines, "nothing to do", *_notices(document)])
    lines += _steps(document["steps"])
    rows = [["", "needs", "budget"], ["RAM", format_size(needs["ram"]), format_size(budget["ram"])]]
    if needs["vram"]:
        rows.append(["VRAM", format_size(needs["vram"]), format_size(budget["vram"])])
    rows.append(["disk", format_size(needs["disk"]), format_size(budget["disk"])])
    rows.append(["threads", str(document["strategy"]["threads"]), str(budget["threads"])])
    time = f", about {duration(needs['seconds'])}" if needs["seconds"] is not None else ""
    lines += [*table(rows), "", f"reads {format_size(needs['read_bytes'])}{time}"]
    if document["to_compile"]:
        kernels = ", ".join(document["to_compile"])
        lines += textwrap.wrap(f"and some 10 s a kernel that this machine has not compiled yet: {kernels}", WIDTH)
    return _text([*lines, *_notices(document)])


def _notices(document: Document) -> list[str]:
    found = [f"notice: {told(one['place'], one['fact'], one['remedy'])}" for one in document["notices"]]
    return ["", *found] if found else []


def _steps(steps: Sequence[Document]) -> list[str]:
    """What will run one after the other, where that is more than a plain pass: the peak of each, the bytes that stay of
    it, those that are gone when it ends, and what is to be known of it."""
    if len(steps) < 2 and not any(step["notes"] for step in steps):
        return []
    rows = [["step", "RAM", "disk", "for a while", "time"]]
    for step in steps:
        sizes = [format_size(step[key]) if step[key] else "-" for key in ("ram", "disk", "temporary")]
        rows.append([step["label"], *sizes, duration(step["seconds"])])
    head, *body = table(rows)
    lines = [head]
    for row, step in zip(body, steps, strict=True):
        lines.append(row)
        for note in step["notes"]:
            lines += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return [*lines, ""]


def _outlook(verdict: Mapping[str, str]) -> str:
    """What will become of a file. The reason for a run is mostly that its tensors run: `qbuild explain` has it."""
    return {"hit": "stored", "run": "to be made", "unknown": f"not known yet: {verdict['why']}"}[verdict["state"]]


def _types(types: Mapping[str, Sequence[int]]) -> list[str]:
    """Bytes per tensor type, largest first."""
    ordered = sorted(types.items(), key=lambda item: -item[1][1])
    facts = [f"{name}~{format_size(nbytes)}~in~{tensors}".replace(" ", "~") for name, (tensors, nbytes) in ordered]
    lines = textwrap.wrap(", ".join(facts), WIDTH, initial_indent="  ", subsequent_indent="  ")
    return [line.replace("~", " ") for line in lines]  # a line ends between facts, never inside one


def result(document: Document) -> str:
    """What a build did."""
    targets, totals = document["targets"], document["totals"]
    rows = [["target", "size", "bits", "computed", "reused", "seconds", "RAM peak", "predicted"]]
    for name, target in targets.items():
        rows.append([name, format_size(target["bytes"]), f"{target['bits_per_weight']:.2f}", *_needed(target)])
    evaluation = document["evaluation"] or {}
    if evaluation.get("verdicts", {}).get("run"):  # an older qbuild noted none
        rows.append(["evaluation", "-", "-", *_needed(evaluation)])
    paths = [_short(target["path"]) for target in targets.values()]
    lines = [*table(rows), "", *_measured(document), *paths, *_failures(document), ""]
    ran = totals["computed"] or any(totals.get("actions", {}).values())
    if not ran and not any(t["verdicts"].get("run") for t in targets.values()):
        return _text([*lines, "nothing to do", *_notices(document)])
    took = f"done in {duration(totals['wall_seconds'])}"
    if not totals["read_bytes"] and not totals["written_bytes"]:  # what an evaluation reads is not counted
        return _text([*lines, took])
    moved = f"read {format_size(totals['read_bytes'])}, wrote {format_size(totals['written_bytes'])}"
    return _text([*lines, f"{took}: {moved}"])


def _needed(made: Document) -> list[str]:
    """How much of something was computed and reused, and the seconds and memory that it took where it ran."""
    counts = made["verdicts"]
    tally = [str(counts.get("run", 0)), str(counts.get("hit", 0))]
    if not counts.get("run"):
        return [*tally, "-", "-", "-"]
    return [*tally, f"{made['seconds']:.1f}", format_size(made["peak_ram"]), format_size(made["predicted_ram"])]


def _failures(document: Document) -> list[str]:
    """The targets that failed in a build that kept going, and why."""
    said = (f"{name} failed: {found['place']}: {found['fact']}" for name, found in document.get("failed", {}).items())
    return [
        line for text in said for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False)
    ]


def _measured(document: Document) -> list[str]:
    """How far each target is from its source, where that was asked for."""
    found = (document.get("evaluation") or {}).get("targets", {})
    if not found:
        return []
    rows = [["target", "perplexity", "KL to source", "same first choice"]]
    rows += [[n, f"{r['perplexity']:.3f}", f"{r['kl']:.4f}", f"{r['top1']:.1%}"] for n, r in found.items()]
    own = source_perplexity(found)
    rows += [["the source", f"{own:.3f}", "-", "-"]] if own is not None else []
    return [*table(rows), ""]


def sweep(document: Document) -> str:
    """How many jobs of a sweep came through, which did not and why, and what all of it needs or took."""
    total = document["total"]
    done = sum(job["exit_code"] == 0 for job in document["jobs"])
    lines = [
        f"{done} of {total['jobs']} jobs done" if "ram" not in total else f"{done} of {total['jobs']} jobs can run"
    ]
    for job in (job for job in document["jobs"] if job["exit_code"]):
        found = job.get("error") or {"place": "", "fact": "see above"}
        why = f"{found['place']}: {found['fact']}" if found["place"] else found["fact"]
        said = f"[{job['number']}/{total['jobs']}] {' '.join(job['overrides'])}: {why} (exit code {job['exit_code']})"
        lines += textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    if "ram" in total:
        needs = f"RAM {format_size(total['ram'])} at most, disk {format_size(total['disk'])}"
        lines.append(
            f"all of it: {needs}, reads {format_size(total['read_bytes'])}, about {duration(total['seconds'])}"
        )
    elif "written_bytes" in total:
        moved = f"read {format_size(total['read_bytes'])}, wrote {format_size(total['written_bytes'])}"
        took = f" in {duration(total['wall_seconds'])}" if "wall_seconds" in total else ""
        lines.append(f"all of it{took}: {moved}")
    return _text(lines)


def error(document: Document) -> str:
    """Place, fact and remedy of an error document."""
    return f"qbuild: {told(document['place'], document['fact'], document['remedy'])}\n"


def status(document: Document) -> str:
    """Outputs and how they stand, then the store."""
    store, outputs = document["store"], document["outputs"]
    together: dict[tuple[str, str], list[Document]] = {}
    for output in outputs:  # the files of a directory are one output; one that is a file ends in .gguf
        path = Path(output["path"])
        name = _short(str(path)) if path.suffix == ".gguf" else f"{_short(str(path.parent))}/"
        together.setdefault((name, output["target"]), []).append(output)
    rows = [["output", "target", "state", "files", "size"]]
    for (name, target), files in together.items():
        size = format_size(sum(file["bytes"] for file in files))
        rows.append([name, target, _states([file["state"] for file in files]), str(len(files)), size])
    lines = table(rows, left=3) if outputs else ["no outputs yet"]
    kept = f"{store['blobs']} files, {format_size(store['blob_bytes'])}"
    unfinished = f", {store['partials']} unfinished, {format_size(store['partial_bytes'])}" if store["partials"] else ""
    return _text([*lines, "", f"store {_short(store['dir'])}: {kept}{unfinished}"])


def _states(states: Sequence[str]) -> str:
    """How several files stand: the one state of all, else how many are in each."""
    counts = Counter(states)
    return states[0] if len(counts) == 1 else ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def verified(document: Document) -> str:
    problems = document["problems"]
    if not problems:
        return f"{document['store']}: everything is as it was written\n"
    lines = [f"{p['place']}: {p['where']} is {p['kind']}: {p['fact']}" for p in problems]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return _text([*lines, "", f"{count}; what is damaged is dropped, and the next build makes it again"])


def collected(document: Document) -> str:
    """What gc freed, or would free: a line for each reason, since a model has a file for every layer or tensor."""
    together: dict[str, list[int]] = {}
    for item in document["items"]:
        together.setdefault(item["why"], []).append(item["frees"])
    lines = [f"{format_size(sum(sizes)):>10}  in {len(sizes)}: {why}" for why, sizes in together.items()]
    verb = "would free" if document["dry_run"] else "freed"
    return _text([*lines, f"{verb} {format_size(document['freed'])}, {format_size(document['kept'])} stay"])


def _short(path: str) -> str:
    """Relative to the working folder where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else str(Path(path))


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
