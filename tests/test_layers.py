"""The promises about code: modules import one way, the environment is read in one place, importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "qbuild"

# A module imports from lines above its own, or from its own line. A name with a trailing dot is a package.
LAYERS = [
    "errors digest ggml",
    "gguffile graph manifest budget",
    "inputs fsutil heap overlap links index records store upkeep cache machine vram checkpoint imatrix source",
    "kernels. arch. quant. calibration. evaluation. fit backends.",
    "actions.",
    "schema device candidates calibrated recipe lower steps plan inspection",
    "jobs.",
    "progress render report. worker running staged measured execute",
    "fastpath cli.",
    "api __main__",
]
RANK = {name: number for number, line in enumerate(LAYERS) for name in line.replace(".", "").split()}
HEAVY = ("numpy", "numba", "torch", "transformers", "hydra", "omegaconf", "rich", "gguf", "huggingface_hub", "psutil")
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def own_imports(tree: ast.AST) -> Iterator[str]:
    """Our modules that a file imports anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("qbuild.") for a in node.names if a.name.startswith("qbuild."))
        elif isinstance(node, ast.ImportFrom) and node.module == "qbuild":
            yield from (a.name for a in node.names if not a.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qbuild."):
            yield str(node.module).removeprefix("qbuild.")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_modules_import_one_way(path: Path) -> None:
    name = module_of(path)
    if path == ROOT / "__init__.py":  # for type checkers only: tests/cli/test_cli_api.py holds that it loads nothing
        assert set(own_imports(ast.parse(path.read_text()))) == {"api"}
        return
    own = name.partition(".")[0]
    assert own in RANK, f"{name} has no place in LAYERS"
    for imported in own_imports(ast.parse(path.read_text())):
        other = imported.partition(".")[0]
        assert other in RANK, f"{name} imports {imported}, which has no place in LAYERS"
        assert RANK[other] <= RANK[own], f"{name} imports {imported}, a layer above it"


def test_no_module_is_in_an_import_cycle() -> None:
    """Within a layer too: the graph of modules has an order."""
    names = {module_of(path) for path in FILES}
    edges = {module_of(p): {i for i in own_imports(ast.parse(p.read_text())) if i in names} for p in FILES}
    packages = {name: {n for n in edges[name] if not n.startswith(f"{name}.")} for name in edges}
    done: set[str] = set()
    while free := [name for name in packages if name not in done and packages[name] - {name} <= done]:
        done.update(free)
    assert sorted(set(packages) - done) == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_own_modules_are_imported_at_the_top_of_a_file(path: Path) -> None:
    if path.name == "__main__.py":  # the null build's reason: see there
        return
    for function in functions(ast.parse(path.read_text())):
        assert not list(own_imports(function)), f"{module_of(path)}.{function.name} imports one of our modules"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_environment_is_read_in_machine_only(path: Path) -> None:
    reads = [
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
        and isinstance(node.value, ast.Name) and node.value.id == "os"
    ]  # fmt: skip
    assert not reads or module_of(path) == "machine"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_fit_a_screen(path: Path) -> None:
    for function in functions(ast.parse(path.read_text())):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= 80, f"{module_of(path)}.{function.name} has {lines} lines"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("statement", ["import qbuild", "import qbuild.__main__", "import qbuild.fastpath"])
def test_a_null_build_loads_nothing_heavy(statement: str) -> None:
    assert loaded_after(statement).isdisjoint([*HEAVY, "dataclasses", "subprocess"])


def test_the_command_line_loads_no_compiler_and_no_framework() -> None:
    assert loaded_after("import qbuild.cli").isdisjoint({"numba", "torch", "transformers", "hydra", "rich", "gguf"})


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_all_names_what_is_there(path: Path) -> None:
    tree = ast.parse(path.read_text())
    declared = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    if not declared:
        return
    names = ast.literal_eval(declared[0])
    body = [*tree.body, *(node for n in tree.body if isinstance(n, ast.If) for node in n.body)]  # if TYPE_CHECKING
    defined = {getattr(n, "name", None) for n in body}
    for node in body:
        if isinstance(node, ast.Assign):
            defined |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            defined.add(ast.unparse(node.target))
        elif isinstance(node, ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert set(names) <= defined
    assert len(set(names)) == len(names)
