"""Sixteen float32 at a time, in compiled code: a vector type for Numba.

Numba leaves it to LLVM to find vectors in scalar loops; where it must prove first that
arrays do not overlap, or meets exp and log, it gives up. Here the vectors are written
down: `load` and `store` move sixteen neighbours of an array, the arithmetic is that of
LLVM's own `<16 x float>`, which becomes whatever the processor has (one register of
AVX-512, two of AVX2, four of SSE or NEON).

Nothing is checked: offsets must leave room for sixteen numbers.
"""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

Vector: TypeAlias = Any
"""Sixteen numbers, to whom reads the signatures of compiled functions."""

_intrinsic: Any = intrinsic

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class Lanes(types.Type):
    """The type of sixteen float32; it exists inside of compiled code only."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, _FLOATS)


def _define(sign: Any, build: str) -> None:
    """Give two vectors an operator."""

    @infer_global(sign)
    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and all(isinstance(a, Lanes) for a in args):
                return signature(lanes, lanes, lanes)
            return None

    @lower_builtin(sign, Lanes, Lanes)
    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, build)(*args)


for _sign, _build in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_sign, _build)


def _place(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """Return the pointer to an element of a contiguous array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [offset], inbounds=True)


def _vector(builder: Any, place: Any, kind: Any) -> Any:
    return builder.bitcast(place, kind.as_pointer())


@_intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    """Return array[offset : offset + 16] of a one-dimensional float32 array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _place(context, builder, signature.args[0], *args)
        return builder.load(_vector(builder, place, _FLOATS), align=4)

    return lanes(array, types.intp), build


@_intrinsic
def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write sixteen numbers to array[offset : offset + 16]."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _place(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], _vector(builder, place, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), build


@_intrinsic
def accumulate(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Add sixteen numbers to array[offset : offset + 16] of a float64 array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _place(context, builder, signature.args[0], *args[:2])
        place = _vector(builder, place, _DOUBLES)
        wide = builder.fpext(args[2], _DOUBLES)
        total = builder.fadd(builder.load(place, align=8), wide)
        builder.store(total, place, align=8)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), build


@_intrinsic
def fill(typing: Any, number: Any) -> Any:
    """Return sixteen times the same number."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = ir.Constant(ir.IntType(32), 0)
        vector = builder.insert_element(
            ir.Constant(_FLOATS, ir.Undefined), args[0], one
        )
        mask = ir.Constant(_INTS, [0] * LANES)
        return builder.shuffle_vector(vector, ir.Constant(_FLOATS, ir.Undefined), mask)

    return lanes(types.float32), build


def _call(builder: Any, name: str, args: Any) -> Any:
    """Call one of LLVM's own functions on vectors."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
    function = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.{name}.v{LANES}f32"
    )
    return builder.call(function, args)


@_intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, in one step where the processor has one."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "fmuladd", args)

    return lanes(lanes, lanes, lanes), build


@_intrinsic
def magnitude(typing: Any, a: Any) -> Any:
    """Return |a|."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "fabs", args)

    return lanes(lanes), build


@_intrinsic
def where_less(typing: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
    """Return `then` where a < b, and `other` elsewhere: where one is NaN as well."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args[:2]), *args[2:])

    return lanes(lanes, lanes, lanes, lanes), build


@_intrinsic
def power_of_two(typing: Any, shifted: Any) -> Any:
    """Return 2^n from n + 1.5 x 2^23, whose lowest bits are those of n."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _INTS)
        exponent = builder.shl(bits, ir.Constant(_INTS, [23] * LANES))
        one = ir.Constant(_INTS, [127 << 23] * LANES)
        return builder.bitcast(builder.add(exponent, one), _FLOATS)

    return lanes(lanes), build


@njit(forceinline=True)
def exp_of_minus(a: Vector) -> Vector:
    """Return exp(-a) for a >= 0, to 1e-7 of itself; 1.2e-38 from a = 87.3 on.

    exp(-a) = 2^n exp(r) with r between -ln(2)/2 and ln(2)/2, and exp(r) by a
    polynomial of degree 6. NaN stays NaN.
    """
    largest = fill(87.3)
    a = where_less(largest, a, largest, a)
    magic = fill(12582912.0)  # 1.5 x 2^23: what is added to it is rounded
    shifted = fma(a, fill(-1.4426950408889634), magic)
    n = shifted - magic
    # ln(2) as two numbers: n times the first is exact.
    r = fma(n, fill(-0.693359375), fill(0.0) - a)
    r = fma(n, fill(2.12194440e-4), r)
    p = fill(0.00138427)
    p = fma(p, r, fill(0.00837497))
    p = fma(p, r, fill(0.04166806))
    p = fma(p, r, fill(0.16666422))
    p = fma(p, r, fill(0.49999994))
    p = fma(p, r, fill(1.0))
    p = fma(p, r, fill(1.0))
    return p * power_of_two(shifted)


@njit(forceinline=True)
def log_of_one_plus(y: Vector) -> Vector:
    """Return log(1 + y) for y from 0 to 1, to 1e-7 of itself.

    log(1 + y) / y by a polynomial of degree 8. NaN stays NaN.
    """
    p = fill(0.005232623778283596)
    p = fma(p, y, fill(-0.029504956677556038))
    p = fma(p, y, fill(0.07822549343109131))
    p = fma(p, y, fill(-0.1366320699453354))
    p = fma(p, y, fill(0.1910598874092102))
    p = fma(p, y, fill(-0.2484297752380371))
    p = fma(p, y, fill(0.3331909477710724))
    p = fma(p, y, fill(-0.4999949336051941))
    p = fma(p, y, fill(0.9999999403953552))
    return p * y
