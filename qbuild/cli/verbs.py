"""The commands: one function each, in a literal table. Each turns a request into an answer; none prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbuild import execute, inspection, plan, render, schema, upkeep
from qbuild.budget import parse_size
from qbuild.errors import InputError
from qbuild.progress import Sink
from qbuild.report import facts, pages
from qbuild.store import Store

__all__ = ["VERBS", "Answer", "Request", "Verb"]


@dataclass(frozen=True)
class Request:
    """``words`` stood beside the verb; ``dry_run`` is -n; ``began``: the command, in nanoseconds since the epoch."""

    config: schema.Config
    words: tuple[str, ...]
    dry_run: bool
    sink: Sink
    began: int


@dataclass(frozen=True)
class Answer:
    """``document`` is what ``format=json`` prints, ``text`` what people read."""

    document: Mapping[str, Any]
    text: str
    code: int = 0


@dataclass(frozen=True)
class Verb:
    run: Callable[[Request], Answer]
    about: str
    words: int = 0  # how many it takes beside overrides
    merges: bool = False  # the jobs of a sweep are one request where they differ only in their targets


def build(request: Request) -> Answer:
    if request.dry_run:
        return planned(request)
    document = execute.build(request.config, request.sink, request.began)
    return Answer(document, render.result(document))


def planned(request: Request) -> Answer:
    document = plan.make(request.config, fetch=False, began=request.began).to_json()
    return Answer(document, render.plan(document))


def info(request: Request) -> Answer:
    config = request.config
    if request.words:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, source=request.words[0]))
    document = inspection.info(config)
    return Answer(document, inspection.info_text(document) + "\n")


def explain(request: Request) -> Answer:
    found = inspection.explain(plan.make(request.config, fetch=False), list(request.words))
    return Answer({"actions": found}, inspection.explain_text(found) + "\n")


def graph(request: Request) -> Answer:
    style = request.config.graph.format
    text = inspection.graph(plan.make(request.config, fetch=False), style)
    return Answer({"format": style, "graph": text}, text + "\n")


def status(request: Request) -> Answer:
    store = _store(request)
    outputs = [
        {
            "path": str(row.path),
            "target": row.target,
            "digest": str(row.digest),
            "bytes": row.digest.size,
            "state": _state(store, row.path, row),
        }
        for row in store.outputs()
    ]
    document = {"store": {"dir": str(store.root)} | dataclasses.asdict(upkeep.stats(store)), "outputs": outputs}
    return Answer(document, render.status(document))


def _state(store: Store, path: Path, row: Any) -> str:
    if not path.exists():
        return "missing"
    return "current" if store.output_current(path, row.digest) else "changed"


def verify(request: Request) -> Answer:
    store = _store(request)
    problems = [
        {"place": str(p.path), "kind": p.kind, "where": p.where, "digest": str(p.digest), "fact": p.fact}
        for p in upkeep.verify(store)
    ]
    document = {"store": str(store.root), "problems": problems}
    return Answer(document, render.verified(document), code=1 if problems else 0)


def gc(request: Request) -> Answer:
    limit = request.config.store.limit
    report = upkeep.gc(
        _store(request), limit=None if limit is None else parse_size(limit, "store.limit"), dry_run=request.dry_run
    )
    items = [{"path": str(i.path), "bytes": i.size, "frees": i.frees, "why": i.why} for i in report.items]
    document = {"dry_run": report.dry_run, "freed": report.freed, "kept": report.kept, "items": items}
    return Answer(document, render.collected(document))


def report(request: Request) -> Answer:
    """Reports of the builds below ``out`` (or ./outputs), each written beside the build.json that it tells of."""
    out = request.config.out
    folders = [Path(out)] if out else sorted(p.parent for p in Path("outputs").glob("*/build.json"))
    builds, texts = {}, []
    for folder in folders:
        document = facts.report(_built(folder / "build.json"))
        builds[str(folder)] = document
        made = {"report.html": pages.html(document), "report.md": pages.markdown(document)}
        made["report.json"] = json.dumps(document, indent=2) + "\n"
        for name, text in made.items():
            execute.write_text(folder / name, text)
        texts.append("\n".join([str(folder), render.result(document), *(f"{folder / name}" for name in made), ""]))
    text = "\n".join(texts) or "no build.json below ./outputs; name a build's folder: out=DIRECTORY\n"
    return Answer({"builds": builds}, text)


def _built(path: Path) -> Any:
    """What a build.json holds."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        remedy = "name a build's folder: out=DIRECTORY"
        raise InputError(str(path), f"cannot be read: {error.strerror}", remedy) from None
    except ValueError:
        raise InputError(str(path), "is not JSON", "build again to write it anew") from None
    if not isinstance(document, dict) or facts.REQUIRED - document.keys():
        raise InputError(str(path), "is not what a build writes", "build again to write it anew")
    return document


def _store(request: Request) -> Store:
    return Store(plan.store_dir(request.config))


VERBS: dict[str, Verb] = {
    "build": Verb(build, "make what is missing (the default)", merges=True),
    "plan": Verb(planned, "say what a build would do, what it needs and whether it fits", merges=True),
    "info": Verb(info, "what a model is and what every file type of it would weigh", words=1),
    "explain": Verb(explain, "why a target or tensor is stored or will be made", words=1),
    "status": Verb(status, "the outputs that were made and the store"),
    "verify": Verb(verify, "hash the store and the outputs again; damage is dropped and rebuilt"),
    "graph": Verb(graph, "the graph as a tree, or graph.format=dot|mermaid"),
    "gc": Verb(gc, "free what no output needs; -n only says what"),
    "report": Verb(report, "a page, a model card and JSON of the last build in each folder, beside its build.json"),
}
