"""Reports: the page and the card tell what the JSON holds, load nothing, and let no name out of its place."""

from __future__ import annotations

import math
import re
import shlex
from html.parser import HTMLParser
from typing import Any

import pytest

from qbuild.report import facts, pages
from qbuild.report.plot import HEIGHT, WIDTH, Point, bars, scatter

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'q' `code` | [x](y)"
RESULTS = {  # MiB, KL, perplexity, top-1
    "q2_k": (88, 0.52, 58.1, 0.55),
    "q3_k_m": (93.5, 0.165, 42.2, 0.74),
    "q4_0": (91.7, 0.13, 41.0, 0.79),
    "q8_0": (145, 0.0004, 35.9, 0.985),
}


def weights(error: float) -> dict[str, float]:
    """Of two layers and an embedding."""
    layers = {f"model.layers.{n}.mlp.{kind}.weight": error * (n + 1) / 8 for n in (0, 1) for kind in ("up", "down")}
    return layers | {"model.embed_tokens.weight": error / 64}


def built(name: str = "m", evaluated: bool = True) -> dict[str, Any]:
    """A build.json as the engine writes it."""
    targets = {
        target: {
            "path": f"/somewhere/{name}-{target}.gguf".replace("</", "<"), "digest": f"{number:064x}/7",
            "bytes": int(mib * 2**20) + number, "bits_per_weight": 4.125 + number, "verdicts": {"run": 20, "hit": 9},
            "seconds": 12.375 + number, "peak_ram": (300 << 20) + number, "predicted_ram": (320 << 20) + number,
        }
        for number, (target, (mib, *_)) in enumerate(RESULTS.items())
    }  # fmt: skip
    document = {
        "model": {"name": name, "source": f"/home/me/{name}", "revision": None, "files": {}, "inputs": "ab/1"},
        "targets": targets,
        "totals": {"computed": 80, "reused": 36, "read_bytes": 1 << 30, "written_bytes": 1 << 29, "wall_seconds": 50.0},
        "jobs": {"gguf pass 'q2_k'": {"predicted_ram": 320 << 20, "peak_ram": 300 << 20, "seconds": 12.4}},
        "versions": {"qbuild": "0.1.0"},
    }
    if evaluated:
        found = {
            n: {"kl": kl, "perplexity": p, "source_perplexity": 35.125, "top1": top, "weights": weights(kl)}
            for n, (_, kl, p, top) in RESULTS.items()
        }
        document["evaluation"] = {"source": "/home/me/text", "length": 512, "dtype": "float32", "targets": found}
    return document


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, key: str) -> list[str]:
        return [value for name, value in self.attributes if name == key]


def test_every_number_of_the_json_is_on_the_page() -> None:
    report = facts.report(built())
    page = Page(pages.html(report))
    assert page.open == []
    titles = page.values("title")
    for target in report["targets"].values():
        for key in ("bytes", "peak_ram", "predicted_ram"):
            assert f"{target[key]} bytes" in titles
        for key in ("kl", "perplexity", "source_perplexity", "top1"):
            assert str(target["evaluation"][key]) in titles
        for layer, error in enumerate(target["errors"]["layers"]):
            assert f"layer {layer}: {error}" in titles
        assert {str(target["errors"]["mean"]), str(target["errors"]["largest"][1])} <= set(titles)
        assert target["digest"] in pages.html(report)
        assert f"<td>{target['seconds']}</td>" in pages.html(report)


