"""Explicit SIMD values inside numba: strict IEEE float32, generic over the lane count.

A ``Vec(elem, n)`` is an LLVM ``<n x elem>`` that lives in registers: float32, int32, uint32, uint16, uint8, or boolean
(a mask). LLVM splits it into what the CPU has, so n is a matter of speed alone (``host_lanes``), not of an
instruction set. No fast-math flag is ever set and nothing is contracted to FMA: each lane computes what scalar C would.

The habit of this package is lane = one independent problem (a sub-block, a super-block), the element loop sequential,
so sums keep ggml's order. ``load_columns`` brings weights in transposed, ``transpose`` takes levels back out.

Inside ``@inline`` or ``@kernel`` functions (v, w: Vec of one shape; s: Python or NumPy scalar; m: mask):

    v + w   v - s   s * v   v / w   -v     & | ^ ~ << >>      arithmetic; a scalar is cast to the element, then splat
    v < w   v == s  ...                                       ordered compare -> mask (``!=`` is true for NaN, as in C)
    splat(s, like)   zeros(like, dtype)                       like: a Vec, or a literal lane count
    load(a, i, like)   store(a, i, v)                         a[i : i + n] of a 1-D array, any alignment
    load_as(a, byte, dtype, like)   store_as(a, byte, v)      the same at a byte offset of a uint8 array
    select(m, v, w)   any_lane(m)   lane(v, k)   lanes(v)
    fmin(v, w)   fmax(v, w)                                   v < w ? v : w and v > w ? v : w, as C's MIN and MAX
    fabs(v)   sqrt(v)   rint(v)
    to(v, dtype)   bits(v, dtype)                             convert (see ``to``), reinterpret
    gather(a, i)                                              a[i] per lane
    from_half to_half from_bfloat to_bfloat                   float16 and bfloat16 bits
    scratch(count, size, dtype)                               an uninitialized 1-D array on the stack
    transpose(...)   load_columns(...)                        16 x 16 tiles: between memory order and lane order
"""

from __future__ import annotations

import operator
import sys
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import caching, cgutils
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable
from numba.np import arrayobj

_I32 = ir.IntType(32)
_ELEMENTS = {
    types.float32: ir.FloatType(),
    types.int32: _I32,
    types.uint32: _I32,
    types.uint16: ir.IntType(16),
    types.uint8: ir.IntType(8),
    types.boolean: ir.IntType(1),
}
# No reference counts: passing an array to an inlined function would cost two atomic operations.
_JIT = {"nogil": True, "error_model": "numpy", "boundscheck": False, "_nrt": False}

_PACKAGE = __name__.rpartition(".")[0] + "."
_NAMED = (FunctionType, Dispatcher, type)  # what knows its module

_CALLED: set[Path] = set()  # of the entry points that were called, the indexes of their files in numba's disk cache

inline = njit(inline="always", **_JIT)


def kernel(function: Any) -> Any:
    """Compile an entry point and keep it in numba's disk cache until a source file it is made from changes."""
    try:
        compiled = njit(cache=True, **_JIT)(function)
    except RuntimeError:  # no folder for a cache can be written
        return njit(**_JIT)(function)
    try:
        # numba stamps a cache with the file of the entry point alone; an edit of what it inlines would go unnoticed.
        compiled._cache._cache_file._source_stamp = _sources(function)
        index = Path(compiled._cache._cache_file._index_path)
    except AttributeError:
        compiled._cache = caching.NullCache()
        return compiled

    @wraps(function)
    def called(*args: Any) -> Any:
        _CALLED.add(index)
        return compiled(*args)

    called.compiled = compiled  # type: ignore[attr-defined]
    return called


def called_files() -> list[Path]:
    """Files of numba's disk cache that hold the kernels which were called since this was asked last."""
    used = sorted(_CALLED)
    _CALLED.clear()
    return [path for index in used for path in (index, *sorted(index.parent.glob(f"{index.stem}.*.nbc")))]


def host_lanes() -> int:
    """Lanes of a search: enough independent chains to hide latency, few enough to stay in registers."""
    return 64 if get_host_cpu_features().get("avx512f") else 32


