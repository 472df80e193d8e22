"""Looking without building: what a model would weigh, why something runs, the graph as text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from qbuild import schema
from qbuild.actions import damage
from qbuild.arch import convert, mix
from qbuild.budget import format_size
from qbuild.calibrated import CalibratedTarget
from qbuild.errors import ConfigError
from qbuild.ggml import FILE_TYPES, QTYPES
from qbuild.graph import Action
from qbuild.manifest import explain as explain_lines
from qbuild.plan import Judge, Plan, Verdict, manifest_parts
from qbuild.recipe import Resolved, model_name, open_model

LONG = 240

__all__ = ["explain", "explain_text", "graph", "info", "info_text"]


def info(config: schema.Config) -> dict[str, Any]:
    """Parameters, architecture, source size and the size of every file type: exact, by the type rules."""
    checkpoint = open_model(config.model, fetch=False, offline=config.offline)
    facts = convert.model_facts(checkpoint)
    specs = convert.tensor_specs(checkpoint, config.model.outtype)
    weights = sum(spec.weights for spec in specs)
    types: dict[str, Any] = {}
    for name in FILE_TYPES:
        try:
            choices = mix.choose(specs, facts, mix.Mix(name))
        except ConfigError:
            continue  # its blocks do not fit the widths of this model
        needs = mix.needs_imatrix(choices, mix.Mix(name)) is not None
        nbytes = sum(prod(s.shape[:-1]) * QTYPES[t].row_bytes(s.shape[-1]) for s, t in choices)
        types[name] = {"bytes": nbytes, "bits_per_weight": round(8 * nbytes / weights, 3), "needs_imatrix": needs}
    return {
        "name": model_name(config.model, checkpoint),
        "source": checkpoint.source,
        "kind": checkpoint.kind,
        "architecture": facts.arch,
        "parameters": facts.parameters,
        "layers": facts.n_layer,
        "tensors": len(checkpoint.tensors),
        "source_bytes": sum(t.nbytes for t in checkpoint.tensors.values()),
        "dtypes": sorted({t.dtype for t in checkpoint.tensors.values()}),
        "file_types": types,
    }


def info_text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['name']}  ({found['source']})",
        f"  {found['architecture']}, {found['parameters'] / 1e6:,.1f} M parameters, {found['layers']} layers",
        f"  {format_size(found['source_bytes'])} of {', '.join(found['dtypes'])}",
        "",
        f"  {'type':<10} {'tensors':>10}  bits/weight",
    ]
    for name, row in sorted(found["file_types"].items(), key=lambda item: item[1]["bytes"]):
        note = "  needs an importance matrix" if row["needs_imatrix"] else ""
        lines.append(f"  {name:<10} {format_size(row['bytes']):>10}  {row['bits_per_weight']:>6.2f}{note}")
    return "\n".join([*lines, "", "  tensor bytes, exact; vocabulary and header come on top"])


def explain(plan: Plan, words: list[str]) -> list[dict[str, Any]]:
    """The actions that ``words`` name (targets, tensors, or actions), with verdict, reason and manifest."""
    graph = plan.resolved.graph
    wanted = list(graph.targets.values()) if not words else [i for w in words for i in _matches(plan, w)]
    judge = Judge(plan.resolved, plan.store)
    judge.verdicts = dict(plan.verdicts)
    return [_explained(judge, plan, graph.actions[action_id]) for action_id in dict.fromkeys(wanted)]


def _matches(plan: Plan, word: str) -> list[str]:
    actions = plan.resolved.graph.actions
    if word in plan.resolved.graph.targets:
        return [plan.resolved.graph.targets[word]]
    found = [i for i in actions if i == word or i.rpartition(":")[0] == word]
    if not found:
        names = [*plan.resolved.graph.targets, *actions]
        near = difflib.get_close_matches(word, names, 3, 0.5)
        remedy = f"nearest: {', '.join(near)}" if near else "qbuild graph lists what there is"
        raise ConfigError("explain", f"no target, tensor or action is called {word!r}", remedy)
    return found


def _explained(judge: Judge, plan: Plan, action: Action) -> dict[str, Any]:
    verdict = plan.verdicts[action.id]
    digests, missing = judge.inputs(action)
    unknown = ((f"input {role}", f"not known yet: {why}") for role, why in missing.items())
    lines = explain_lines([*manifest_parts(action, digests), *unknown])
    outputs = [str(d) for d in verdict.outputs]
    return {"action": action.id, "verdict": verdict.state, "why": verdict.why, "key": verdict.key,
            "outputs": outputs, "manifest": lines}  # fmt: skip


def explain_text(found: list[dict[str, Any]]) -> str:
    blocks = []
    for item in found:
        head = f"{item['action']}: {item['verdict']}, {item['why']}"
        key = [f"  key {item['key']}"] if item["key"] else []
        blocks.append("\n".join([head, *key, *(f"    {_short(line)}" for line in item["manifest"])]))
    return "\n\n".join(blocks)


def graph(plan: Plan, style: str) -> str:
    """The graph as a text tree, DOT or Mermaid. Tensors of one type below one file are one node."""
    nodes, edges = _condensed(plan)
    if style == "dot":
        body = [f'  "{i}" [label="{label}"];' for i, label in nodes.items()] + [f'  "{a}" -> "{b}";' for a, b in edges]
        return "\n".join(["digraph qbuild {", "  rankdir=LR;", *body, "}"])
    if style == "mermaid":
        names = {node: f"n{number}" for number, node in enumerate(nodes)}
        body = [f'  {names[i]}["{label}"]' for i, label in nodes.items()]
        return "\n".join(["graph LR", *body, *(f"  {names[a]} --> {names[b]}" for a, b in edges)])
    lines = []
    for target in plan.targets:
        root = plan.resolved.graph.targets[target.name]
        lines.append(nodes[root])
        below = [a for a, b in edges if b == root]
        for number, node in enumerate(below):
            lines.append(("└─ " if number == len(below) - 1 else "├─ ") + nodes[node])
    return "\n".join(lines)


def _condensed(plan: Plan) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Nodes (id → label) and edges, from the source to the files."""
    resolved, verdicts = plan.resolved, plan.verdicts
    nodes = {"source": f"{resolved.checkpoint.source} ({len(resolved.checkpoint.tensors)} tensors)"}
    edges: list[tuple[str, str]] = []
    if "metadata" in resolved.graph.actions:
        nodes["metadata"] = f"metadata: {verdicts['metadata'].state}"
        edges.append(("source", "metadata"))
    for target in resolved.targets:
        nodes[target.action] = f"{target.file_name}: {verdicts[target.action].state}"
        if isinstance(target, CalibratedTarget) and target.limit is not None:
            edges += _chosen(target.action, resolved, verdicts, nodes)
            continue
        if isinstance(target, CalibratedTarget):
            edges += _calibrated(target, resolved, verdicts, nodes)
            continue
        root = target.action
        groups: dict[str, list[str]] = {}
        for (_, type_), action in zip(target.choices, target.tensors, strict=True):
            groups.setdefault(type_, []).append(action)
        for type_, actions in groups.items():
            node = f"{root}/{type_}"
            nodes[node] = f"{len(actions)} tensors to {type_}: {_states(actions, verdicts)}"
            edges += [("source", node), (node, root)]
            if target.awaits and resolved.awaited:
                edges.append((resolved.awaited, node))
        if "metadata" in nodes:
            edges.append(("metadata", root))
        if target.fitted:
            nodes[target.fitted] = f"types chosen: {verdicts[target.fitted].state}"
            edges += [*_chosen(target.fitted, resolved, verdicts, nodes), (target.fitted, root)]
    return nodes, list(dict.fromkeys(edges))