def test_the_page_asks_the_network_for_nothing() -> None:
    text = pages.html(facts.report(built()))
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object", "embed"}.isdisjoint(page.tags)
    assert not [key for key, _ in page.attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values("content")


def test_a_hostile_name_stays_text() -> None:
    document = built(HOSTILE)
    document["targets"][HOSTILE] = document["targets"].pop("q2_k")
    document["evaluation"]["targets"][HOSTILE] = document["evaluation"]["targets"].pop("q2_k")
    text = pages.html(facts.report(document))
    assert "script" not in Page(text).tags
    assert f"{HOSTILE} · 88.0 MiB" in "\n".join(Page(text).values("aria-label"))
    assert "<script" not in pages.markdown(facts.report(document)).split("\n## ")[0]


def test_a_fence_outlasts_what_it_holds() -> None:
    document = built("a ```\n# not a heading")
    card = pages.markdown(facts.report(document))
    assert "\n````\n" in card


def test_a_card_keeps_local_paths_to_itself_and_names_the_hub() -> None:
    document = built()
    assert "/home/me" not in pages.markdown(facts.report(document))
    assert "/home/me/m" in pages.html(facts.report(document))
    document["model"] |= {"source": "org/m", "revision": "c0ffee"}
    card = pages.markdown(facts.report(document))
    assert 'base_model: "org/m"\n' in card
    assert "| revision | c0ffee |" in card


def test_tables_of_the_card_have_as_many_cells_in_every_row() -> None:
    document = built()
    del document["evaluation"]["targets"]["q2_k"]
    assert "\n| the source | | | | 35.12 | |\n" in pages.markdown(facts.report(document))
    for card in (pages.markdown(facts.report(document)), pages.markdown(facts.report(built(evaluated=False)))):
        for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_without_evaluation_the_page_says_so_and_shows_sizes() -> None:
    report = facts.report(built(evaluated=False))
    text = pages.html(report)
    assert "not evaluated" in text
    assert "svg" not in Page(text).tags
    assert report["targets"]["q2_k"]["front"] is None


def test_what_was_not_made_now_has_no_seconds() -> None:
    document = built()
    document["targets"]["q2_k"] |= {"verdicts": {"hit": 29}, "seconds": 0.0, "peak_ram": 0, "predicted_ram": 0}
    assert re.search(
        r'q2_k</th><td>0</td><td>29</td><td>–</td>\s*<td title="0 bytes">–</td>', pages.html(facts.report(document))
    )


def test_errors_of_weights_are_told_by_layer() -> None:
    told = facts.errors({"model.layers.1.a": 0.5, "model.layers.0.a": 0.25, "model.layers.0.b": 0.75, "head": 0.0})
    assert told == {"layers": [0.5, 0.5], "mean": 0.375, "largest": ["model.layers.0.b", 0.75]}
    document = built()
    for result in document["evaluation"]["targets"].values():
        del result["weights"], result["source_perplexity"]  # of an earlier version
    assert "layer by layer" not in pages.html(facts.report(document))
    assert "| the source |" not in pages.markdown(facts.report(document))


def test_layers_are_drawn_against_the_worst_of_their_target() -> None:
    document = built()
    drawn = [v for v in Page(pages.html(facts.report(document))).values("style") if v.startswith("height")]
    assert drawn == ["height: 50.0%", "height: 100.0%"] * len(RESULTS)
    document["evaluation"]["targets"]["q8_0"]["weights"] = {"model.layers.0.up": 0.0}
    assert "height: 0.0%" in pages.html(facts.report(document))


def test_every_calibration_is_told_with_its_digest() -> None:
    document = built()
    one = {"source": "builtin", "samples": 8, "length": 64, "seed": 0, "dtype": "float32", "digest": "aa/1"}
    document["targets"]["q2_k"]["calibration"] = one
    assert '<dt>calibration digest</dt><dd class="mono">aa/1</dd>' in pages.html(facts.report(document))
    document["targets"]["q4_0"]["calibration"] = one | {"samples": 16, "digest": "bb/1"}
    page = pages.html(facts.report(document))
    assert '<dt>q2_k: calibration samples</dt><dd class="mono">8</dd>' in page
    assert '<dt>q4_0: calibration digest</dt><dd class="mono">bb/1</dd>' in page


def test_the_front_is_what_nothing_beats() -> None:
    targets = facts.report(built())["targets"]
    assert [name for name in targets if targets[name]["front"]["kl"]] == ["q2_k", "q4_0", "q8_0"]
    assert facts.pareto({"a": (1, 1), "b": (1, 1), "c": (1, 2), "d": (2, 1), "e": (0, 3)}) == {"a", "b", "e"}


@pytest.mark.parametrize(
    ("file", "programs"),
    [
        ("m-Q4_K_M.gguf", ["llama.cpp", "llama.cpp, as a server"]),
        ("m-AWQ-w4-g128", ["vLLM", "transformers"]),
        ("m-imatrix.gguf", ["llama.cpp"]),
    ],
)
def test_each_format_has_the_programs_that_load_it(file: str, programs: list[str]) -> None:
    assert [item["program"] for item in facts.commands(file)] == programs


@pytest.mark.parametrize("name", ["plain", "two words", "it's", "-m", "$(reboot)", 'q"q'])
@pytest.mark.parametrize("suffix", [".gguf", "", "-imatrix.gguf"])
def test_a_file_name_is_one_word_of_its_commands(name: str, suffix: str) -> None:
    for item in facts.commands(name + suffix):
        words = shlex.split(item["command"])
        if words[0] == "python":
            compile(words[2], "command", "exec")
            assert repr(f"./{name}") in words[2]
        else:
            assert {name + suffix, f"./{name}{suffix}"} & set(words)
            assert name + suffix not in words or not name.startswith("-")


def point(name: str, x: float, y: float) -> Point:
    return Point(name, x, y, True, name)


@pytest.mark.parametrize(
    "points",
    [
        [point("only", 5e9, 0.1)],
        [point("same", 1e9, 0.1), point("place", 1e9, 0.1)],
        [point("exact", 2e9, 0.0), point("near", 1e9, 1e-6), point("far", 5e8, 1.0)],
        [point(f"target_{n}", 1e9 + n, 0.1) for n in range(30)],
        [point("zero", 7, 0.0)],
    ],
)
def test_marks_ticks_and_labels_stay_inside_the_plot(points: list[Point]) -> None:
    plot = scatter(points, "KL")
    assert len(plot.x_ticks) >= 1
    assert len({tick.text for tick in plot.y_ticks}) == len(plot.y_ticks) >= 1
    for mark in plot.marks:
        assert plot.left <= mark.x <= plot.right
        assert plot.top <= mark.y <= plot.bottom
        assert mark.label is None or (0 <= mark.label.x <= WIDTH and 0 <= mark.label.y <= HEIGHT)


def test_smaller_is_left_and_better_is_below() -> None:
    at = {
        m.point.name: m
        for m in scatter([point("a", 1e9, 0.5), point("b", 2e9, 0.001), point("c", 3e9, 0.0)], "KL").marks
    }
    assert at["a"].x < at["b"].x < at["c"].x
    assert at["a"].y < at["b"].y < at["c"].y


def test_rounding_does_not_stretch_an_axis_over_ten_decades() -> None:
    """The divergence of an F16 file of a bf16 model is 1e-12."""
    plot = scatter([point("f16", 5e9, 1.4e-12), point("q8_0", 3e9, 3e-4), point("q2_k", 1e9, 0.4)], "KL")
    assert [tick.text for tick in plot.y_ticks] == ["0", "0.0001", "0.001", "0.01", "0.1"]
    assert {m.point.name: m.y for m in plot.marks}["f16"] == plot.y_ticks[0].at


def test_a_name_is_not_put_next_to_another_point() -> None:
    """Of two points one above the other between neighbours, the name of the lower one had only the upper one's side."""
    crowd = [("low", 22.0, 185.4), ("high", 22.1, 186.6), ("left", 20.5, 185.4), ("right", 23.2, 185.1)]
    around = [("first", 12.0, 218.0), ("last", 56.0, 183.9)]
    plot = scatter([Point(name, x * 2**20, y, False, name) for name, x, y in (*crowd, *around)], "perplexity")
    spots = {m.point.name: (m.x, m.y) for m in plot.marks}
    for mark in (mark for mark in plot.marks if mark.label):
        at = (mark.label.x, mark.label.y - 4)
        assert min(spots, key=lambda name: math.dist(spots[name], at)) == mark.point.name


def test_ticks_stand_where_their_values_would() -> None:
    plot = scatter([point("a", 3 << 30, 0.5), point("b", 5 << 30, 0.6)], "KL")
    (a, b), ticks = [m.x for m in plot.marks], {t.text: t.at for t in plot.x_ticks}
    assert ticks["4.0"] == pytest.approx((a + b) / 2)


def test_bars_share_one_scale() -> None:
    long, short = bars({"a": (10, "10", 8), "b": (5, "5", None)})
    assert (long.share, long.mark, short.share, short.mark) == (100, 80, 50, None)
    assert bars({"a": (0, "0", None)})[0].share == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "0.0001234"), (35.891, "35.89"), (0, "0"), (123456.0, "123456"), (1.3566e-12, "1.4e-12")],
)
def test_numbers_keep_four_digits_without_an_exponent_unless_they_are_next_to_nothing(value: float, text: str) -> None:
    assert pages.number(value) == text