def _sources(function: Any) -> tuple[tuple[str, int, int], ...]:
    """Stamps of the files a kernel is made from: its module and, through what they import, this package's others."""
    names, found = [function.__module__], {}
    while names:
        name = names.pop()
        if name not in found and (name == function.__module__ or name.startswith(_PACKAGE)):
            module = sys.modules[name]
            found[name] = Path(str(module.__file__)).stat()
            names += [value.__module__ for value in vars(module).values() if isinstance(value, _NAMED)]
    return tuple((name, found[name].st_mtime_ns, found[name].st_size) for name in sorted(found))


class Vec(types.Type):  # type: ignore[misc]
    """n lanes of a scalar type."""

    def __init__(self, elem: types.Type, n: int) -> None:
        self.elem, self.n = elem, n
        super().__init__(name=f"vec({elem} x {n})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_ELEMENTS[self.elem], self.n)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


def _lanes(like) -> int:
    return like.n if isinstance(like, Vec) else like.literal_value


def _const(n: int, elem: ir.Type, value) -> ir.Constant:
    return ir.Constant(ir.VectorType(elem, n), [value] * n)


def _splat(builder, value, n: int):
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, n), ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, _const(n, _I32, 0))


def _operand(context, builder, value, given, vec: Vec):
    """A Vec operand as it is, a scalar one cast to the element type and splat."""
    if isinstance(given, Vec):
        return value
    return _splat(builder, context.cast(builder, value, given, vec.elem), vec.n)


# ---- operators

_FLOAT = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_INT = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.and_: "and_", operator.or_: "or_",
    operator.xor: "xor", operator.lshift: "shl", operator.rshift: "lshr",
}  # fmt: skip
_COMPARE = {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
}  # fmt: skip
_INPLACE = {
    operator.add: operator.iadd, operator.sub: operator.isub, operator.mul: operator.imul, operator.and_: operator.iand,
    operator.or_: operator.ior, operator.truediv: operator.itruediv,
}  # fmt: skip


def _vec_of(a, b) -> Vec | None:
    """The Vec both operands work in: two of one shape, or a Vec and a scalar."""
    if isinstance(a, Vec) and (a == b or isinstance(b, types.Number | types.Boolean)):
        return a
    return b if isinstance(b, Vec) and isinstance(a, types.Number | types.Boolean) else None


def _register(op, typer, emit) -> None:
    type_callable(op)(lambda context: typer)
    for shape in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):
        lower_builtin(op, *shape)(emit)


def _arithmetic(op) -> None:
    def typer(a, b):
        vec = _vec_of(a, b)
        known = _FLOAT if vec is not None and vec.elem == types.float32 else _INT
        return vec if op in known else None

    def emit(context, builder, sig, args):
        vec = sig.return_type
        x, y = (_operand(context, builder, v, t, vec) for v, t in zip(args, sig.args, strict=True))
        name = _FLOAT[op] if vec.elem == types.float32 else _INT[op]
        if name == "lshr" and vec.elem.signed:
            name = "ashr"
        return getattr(builder, name)(x, y)

    _register(op, typer, emit)
    if op in _INPLACE:
        _register(_INPLACE[op], typer, emit)


def _compare(op) -> None:
    def typer(a, b):
        vec = _vec_of(a, b)
        return None if vec is None else Vec(types.boolean, vec.n)

    def emit(context, builder, sig, args):
        vec = _vec_of(*sig.args)
        x, y = (_operand(context, builder, v, t, vec) for v, t in zip(args, sig.args, strict=True))
        if vec.elem == types.float32:
            compare = builder.fcmp_unordered if op is operator.ne else builder.fcmp_ordered
        else:
            compare = builder.icmp_signed if getattr(vec.elem, "signed", False) else builder.icmp_unsigned
        return compare(_COMPARE[op], x, y)

    _register(op, typer, emit)


for _op in (*_FLOAT, *(op for op in _INT if op not in _FLOAT)):
    _arithmetic(_op)
for _op in _COMPARE:
    _compare(_op)


