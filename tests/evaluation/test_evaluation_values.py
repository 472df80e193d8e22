"""Figures of an evaluation against transformers, llama.cpp and NumPy; weights of every family found again in a GGUF."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from arch.arch_kit import maker
from safetensors.torch import save_file

from qbuild import kernels
from qbuild.arch import mix
from qbuild.arch.convert import Transform, model_facts, tensor_specs
from qbuild.checkpoint import Checkpoint, Reader, SourceTensor, open_path
from qbuild.errors import InputError
from qbuild.evaluation import readers
from qbuild.evaluation.measure import Comparison
from qbuild.evaluation.readers import Tensors
from qbuild.evaluation.run import Task, evaluate, states, weight_errors
from qbuild.quant.codes import Codes
from qbuild.quant.packing import pack
from qbuild.quant.shapes import LAYOUTS, Scheme

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "data" / "tiny-llama"
CONFIG = json.loads((TINY / "config.json").read_text())
FAMILIES = maker("make_families")

# A family for every way in which tensors change on their way into a file; the slow tests have them all.
KINDS = ("llama-mlp-bias", "gemma3", "gpt-neox", "phi3", "qwen3moe-fused", "mixtral", "deepseek2-lite")

# Of tiny-llama's files, dequantized to F32 files: llama.cpp itself rounds what it multiplies with quantized weights.
# llama-perplexity -m FILE.gguf -f LICENSE -c 128 --chunks 8 -ctk f32 -ctv f32 -fa off, of llama-cpp-python 0.3.36
LLAMA_PERPLEXITY = {"F32": 44.6888, "Q8_0": 44.5202, "Q4_K_M": 48.6644}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_path(TINY, str(TINY))


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint) -> Iterator[Tensors]:
    with Reader(checkpoint.files) as reader:
        yield readers.safetensors(checkpoint, reader)


@pytest.fixture(scope="module")
def task() -> Task:
    """The windows of llama-perplexity: the text begins with BOS, and each window has it in place of its first token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    text = (ROOT / "LICENSE").read_text().rstrip("\n")
    ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    tokens = np.array(ids[: 8 * 128], np.int32).reshape(8, 128)
    tokens[:, 0] = 1
    return Task(CONFIG, tokens)


@pytest.fixture(scope="module")
def source_states(task: Task, source: Tensors) -> torch.Tensor:
    return states(task, source)


def changed(tensors: Tensors, by: float) -> Tensors:
    """The same model with noise of that share on its matrices."""

    def read(name: str) -> torch.Tensor:
        tensor = tensors.read(name).float()
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        return tensor + by * tensor.std() * noise if tensor.dim() > 1 else tensor

    return Tensors(tensors.names, read)


def in_transformers(tensors: Tensors, tokens: np.ndarray) -> torch.Tensor:
    """Logits of transformers' plain forward."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    model.load_state_dict({name: tensors.read(name).float() for name in tensors.names}, strict=False)
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits


def test_figures_are_those_of_transformers_and_numpy(task: Task, source: Tensors, source_states: torch.Tensor) -> None:
    model = changed(source, 0.1)
    result = evaluate(task, source, source_states, model)
    p, q = (in_transformers(tensors, task.tokens).double().log_softmax(-1).numpy() for tensors in (source, model))
    for logits, whole, late in (
        (q, result.perplexity, result.perplexity_llama),
        (p, result.source_perplexity, result.source_perplexity_llama),
    ):
        nll = -np.take_along_axis(logits[:, :-1], task.tokens[:, 1:, None].astype(np.int64), -1)[..., 0]
        assert whole == pytest.approx(math.exp(nll.mean()), rel=1e-5)
        assert late == pytest.approx(math.exp(nll[:, 64:].mean()), rel=1e-5)
    assert result.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert 0.01 < result.kl < 5
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=2e-3)
    assert result.tokens == 8 * 128


def test_perplexity_is_exp_of_transformers_loss(task: Task, source: Tensors, source_states: torch.Tensor) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in task.windows]
    result = evaluate(task, source, source_states, source)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert (result.kl, result.top1) == (0, 1)


class Quantized:
    """A GGUF file's bytes, made in memory: what a Checkpoint and a Reader of it would give."""

    def __init__(self, checkpoint: Checkpoint, source: Tensors, file_type: str) -> None:
        self.data, tensors = bytearray(), {}
        for spec, type_ in mix.choose(tensor_specs(checkpoint, "F32"), model_facts(checkpoint), mix.Mix(file_type)):
            if spec.data is not None:
                continue
            rows = [source.read(p.source).float().numpy().reshape(-1, spec.shape[-1]) for p in spec.pieces]
            whole = np.concatenate([r[p.start : p.stop] for r, p in zip(rows, spec.pieces, strict=True)])
            made = kernels.quantize(np.ascontiguousarray(spec.transform.apply(whole)), type_)
            tensors[spec.name] = SourceTensor(spec.name, type_, spec.shape, 0, len(self.data), made.nbytes)
            self.data += made.tobytes()
        self.checkpoint = Checkpoint("gguf", "memory", None, (), tensors)

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        flat = buffer.cast("B")
        flat[:] = self.data[offset : offset + len(flat)]


