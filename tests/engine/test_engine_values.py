"""Manifest, graph and budget: the values every promise rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qbuild import kernels
from qbuild.actions import warm
from qbuild.budget import Remedy, format_size, parse_size, refuse
from qbuild.digest import Digest, Hasher, digest_bytes
from qbuild.errors import ConfigError
from qbuild.graph import Action, Graph, Output, Source
from qbuild.kernels import columns
from qbuild.manifest import action_key, explain, walk


@dataclass(frozen=True)
class Params:
    bits: int | float | str | None = 4
    names: tuple[str, ...] = ()
    pure: bool = False


A, B = digest_bytes(b"a"), digest_bytes(b"b")


def key(params: Params = Params(), inputs: tuple = (("x", A),), salt: int = 1, kind: str = "k", versions=()) -> str:
    return action_key(walk(kind, salt, params, inputs, versions))


def test_equal_manifests_have_equal_keys() -> None:
    assert key() == key(Params())


@pytest.mark.parametrize(
    "other",
    [
        key(Params(bits=4.0)),
        key(Params(bits="4")),
        key(Params(bits=None)),
        key(Params(bits=True)),
        key(Params(names=("",))),
        key(Params(pure=True)),
        key(inputs=(("x", B),)),
        key(inputs=(("y", A),)),
        key(inputs=(("x", Digest(A.hash, A.size + 1)),)),
        key(salt=2),
        key(kind="l"),
        key(versions=(("transformers", "5"),)),
    ],
)
def test_anything_that_can_change_bytes_changes_the_key(other: str) -> None:
    assert other != key()


def test_a_value_cannot_pose_as_two_parts() -> None:
    assert action_key([("a", "1"), ("b", "2")]) != action_key([("a", "1b2")])
    assert action_key([("ab", "c")]) != action_key([("a", "bc")])


def test_an_object_with_no_canonical_text_is_a_bug() -> None:
    with pytest.raises(TypeError, match="BUG"):
        key(Params(bits={}))  # type: ignore[arg-type]


def test_the_explanation_holds_every_part_of_the_key() -> None:
    parts = list(walk("k", 1, Params(), [("blk.0.attn_q.weight", A)]))
    assert explain(parts) == [
        "manifest                   1",
        "kind                       k",
        "salt                       1",
        "param bits                 int 4",
        "param names                []",
        "param pure                 bool false",
        f"input blk.0.attn_q.weight  {A}",
    ]


def test_digest_is_the_same_however_the_bytes_arrive() -> None:
    hasher = Hasher()
    for part in (b"ab", bytearray(b"c"), memoryview(b"def")):
        hasher.update(part)
    assert hasher.digest() == digest_bytes(b"abcdef")
    assert Digest.parse(str(A)) == A


def test_targets_share_an_equal_action_and_a_clash_is_a_bug() -> None:
    graph = Graph()
    action = Action("t:Q4_K", "k", Params(), (("source", Source("t", "f", 0, 4)),))
    assert graph.add(action) == graph.add(replace(action)) == Output("t:Q4_K")
    with pytest.raises(ValueError, match="BUG"):
        graph.add(replace(action, params=Params(bits=5)))


def test_an_action_cannot_read_what_is_not_there_yet() -> None:
    with pytest.raises(ValueError, match="BUG"):
        Graph().add(Action("file", "k", Params(), (("t", Output("t:Q4_K")),)))


def test_needed_is_in_dependency_order_and_leaves_out_the_rest() -> None:
    graph = Graph()
    for name in ("a", "b", "c"):
        graph.add(Action(name, "k", Params(), ()))
    graph.add(Action("ab", "k", Params(), (("0", Output("a")), ("1", Output("b")))))
    assert graph.needed(["ab"]) == ["a", "b", "ab"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("16GiB", 16 << 30), ("500MB", 500_000_000), ("1.5KiB", 1536), ("42", 42), (7, 7), ("3 GB", 3 * 10**9)],
)
def test_sizes_are_read_with_their_unit(text: str | int, nbytes: int) -> None:
    assert parse_size(text, "budget.ram") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "16G", "-1", "16 gigs", "1e9", "nan"])
def test_a_size_that_could_mean_two_things_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text, "budget.ram")


def test_sizes_are_shown_in_binary_units() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 31.2 * 2**30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "31.2 GiB",
        "3.0 TiB",
    ]


def test_a_refusal_names_place_fact_and_overrides_to_paste() -> None:
    error = refuse("pass 'q4'", "RAM", 3 << 30, 1 << 30, [Remedy("fewer threads", 1 << 29, "budget.threads=1")])
    assert error.exit_code == 3
    assert str(error) == (
        "refused: pass 'q4' needs 3.0 GiB of RAM, the budget is 1.0 GiB\n"
        "  fewer threads:  512.0 MiB  → budget.threads=1"
    )


def test_a_compilation_that_is_interrupted_keeps_the_kernels_that_were_done(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(types: list[str], _dtype: str) -> None:
        if types == ["Q6_K"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "warm", stopped)
    task = warm.Task(("F32", "Q4_K", "Q6_K", "Q8_0"), measured=("Q4_K",))
    with pytest.raises(KeyboardInterrupt):
        warm.run(task)
    assert warm.left(task) == warm.Task(("Q6_K", "Q8_0"), measured=("Q4_K",))
    assert warm.left(warm.Task(("Q4_K",))).names == ()


@pytest.mark.parametrize(
    ("task", "used", "name"),
    [
        (warm.Task(("F16",)), lambda: kernels.warm(["F16"]), "cast._cast-"),
        (warm.Task(columns=True), columns.warm, "columns.improve-"),
    ],
    ids=["a cast", "the loops of GPTQ"],
)
def test_a_kernel_whose_cache_was_cleared_is_compiled_again(
    task: warm.Task, used: Callable[[], None], name: str, project: Path
) -> None:
    assert warm.left(task) == task
    warm.run(task)
    assert warm.left(task) == warm.Task()
    used()
    index, *compiled = (path for path in kernels.called_files() if path.name.startswith(name))
    for path in (index, *compiled):
        aside = path.rename(path.with_suffix(".aside"))
        try:
            assert warm.left(task) == task
        finally:
            aside.rename(path)
    assert warm.left(task) == warm.Task()


def test_a_kernel_whose_cache_was_cleared_takes_no_other_type_with_it(project: Path) -> None:
    """Of the types that one process compiled, in their order."""
    task = warm.Task(("Q4_0", "TQ2_0"))
    warm.run(task)
    kernels.warm(["Q4_0"])
    (index,) = (
        path for path in kernels.called_files() if path.name.startswith("legacy._fit-") and path.suffix == ".nbi"
    )
    aside = index.rename(index.with_suffix(".aside"))
    try:
        assert warm.left(task) == warm.Task(("Q4_0",))
    finally:
        aside.rename(index)


def test_a_gpu_kernel_counts_as_compiled_while_triton_has_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, version = project / "triton", warm.version
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(warm, "version", lambda name: "3" if name == "triton" else version(name))
    monkeypatch.setattr(warm, "import_module", lambda _name: None)
    made = {"Q4_0": ["round", "pack"], "Q4_1": ["fit", "pack"], "Q5_0": ["round"]}

    def compiled(_encode: None, kernel: warm.OnGpu) -> None:
        for name in made[kernel.type]:
            (cache / name).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(warm, "_compare", compiled)
    one, two, three = (warm.OnGpu(name, "F16", weighted=False) for name in made)
    task = warm.Task(on_gpu=(one, two, three))
    warm.run(task)
    assert warm.left(task) == warm.Task()
    (cache / "fit").rmdir()
    assert warm.left(task) == warm.Task(on_gpu=(two,))
    cache.rename(project / "cleared")
    assert warm.left(task) == task