@type_callable(operator.neg)
def _type_neg(context):
    return lambda v: v if isinstance(v, Vec) and v.elem == types.float32 else None


@lower_builtin(operator.neg, Vec)
def _neg(context, builder, sig, args):
    return builder.fneg(args[0])


@type_callable(operator.invert)
def _type_invert(context):
    return lambda v: v if isinstance(v, Vec) and v.elem != types.float32 else None


@lower_builtin(operator.invert, Vec)
def _invert(context, builder, sig, args):
    return builder.not_(args[0])


# ---- making, loading, storing


@intrinsic(prefer_literal=True)
def splat(tyctx, value, like):
    """float32 lanes of one value."""
    vec = Vec(types.float32, _lanes(like))

    def codegen(context, builder, sig, args):
        return _operand(context, builder, args[0], sig.args[0], vec)

    return vec(value, like), codegen


@intrinsic(prefer_literal=True)
def zeros(tyctx, like, dtype):
    """Lanes of zero bits; of False for dtype bool."""
    vec = Vec(dtype.dtype if isinstance(dtype, types.NumberClass) else types.boolean, _lanes(like))
    return vec(like, dtype), lambda context, builder, sig, args: ir.Constant(vec.llvm, None)


def _address(context, builder, array_type, array, index, pointee):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _read(builder, pointer):
    value = builder.load(pointer)
    value.align = 1
    return value


def _write(builder, value, pointer) -> None:
    builder.store(value, pointer).align = 1


@intrinsic(prefer_literal=True)
def load(tyctx, array, index, like):
    vec = Vec(array.dtype, _lanes(like))

    def codegen(context, builder, sig, args):
        return _read(builder, _address(context, builder, sig.args[0], args[0], args[1], vec.llvm))

    return vec(array, types.intp, like), codegen


@intrinsic(prefer_literal=True)
def load_as(tyctx, array, byte, dtype, like):
    vec = Vec(dtype.dtype, _lanes(like))

    def codegen(context, builder, sig, args):
        return _read(builder, _address(context, builder, sig.args[0], args[0], args[1], vec.llvm))

    return vec(array, types.intp, dtype, like), codegen


@intrinsic
def store(tyctx, array, index, value):
    if array.dtype != value.elem:
        raise TypeError(f"cannot store {value} in {array}")
    return _store(array, value)


@intrinsic
def store_as(tyctx, array, byte, value):
    return _store(array, value)


def _store(array, value):
    def codegen(context, builder, sig, args):
        _write(builder, args[2], _address(context, builder, sig.args[0], args[0], args[1], sig.args[2].llvm))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def gather(tyctx, array, index):
    """array[index[k]] for each lane k; no bounds check."""
    vec = Vec(array.dtype, index.n)

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        out = ir.Constant(vec.llvm, ir.Undefined)
        for k in range(vec.n):
            at = builder.zext(builder.extract_element(args[1], ir.Constant(_I32, k)), ir.IntType(64))
            out = builder.insert_element(out, builder.load(builder.gep(data, [at])), ir.Constant(_I32, k))
        return out

    return vec(array, index), codegen


@intrinsic
def lanes(tyctx, value):
    """How many lanes a Vec has, as a constant."""

    def codegen(context, builder, sig, args):
        return context.get_constant(types.intp, value.n)

    return types.intp(value), codegen


@intrinsic
def lane(tyctx, value, k):
    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], args[1])

    return value.elem(value, types.intp), codegen


# ---- lane-wise functions


@intrinsic
def select(tyctx, mask, x, y):
    """x where the mask holds, else y; one of them may be a scalar."""
    vec = x if isinstance(x, Vec) else y

    def codegen(context, builder, sig, args):
        a, b = (_operand(context, builder, v, t, vec) for v, t in zip(args[1:], sig.args[1:], strict=True))
        return builder.select(args[0], a, b)

    return vec(mask, x, y), codegen


@intrinsic
def any_lane(tyctx, mask):
    def codegen(context, builder, sig, args):
        word = builder.bitcast(args[0], ir.IntType(mask.n))
        return builder.icmp_unsigned("!=", word, ir.Constant(word.type, 0))

    return types.boolean(mask), codegen