def _chosen(
    action: str, resolved: Resolved, verdicts: Mapping[str, Verdict], nodes: dict[str, str]
) -> list[tuple[str, str]]:
    """Below a choice of types: damages, what they are measured with, the tokens."""
    damages = [below for below in resolved.graph.reads(action) if resolved.graph.actions[below].kind == damage.KIND]
    nodes["tokens"] = f"calibration tokens: {verdicts['tokens'].state}"
    nodes["sensitivity"] = f"sensitivity of the weights: {verdicts['sensitivity'].state}"
    nodes[f"damages {action}"] = f"{len(damages)} damages: {_states(damages, verdicts)}"
    below = [("source", "sensitivity"), ("tokens", "sensitivity"), ("source", f"damages {action}")]
    return [*below, ("sensitivity", f"damages {action}"), (f"damages {action}", action)]


def _calibrated(
    target: CalibratedTarget, resolved: Resolved, verdicts: Mapping[str, Verdict], nodes: dict[str, str]
) -> list[tuple[str, str]]:
    """Below a calibrated target: its solved layers, the statistics they rest on, the tokens. Another library reads the
    source and the tokens."""
    if resolved.calibration is None:
        return []
    nodes["tokens"] = f"calibration tokens: {verdicts['tokens'].state}"
    if target.environment is not None:
        return [("source", target.action), ("tokens", target.action)]
    layers = [output.action for output in resolved.calibration.statistics]
    nodes["statistics"] = f"statistics of {len(layers)} layers: {_states(layers, verdicts)}"
    edges = [("source", "statistics"), ("tokens", "statistics")]
    if set(target.tensors) == set(layers):
        return [*edges, ("statistics", target.action)]
    node = target.tensors[0].partition(":")[0] + target.tensors[0].partition("+")[1:][-1]
    nodes[node] = f"{len(target.tensors)} layers quantized: {_states(target.tensors, verdicts)}"
    return [*edges, ("statistics", node), ("source", node), (node, target.action)]


def _states(actions: Iterable[str], verdicts: Mapping[str, Verdict]) -> str:
    return ", ".join(sorted({verdicts[action].state for action in actions}))


def _short(line: str) -> str:
    """Lines that list hundreds of tensors are cut for reading; ``format=json`` has them whole."""
    return line if len(line) <= LONG else f"{line[:LONG]}… ({len(line)} characters)"
