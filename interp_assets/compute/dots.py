"""Two rows become their product, summed in one fixed order: the value of a pre-activation, whatever found out that it matters.

Libraries sum in an order that depends on the shape of a matrix, the number of threads and the processor. Here each of 64 chains of fused
multiplications and additions takes every 64th value, the chains are added as a tree, and what is left of a row that is no multiple of 64 comes
last. So a value is a function of its two rows alone. About 15 ns for 512 dimensions in the cache.

For loops that are `compiled` only: in a `reordered` one Numba lets LLVM add in any order, here too.
"""

from typing import Any, Final

from numba.core import types
from numba.extending import intrinsic

from interp_assets.compute.vectors import LANES, Code, number

_CHAINS: Final = 4
_STEP: Final = LANES * _CHAINS


def rounding(d: int) -> float:
    """Return by how much `dot` of `d` values may be wrong at most, relative to the product of the rows' norms (Higham 2002, eq. 3.5)."""
    return of_roundings(d // _STEP + _CHAINS.bit_length() + LANES.bit_length() + d % _STEP)


def of_roundings(n: int) -> float:
    """Return by how much `n` roundings to float32 in a row change a value at most, relative to it (Higham 2002, lemma 3.1)."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def _write_dot(typing: Any, a: Any, i: Any, b: Any, j: Any, n: Any) -> Any:  # noqa: ARG001
    """Multiply `a[i : i + n]` and `b[j : j + n]`, flat arrays of float32."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = Code(context, builder)
        left, right = code.after(code.data(signature, values, 0), values[1]), code.after(code.data(signature, values, 2), values[3])
        whole = builder.sub(values[4], builder.urem(values[4], number(_STEP)))
        chains, rest = code.variables([code.zero()] * _CHAINS), code.variables([code.lane(code.zero(), 0)])[0]

        def add(starts: list[Any]) -> None:
            for k, chain in enumerate(chains):
                x, y = (code.load(code.after(row, builder.mul(starts[0], number(_STEP))), k) for row in (left, right))
                builder.store(code.fma(x, y, builder.load(chain)), chain)

        def add_one(places: list[Any]) -> None:
            x, y = (builder.load(code.after(row, places[0])) for row in (left, right))
            builder.store(code.fma(x, y, builder.load(rest)), rest)

        code.for_each(number(0), builder.udiv(whole, number(_STEP)), 1, add)
        code.for_each(whole, values[4], 1, add_one)
        sums = [builder.load(chain) for chain in chains]
        total = code.sum_lanes([builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))])
        return builder.fadd(code.lane(total, 0), builder.load(rest))

    return types.float32(a, i, b, j, n), generate


def _write_prefetch(typing: Any, a: Any, i: Any, n: Any) -> Any:  # noqa: ARG001
    """Ask for `a[i : i + n]`, so that it is in the cache when it is multiplied."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = Code(context, builder)
        row = code.after(code.data(signature, values, 0), values[1])
        code.for_each(number(0), builder.udiv(values[2], number(LANES)), 1, lambda lines: code.prefetch(row, builder.mul(lines[0], number(LANES))))
        return context.get_dummy_value()

    return types.void(a, i, n), generate


dot: Any = intrinsic(_write_dot)
prefetch: Any = intrinsic(_write_prefetch)
