"""The ggml tensor types and llama.cpp file types qbuild knows, as data. No numpy: the plan path imports this.

Source: ggml.h (ggml_type ids, block sizes) and llama.h (llama_ftype ids) of llama.cpp, ggml 0.25.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BY_ID", "ENCODED", "FILE_TYPES", "QTYPES", "FileType", "QType", "nearest_file_type"]


@dataclass(frozen=True)
class QType:
    """One ggml tensor type: ``block`` weights are stored in ``nbytes`` bytes."""

    name: str
    id: int
    block: int
    nbytes: int

    @property
    def quantized(self) -> bool:
        return self.block > 1

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.block

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` weights; ``cols`` must be a multiple of the block."""
        blocks, rest = divmod(cols, self.block)
        if rest:
            raise ValueError(f"{self.name}: {cols} columns are not a multiple of {self.block}")
        return blocks * self.nbytes


QTYPES: dict[str, QType] = {
    name: QType(name, id_, block, nbytes)
    for name, id_, block, nbytes in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("I8", 24, 1, 1),
        ("I16", 25, 1, 2),
        ("I32", 26, 1, 4),
        ("I64", 27, 1, 8),
        ("F64", 28, 1, 8),
        ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36),
        ("Q1_0", 41, 128, 18),
        ("Q2_0", 42, 64, 18),
    )
}
# What a tensor can be made into; the others are read, and written as they are.
ENCODED = tuple(name for name in QTYPES if name not in ("I8", "I16", "I32", "I64", "F64"))
BY_ID: dict[int, QType] = {q.id: q for q in QTYPES.values()}


@dataclass(frozen=True)
class FileType:
    """A llama.cpp file type (``LLAMA_FTYPE_MOSTLY_*``): its id and the tensor type most weights get."""

    name: str
    id: int
    base: str


FILE_TYPES: dict[str, FileType] = {
    name: FileType(name, id_, base)
    for name, id_, base in (
        ("F32", 0, "F32"),
        ("F16", 1, "F16"),
        ("Q4_0", 2, "Q4_0"),
        ("Q4_1", 3, "Q4_1"),
        ("Q8_0", 7, "Q8_0"),
        ("Q5_0", 8, "Q5_0"),
        ("Q5_1", 9, "Q5_1"),
        ("Q2_K", 10, "Q2_K"),
        ("Q3_K_S", 11, "Q3_K"),
        ("Q3_K_M", 12, "Q3_K"),
        ("Q3_K_L", 13, "Q3_K"),
        ("Q4_K_S", 14, "Q4_K"),
        ("Q4_K_M", 15, "Q4_K"),
        ("Q5_K_S", 16, "Q5_K"),
        ("Q5_K_M", 17, "Q5_K"),
        ("Q6_K", 18, "Q6_K"),
        ("IQ2_XXS", 19, "IQ2_XXS"),
        ("IQ2_XS", 20, "IQ2_XS"),
        ("Q2_K_S", 21, "Q2_K"),
        ("IQ3_XS", 22, "IQ3_S"),
        ("IQ3_XXS", 23, "IQ3_XXS"),
        ("IQ1_S", 24, "IQ1_S"),
        ("IQ4_NL", 25, "IQ4_NL"),
        ("IQ3_S", 26, "IQ3_S"),
        ("IQ3_M", 27, "IQ3_S"),
        ("IQ2_S", 28, "IQ2_XS"),
        ("IQ2_M", 29, "IQ2_S"),
        ("IQ4_XS", 30, "IQ4_XS"),
        ("IQ1_M", 31, "IQ1_M"),
        ("BF16", 32, "BF16"),
        ("TQ1_0", 36, "TQ1_0"),
        ("TQ2_0", 37, "TQ2_0"),
        ("MXFP4_MOE", 38, "MXFP4"),
        ("Q1_0", 40, "Q1_0"),
        ("Q2_0", 41, "Q2_0"),
    )
}


def nearest_file_type(weights: Mapping[str, int]) -> FileType:
    """What ``general.file_type`` says of a file of other types than llama-quantize mixes: the file type of the tensor
    type that most weights have (``weights`` by type). llama.cpp shows it and guesses alike where there is none."""
    for type_ in sorted(weights, key=lambda name: (-weights[name], name)):
        for name in (f"{type_}_M", type_, *FILE_TYPES):
            if name in FILE_TYPES and FILE_TYPES[name].base == type_:
                return FILE_TYPES[name]
    return FILE_TYPES["F16"]