def _unary(name: str):
    @intrinsic
    def function(tyctx, value):
        def codegen(context, builder, sig, args):
            shape = ir.FunctionType(value.llvm, [value.llvm])
            called = cgutils.get_or_insert_function(builder.module, shape, f"llvm.{name}.v{value.n}f32")
            return builder.call(called, args)

        return value(value), codegen

    return function


sqrt, fabs = _unary("sqrt"), _unary("fabs")


@intrinsic
def rint(tyctx, value):
    """Round to an integer, half to even, for |value| < 2**22."""

    def codegen(context, builder, sig, args):
        if "+sse4.1" in context.codegen().magic_tuple()[2]:
            shape = ir.FunctionType(value.llvm, [value.llvm])
            rounding = cgutils.get_or_insert_function(builder.module, shape, f"llvm.rint.v{value.n}f32")
            return builder.call(rounding, args)
        magic = _const(value.n, ir.FloatType(), 12582912.0)  # no instruction for it: LLVM would call libm, lane by lane
        return builder.fsub(builder.fadd(args[0], magic), magic)

    return value(value), codegen


@inline
def fmin(v, w):
    return select(v < w, v, w)


@inline
def fmax(v, w):
    return select(v > w, v, w)


@intrinsic
def bits(tyctx, value, dtype):
    """The same bits as another element type of the same width."""
    vec = Vec(dtype.dtype, value.n)
    return vec(value, dtype), lambda context, builder, sig, args: builder.bitcast(args[0], vec.llvm)


@intrinsic
def to(tyctx, value, dtype):
    """Convert lanes. float to int truncates, and gives INT_MIN out of range and for NaN (what x86 does in C).

    int to narrower int keeps the low bits; a mask becomes 0 or 1.
    """
    vec = Vec(dtype.dtype, value.n)

    def codegen(context, builder, sig, args):
        return _convert(builder, args[0], value, vec)

    return vec(value, dtype), codegen


def _convert(builder, v, source: Vec, vec: Vec):
    if source.elem == types.float32:
        limit, lowest = _const(vec.n, ir.FloatType(), 2.0**31), _const(vec.n, ir.FloatType(), -(2.0**31))
        above = builder.fcmp_unordered(">=", v, limit)
        below = builder.fcmp_unordered("<", v, lowest)
        word = builder.fptosi(builder.select(builder.or_(above, below), lowest, v), ir.VectorType(_I32, vec.n))
        return word if vec.llvm == word.type else builder.trunc(word, vec.llvm)
    signed = getattr(source.elem, "signed", False)
    if vec.elem == types.float32:
        return builder.sitofp(v, vec.llvm) if signed else builder.uitofp(v, vec.llvm)
    have, want = source.llvm.element.width, vec.llvm.element.width
    if want == have:
        return v
    if want < have:
        return builder.trunc(v, vec.llvm)
    return builder.sext(v, vec.llvm) if signed else builder.zext(v, vec.llvm)


# ---- weights: float32, float16 and bfloat16 sources

F32, F16, BF16 = 0, 1, 2  # kinds of source, as the kernels take them
_F32, _U16, _I32T, _U32 = np.float32, np.uint16, np.int32, np.uint32


@inline
def from_half(h):
    """float16 bits (uint16 lanes) to float32, by integers: a CPU without F16C has no instruction for it."""
    word = to(h, _I32T)
    body = (word & 0x7FFF) << 13
    value = bits(bits(body, _F32) * 5.192296858534828e33, _I32T)  # 2**112 moves the exponent; subnormals come out exact
    value = select(body >= 0x0F800000, body | 0x7F800000, value)
    return bits(value | ((word & 0x8000) << 16), _F32)