def found_again(checkpoint: Checkpoint, source: Tensors, file_type: str) -> Tensors:
    """The weights of a GGUF file of a checkpoint by the checkpoint's names."""
    made = Quantized(checkpoint, source, file_type)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return readers.gguf(made.checkpoint, made, tensor_specs(checkpoint), shapes, source.read)  # type: ignore[arg-type]


@pytest.mark.parametrize("file_type", LLAMA_PERPLEXITY)
def test_perplexity_of_a_gguf_is_llama_cpps(
    file_type: str, task: Task, checkpoint: Checkpoint, source: Tensors, source_states: torch.Tensor
) -> None:
    result = evaluate(task, source, source_states, found_again(checkpoint, source, file_type))
    assert result.perplexity_llama == pytest.approx(LLAMA_PERPLEXITY[file_type], rel=1e-5)


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v in KINDS else [pytest.mark.slow]) for v in FAMILIES.VARIANTS]
)
def test_a_familys_weights_are_found_again(variant: str, tmp_path: Path) -> None:
    """Permuted heads, stacked experts, cut and fused projections, norms of which one is taken."""
    folder = FAMILIES.write(variant, tmp_path)
    checkpoint = open_path(folder, str(folder))
    with Reader(checkpoint.files) as reader:
        source = readers.safetensors(checkpoint, reader)
        again = found_again(checkpoint, source, "F32")
        for name in source.names:
            before, after = source.read(name).float(), again.read(name)
            assert torch.allclose(before, after, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("kind", "rows", "cols"),
    [("none", 6, 4), ("permute", 48, 12), ("permute", 1, 48), ("qkv", 1, 48), ("transpose", 48, 12)],
)
def test_a_transform_undone_gives_what_it_took(kind: str, rows: int, cols: int) -> None:
    chunk = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    transform = Transform(kind, 8)
    assert (readers.undo(transform, transform.apply(chunk)) == chunk).all()


