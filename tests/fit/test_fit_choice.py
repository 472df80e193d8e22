"""The choice of types under a size: the optimum itself, held against trying everything."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbuild.errors import BudgetRefused
from qbuild.fit import Choice, Tensor, check, choose, damage, fitted, least, size
from qbuild.gguffile import header_size

NAMES = ("IQ4_XS", "Q3_K", "Q4_K", "Q6_K")
BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}

DAMAGES = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1e6), st.floats(0, 1e-9))
OPTIONS = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(0, 60), DAMAGES), min_size=1)
PROBLEMS = st.lists(OPTIONS, min_size=1, max_size=5).map(
    lambda found: [Choice(f"t{n}", o) for n, o in enumerate(found)]
)


def every_way(choices: list[Choice]) -> list[dict[str, str]]:
    names = [choice.name for choice in choices]
    return [dict(zip(names, types, strict=True)) for types in itertools.product(*(choice.types for choice in choices))]


@settings(deadline=None, max_examples=150)
@given(PROBLEMS, st.integers(0, 300))
def test_no_other_choice_of_that_size_does_less_damage(choices: list[Choice], limit: int) -> None:
    ways = [way for way in every_way(choices) if size(choices, way) <= limit]
    if not ways:
        with pytest.raises(BudgetRefused):
            choose(choices, limit)
        return
    found = choose(choices, limit)
    assert size(choices, found) <= limit
    best = min(damage(choices, way) for way in ways)
    worst = max(d for choice in choices for _, d in choice.types.values())
    assert damage(choices, found) <= best + 1e-11 * worst * len(choices)


def model(tensors: int, seed: int = 0) -> list[Choice]:
    """Tensors of the shapes of a model; damage falls fourfold with every bit, from levels that differ widely."""
    draw = random.Random(seed)
    made = []
    for number in range(tensors):
        rows, cols = draw.choice([(576, 576), (192, 576), (576, 1536), (4096, 4096), (4096, 11008)])
        level = rows * cols * 10 ** draw.gauss(0, 1)
        hurt = {t: level * 4**-bits * math.exp(draw.gauss(0, 0.2)) for t, bits in BITS.items()}
        kept = {t: d for t, d in hurt.items() if cols % 256 == 0 or t == "Q8_0"} | {
            "Q5_0": level / 1e3,
            "Q4_0": level / 3e2,
        }
        made.append(Tensor(f"blk.{number}", (rows, cols), kept).choice)
    return made


def by_dual_bound(choices: list[Choice], limit: int) -> float:
    """The best Lagrangian lower bound of the damage (a price for a byte): no choice of that size can do less."""
    best = 0.0
    for power in range(-600, 200):
        price = 10 ** (power / 40)
        cheapest = math.fsum(min(d + price * n for n, d in choice.types.values()) for choice in choices)
        best = max(best, cheapest - price * limit)
    return best


@pytest.mark.parametrize("bits", [3.5, 4.83])
def test_a_whole_model_is_within_a_hair_of_what_duality_allows(bits: float) -> None:
    choices = model(200)
    q8 = sum(choice.types["Q8_0"][0] for choice in choices)
    limit = int(q8 * bits / 8.5)
    found = choose(choices, limit)
    assert size(choices, found) <= limit
    assert by_dual_bound(choices, limit) <= damage(choices, found) <= 1.01 * by_dual_bound(choices, limit)


def test_order_decides_nothing() -> None:
    choices = model(40)
    choices += [Choice(f"twin.{n}", choices[0].types) for n in range(6)]
    limit = sum(min(n for n, _ in c.types.values()) for c in choices) * 5 // 4
    shuffled = [Choice(c.name, dict(sorted(c.types.items(), reverse=True))) for c in reversed(choices)]
    assert choose(choices, limit) == choose(shuffled, limit)


def test_of_equal_tensors_the_first_by_name_gets_the_larger_type() -> None:
    types = {"Q4_K": (10, 5.0), "Q6_K": (20, 1.0)}
    found = choose([Choice(name, types) for name in ("c", "a", "b")], 40)
    assert found == {"a": "Q6_K", "b": "Q4_K", "c": "Q4_K"}


def test_of_equal_types_the_smallest_is_taken() -> None:
    assert choose([Choice("a", {"Q6_K": (9, 0.5), "IQ4_XS": (8, 0.5), "Q4_K": (8, 0.5)})], 10) == {"a": "IQ4_XS"}


def test_a_size_that_cannot_be_had_is_refused_with_the_least_one() -> None:
    choices = [Choice("a", {"Q4_K": (576, 1.0), "Q8_0": (1088, 0.1)}), Choice("b", {"Q4_K": (576, 1.0)})]
    with pytest.raises(BudgetRefused, match="allow 1 bytes more"):
        choose(choices, 2 * 576 - 1)
    assert choose(choices, 2 * 576) == {"a": "Q4_K", "b": "Q4_K"}


def test_a_file_is_as_large_as_its_header_and_its_padded_tensors() -> None:
    """Three rows of Q6_K are 630 bytes, 640 in the file."""
    tensors = [Tensor("a", (3, 256), {"Q6_K": 1.0, "Q8_0": 0.1}), Tensor("b", (256,), {"F32": 0.0})]
    assert tensors[0].choice.types["Q6_K"] == (640, 1.0)
    kvs = 100
    header = header_size(kvs, [("a", (3, 256), "Q6_K"), ("b", (256,), "F32")])
    assert least(tensors, kvs) == header + 640 + 1024
    assert fitted(tensors, kvs, header + 832 + 1023, "targets.x")["a"] == "Q6_K"
    assert fitted(tensors, kvs, header + 832 + 1024, "targets.x")["a"] == "Q8_0"
    with pytest.raises(BudgetRefused, match=f"targets.x.max_size={header + 640 + 1024}"):
        check(tensors, kvs, header + 640 + 1023, "targets.x")


@pytest.mark.parametrize("hurt", [math.nan, math.inf, -1.0])
def test_a_damage_that_is_none_is_refused(hurt: float) -> None:
    with pytest.raises(ValueError, match="the damage of Q4_K"):
        choose([Choice("a", {"Q4_K": (1, hurt)})], 10)


def test_the_solver_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    choices = model(210)
    choose(choices, sum(c.types["Q8_0"][0] for c in choices) * 483 // 850)
    assert capfd.readouterr().out == ""


def test_the_smallest_damage_there_is_does_not_overflow() -> None:
    choices = [Choice("a", {"Q4_K": (1, 5e-324)}), Choice("b", {"Q4_K": (1, 5e-324), "Q6_K": (2, 0.0)})]
    assert choose(choices, 3) == {"a": "Q4_K", "b": "Q6_K"}


def test_no_tensors_need_no_types() -> None:
    assert choose([], 0) == {}
