"""GPUs as the driver tells of them, and what ``device`` and ``budget.vram`` make of them. No GPU is needed here."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from conftest import Run

from qbuild import device, machine, schema
from qbuild.errors import ConfigError
from qbuild.machine import Gpu

SMALL, LARGE = Gpu("small", 8 << 30, 7 << 30), Gpu("large", 80 << 30, 79 << 30)


class Nvml:
    """A driver with two GPUs, as ctypes shows its library. ``broken``: functions that fail."""

    def __init__(self, *broken: str) -> None:
        self.broken, self.open = broken, False

    def __getattr__(self, name: str) -> Any:
        known = getattr(type(self), name.removeprefix("nvml").removeprefix("Device").removesuffix("_v2").lower())
        return lambda *arguments: 999 if name in self.broken else known(self, *arguments)

    def init(self) -> int:
        self.open = True
        return 0

    def shutdown(self) -> int:
        self.open = False
        return 0

    def getcount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def gethandlebyindex(self, index: ctypes.c_uint, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0

    def getuuid(self, handle: ctypes.c_void_p, text: Any, _size: int) -> int:
        text.value = b"GPU-%d" % (handle.value or 0)
        return 0

    def getname(self, handle: ctypes.c_void_p, text: Any, _size: int) -> int:
        text.value = (SMALL, LARGE)[(handle.value or 0) - 1].name.encode()
        return 0

    def getmemoryinfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        gpu = (SMALL, LARGE)[(handle.value or 0) - 1]
        memory[0], memory[1], memory[2] = gpu.total, gpu.free, gpu.total - gpu.free
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    nvml = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return nvml


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        (None, (SMALL, LARGE)),
        ("1,0", (LARGE, SMALL)),
        ("GPU-2", (LARGE,)),
        ("", ()),
        ("-1", ()),
        ("0,7,1", (SMALL,)),
        ("GPU-", ()),
    ],
)
def test_the_gpus_are_those_that_cuda_will_show(
    driver: Nvml, monkeypatch: pytest.MonkeyPatch, chosen: str | None, seen: tuple[Gpu, ...]
) -> None:
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert machine.gpus() == seen
    assert not driver.open


def test_a_driver_that_is_not_there_or_does_not_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine.gpus() == ()
    for broken in ("nvmlInit_v2", "nvmlDeviceGetMemoryInfo"):
        monkeypatch.setattr(ctypes, "CDLL", lambda _name, broken=broken: Nvml(broken))
        assert machine.gpus() == ()


def has(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, torch: bool = True, triton: bool = True) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr(machine, "has_torch", lambda: torch)
    monkeypatch.setattr(machine, "has_triton", lambda: triton)


def config(**values: Any) -> schema.Config:
    return schema.parse(values)


def test_free_memory_less_a_margin_is_the_budget_and_a_size_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, SMALL, LARGE)
    assert device.vram(config(), device.gpu(config())) == int(SMALL.free * 0.9)
    sized = config(budget={"vram": "2GiB"})
    assert device.vram(sized, device.gpu(sized)) == 2 << 30
    none = config(device="cpu", budget={"vram": "2GiB"})
    assert (device.gpu(none), device.vram(none, device.gpu(none))) == (None, 0)


@pytest.mark.parametrize(
    ("asked", "torch", "triton", "choices"),
    [
        ("auto", True, True, ("cuda", "cpu")),
        ("auto", False, True, ("cpu",)),
        ("auto", True, False, ("cpu",)),
        ("cuda", True, True, ("cuda",)),
        ("cpu", True, True, ("cpu",)),
    ],
)
def test_devices_for_gguf_files(
    monkeypatch: pytest.MonkeyPatch, asked: str, torch: bool, triton: bool, choices: tuple[str, ...]
) -> None:
    has(monkeypatch, SMALL, torch=torch, triton=triton)
    assert device.for_gguf(config(device=asked), device.gpu(config(device=asked))) == choices


def test_auto_never_moves_a_calibration_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, LARGE)
    assert [device.for_calibration(config(device=d)) for d in ("auto", "cpu", "cuda")] == ["cpu", "cpu", "cuda"]


def test_cuda_without_what_it_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, SMALL, triton=False)
    with pytest.raises(ConfigError, match="triton with CUDA is not installed"):
        device.for_gguf(config(device="cuda"), SMALL)


def test_cuda_where_there_is_no_gpu_is_refused_with_a_way_out(qbuild: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", tuple)
    done = qbuild("plan", "+recipe=llama7b_q4", "device=cuda", "format=json")
    assert (done.code, done.error["place"]) == (2, "device")
    assert "no CUDA device" in done.error["fact"]
    assert "device=auto" in done.error["remedy"]
    assert qbuild("plan", "+recipe=llama7b_q4", "device=auto").code == 0