def test_weight_errors_are_relative_squares(source: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    halved = Tensors(source.names, lambda n: source.read(n) / 2)
    assert weight_errors(source, halved, [name]) == {name: pytest.approx(0.25)}
    assert weight_errors(source, source, [name]) == {name: 0.0}


@pytest.mark.parametrize("noise", [0.003, 0.1])
def test_scales_that_awq_moved_elsewhere_are_no_error(noise: float, source: Tensors) -> None:
    """Columns scaled up for the norm before them, rows scaled down for the linear behind; what was rounded stays."""
    name, draw = "model.layers.0.mlp.up_proj.weight", torch.Generator().manual_seed(5)
    exact = source.read(name).float()
    lost = noise * exact.std() * torch.randn(exact.shape, generator=draw)
    rows, columns = (2 ** (4 * torch.rand(n, generator=draw) - 2) for n in exact.shape)
    scaled = Tensors(source.names, lambda _: (exact + lost) * rows[:, None] * columns)
    found = weight_errors(source, scaled, [name], scaled="model.layers.")[name]
    # A scale for each row and column takes a little of the noise with it: as many of its degrees of freedom.
    share = 1 - sum(exact.shape) / exact.numel()
    assert found == pytest.approx(share * float(lost.square().sum() / exact.square().sum()), rel=0.02)
    assert weight_errors(source, scaled, [name])[name] > 0.5


def test_a_matrix_that_was_scaled_but_not_quantized_is_compared_too(source: Tensors) -> None:
    """A router, whose columns follow the norm before it, is stored in 16 bits."""
    name = "model.layers.0.mlp.up_proj.weight"
    scaled = Tensors(source.names, lambda n: (2 * source.read(n)).bfloat16())
    assert weight_errors(source, scaled, [name], scaled="model.layers.") == {name: pytest.approx(0, abs=1e-5)}


def test_weights_are_compared_one_tensor_at_a_time(source: Tensors) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        if len(held) % 2 == 0:
            assert [other for other in held if other() is not None] == []
        tensor = source.read(name).clone()
        held.append(weakref.ref(tensor))
        return tensor

    names = [name for name in source.names if name.startswith("model.layers.0.mlp.")]
    model = Tensors(source.names, read)
    assert set(weight_errors(model, model, names).values()) == {0.0}
    assert len(held) == 2 * len(names) > 2


def test_experts_of_a_layer_count_as_one() -> None:
    source = Tensors((), lambda name: torch.full((2, 4), 2.0) if "experts.0" in name else torch.zeros(2, 4))
    model = Tensors((), lambda name: torch.full((2, 4), 1.0))
    names = [f"layers.7.mlp.experts.{n}.up_proj.weight" for n in range(2)]
    assert weight_errors(source, model, names) == {"layers.7.mlp.experts.up_proj.weight": (8 + 8) / 32}


def test_parts_of_a_window_add_up_to_the_whole() -> None:
    draw = torch.Generator().manual_seed(3)
    p, q = torch.randn(2, 150, 50, generator=draw).unbind()
    window = torch.randint(0, 50, (150,), generator=draw)
    whole, parts = Comparison(150), Comparison(150)
    whole.add(p, q, window, 0)
    for start in range(0, 150, 40):
        parts.add(p[start : start + 40], q[start : start + 40], window, start)
    assert list(parts.result().to_json().values()) == pytest.approx(list(whole.result().to_json().values()))


def test_small_divergences_are_not_lost_in_rounding() -> None:
    """KL of a shift of one logit by e is p(1-p)e²/2 to third order."""
    logits = torch.zeros(4, 1000, dtype=torch.float32)
    moved = logits.clone()
    moved[:, 7] += 2**-10
    compared = Comparison(4)
    compared.add(logits, moved, torch.zeros(4, dtype=torch.int64), 0)
    assert compared.result().kl == pytest.approx(0.001 * 0.999 * 2**-20 / 2, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = torch.zeros(4, 10)
    wrong = logits.clone()
    wrong[2, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        Comparison(4).add(logits, wrong, torch.zeros(4, dtype=torch.int64), 0)


@pytest.mark.parametrize("shape", [(0, 128), (2, 3)])
def test_a_text_too_short_is_refused(shape: tuple[int, int], source: Tensors) -> None:
    with pytest.raises(InputError, match="cannot be evaluated"):
        states(Task(CONFIG, np.ones(shape, np.int32)), source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_directorys_quantized_linears_are_dequantized(
    layout: str, checkpoint: Checkpoint, source: Tensors, tmp_path: Path
) -> None:
    """Every linear of a layer in the layout, everything else as it was."""
    scheme = Scheme(layout, 4, 32, symmetric=layout in ("gptq", "pack-quantized"))
    stored, expected = {}, {}
    for name in source.names:
        tensor = expected[name] = source.read(name)
        if ".layers." in name and tensor.dim() == 2:
            codes = rounded(tensor.float(), scheme)
            expected[name] = codes.dequantize()
            stored |= pack(scheme, name.removesuffix(".weight"), codes)
        else:
            stored[name] = tensor
    save_file(stored, tmp_path / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    found = readers.packed([tmp_path / "model.safetensors"], shapes, scheme)
    assert found.names == source.names
    for name in found.names:
        assert torch.equal(found.read(name), expected[name]), name


def rounded(weights: torch.Tensor, scheme: Scheme) -> Codes:
    """Round to nearest between each group's least and largest weight, or around zero."""
    w = weights.unflatten(1, (-1, scheme.group_size))
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / 15).half()
    zeros = torch.full_like(scales, 8) if scheme.symmetric else (-low / scales).round().clamp(0, 15)
    codes = (w / scales[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1)
    return Codes(codes.to(torch.uint8), scales, zeros.to(torch.uint8), 4, scheme.group_size, scheme.symmetric)
