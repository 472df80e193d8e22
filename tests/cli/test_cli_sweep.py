"""Sweeps with the real engine: one read of the model, every tensor once, and failures that stay with their jobs."""

from __future__ import annotations

from pathlib import Path

from conftest import Run

from qbuild.source import open_source

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
SOURCE = (f"model.source={TINY}", "format=json")


def test_a_sweep_reads_the_model_once_and_makes_shared_tensors_once(qbuild: Run, tmp_path: Path) -> None:
    settings = (*SOURCE, f"out={tmp_path / 'out'}", f"store.dir={tmp_path / 'store'}")
    document = qbuild("-m", *settings, "target=gguf/q4_k_m,gguf/q4_k_s,gguf/q8_0").document
    totals = document["builds"][0]["totals"]
    assert len(document["builds"]) == 1
    assert totals["read_bytes"] == sum(t.nbytes for t in open_source(str(TINY)).tensors.values())
    made = [set(job["result"]["targets"]) for job in document["jobs"]]
    assert made == [{"q4_k_m"}, {"q4_k_s"}, {"q8_0"}]
    # Q4_K_M and Q4_K_S share most of their tensors: fewer are computed than the three files hold.
    held = [
        sum(j["result"]["targets"][n]["verdicts"].values()) for j in document["jobs"] for n in j["result"]["targets"]
    ]
    assert held[0] < totals["computed"] < sum(held)
    again = qbuild("-m", *settings, "target=gguf/q4_k_m,gguf/q4_k_s,gguf/q8_0").document
    assert again["builds"][0]["totals"]["computed"] == 0


def test_a_job_that_cannot_be_leaves_the_others_to_finish(qbuild: Run, tmp_path: Path) -> None:
    settings = (*SOURCE, f"out={tmp_path / 'out'}", f"store.dir={tmp_path / 'store'}")
    done = qbuild("-m", "-k", *settings, "target=gguf/q4_0,gguf/iq2_xxs,gguf/q8_0")  # IQ2_XXS needs an imatrix
    assert done.code == 2
    assert [job["exit_code"] for job in done.document["jobs"]] == [0, 2, 0]
    assert {p.name for p in (tmp_path / "out").glob("*.gguf")} == {"tiny-llama-Q4_0.gguf", "tiny-llama-Q8_0.gguf"}


def test_a_plan_of_a_sweep_prices_all_of_it(qbuild: Run, tmp_path: Path) -> None:
    settings = (*SOURCE, f"out={tmp_path / 'out'}", f"store.dir={tmp_path / 'store'}")
    both = qbuild("plan", "-m", *settings, "target=gguf/q4_0,gguf/q8_0").document
    one = qbuild("plan", *settings, "target=gguf/q8_0").document
    assert len(both["builds"]) == 1
    assert both["builds"][0]["predicted"]["read_bytes"] == one["predicted"]["read_bytes"]
    assert both["builds"][0]["predicted"]["disk"] > one["predicted"]["disk"]