@inline
def to_half(v):
    """float32 to float16 bits (int32 lanes), round to nearest even; NaN becomes 0x7E00 with its sign, as in ggml."""
    word = bits(v, _I32T)
    body = word & 0x7FFFFFFF
    normal = (body - 0x37FFF001 + ((body >> 13) & 1)) >> 13
    normal = select(body >= 0x47800000, 0x7C00, normal)
    small = bits(bits(body, _F32) + 0.5, _I32T) - 0x3F000000  # the addition rounds at float16's subnormal unit
    half = select(body < 0x38800000, small, normal)
    half = select(body > 0x7F800000, 0x7E00, half)
    return half | ((word >> 16) & 0x8000)


@inline
def from_bfloat(b):
    return bits(to(b, _I32T) << 16, _F32)


@inline
def to_bfloat(v):
    """float32 to bfloat16 bits (int32 lanes), round to nearest even; NaN is made quiet."""
    word = bits(v, _U32)
    rounded = (word + (((word >> 16) & 1) + 0x7FFF)) >> 16
    return bits(select(v != v, (word >> 16) | 64, rounded), _I32T)


@inline
def load_weights(source, kind, index, like):
    """Weights [index, index + n) of a source (its bytes, uint8) as float32."""
    if kind == F32:
        return load_as(source, index * 4, _F32, like)
    if kind == F16:
        return from_half(load_as(source, index * 2, _U16, like))
    return from_bfloat(load_as(source, index * 2, _U16, like))


# ---- transposes


def _transpose(builder, rows: list) -> list:
    """n vectors of n lanes, transposed by log2 n rounds of interleaving."""
    n = len(rows)
    low = ir.Constant(ir.VectorType(_I32, n), [k // 2 + n * (k % 2) for k in range(n)])
    high = ir.Constant(ir.VectorType(_I32, n), [n // 2 + k // 2 + n * (k % 2) for k in range(n)])
    for _ in range(n.bit_length() - 1):
        pairs = [(rows[r], rows[r + n // 2]) for r in range(n // 2)]
        rows = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in (low, high)]
    return rows


@intrinsic
def transpose(tyctx, source, at, stride, target, to, to_stride):
    """16 x 16: target[to + c * to_stride + r] = source[at + r * stride + c]; 1-D arrays of one type, any alignment."""
    vec = Vec(source.dtype, 16)

    def codegen(context, builder, sig, args):
        def rows(k):
            index = (
                builder.add(args[k + 1], builder.mul(args[k + 2], ir.Constant(args[2].type, r))) for r in range(16)
            )
            return [_address(context, builder, sig.args[k], args[k], i, vec.llvm) for i in index]

        columns = _transpose(builder, [_read(builder, pointer) for pointer in rows(0)])
        for column, pointer in zip(columns, rows(3), strict=True):
            _write(builder, column, pointer)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), codegen


@inline
def load_columns(source, kind, starts, n, target, stride, page):
    """Weights of 16 lanes, lane k from index starts[k] on: target[i * stride + k] for i < n (a multiple of 16).

    ``page``: float32 scratch of 256.
    """
    for i in range(0, n, 16):
        for k in range(16):
            store(page, 16 * k, load_weights(source, kind, starts[k] + i, 16))
        transpose(page, 0, 16, target, i * stride, stride)


@intrinsic(prefer_literal=True)
def scratch(tyctx, count, size, dtype):
    """count * size elements on the stack, on a cache line; both are literals or module constants.

    A vector that straddles two lines loads at half the speed. Kernels have no runtime to allocate arrays (see _JIT).
    """
    array = types.Array(dtype.dtype, 1, "C")
    n, width = count.literal_value * size.literal_value, _ELEMENTS.get(dtype.dtype, ir.IntType(64))

    def codegen(context, builder, sig, args):
        room = cgutils.alloca_once(builder, ir.ArrayType(width, n))
        room.align = 64
        made = context.make_array(array)(context, builder)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(width))
        shape, strides = [context.get_constant(types.intp, n)], [itemsize]
        data = builder.bitcast(room, width.as_pointer())
        # Where the address comes from is hidden from LLVM: it would take seconds to follow every store to the stack.
        data = builder.asm(ir.FunctionType(data.type, [data.type]), "", "=r,0", [data], True)
        arrayobj.populate_array(made, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
        return made._getvalue()

    return array(count, size, dtype), codegen
