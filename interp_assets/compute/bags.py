"""Bags of table rows become their weighted sums, or the products of their rows with one vector each, compiled to vector instructions.

What a sparse step does with its pairs is reading rows of a table (decoder, gradient, batch) in an order that no cache likes: a row of 512
float32 values is 2 KiB, the table 8 MiB or more, and each loop waits for memory, 37 ns a pair on 2 cores. So

    1. `pack` copies the table into strips of 32 columns `[strip, row, 32]`: those of 4,096 rows are 512 KiB and stay in the second-level cache
    2. each loop goes strip by strip through all bags, a bag's sums in two to four vector registers

which takes 12 to 17 ns a pair and loop with 4,096 rows in the table, 20 to 40 with 16,384. Strips that are not copied win nothing: their lines
fall on an eighth of the cache; but where few pairs name each row, copying takes longer than it saves, and loops see the table itself as strips.
The innermost loops are written out as vector instructions (`interp_assets/compute/vectors.py`).

Every bag is summed in one order, on one thread. The loops over bags are called by `loops.over_bags`.
"""

from typing import Any, Final

from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from interp_assets.compute.compiled import reordered
from interp_assets.compute.vectors import LANES, Code, number

STRIP: Final = 32
"""Columns of a strip: two vectors. 64 are 10% faster with 4,096 rows in the table, and a third slower with 16,384."""
_VECTORS: Final = STRIP // LANES
_AT_ONCE: Final = 4
"""Pairs in flight, so that additions need not wait for each other."""


def is_packable(*tables: Tensor) -> bool:
    """Tell whether tables consist of whole strips."""
    return all(table.shape[1] % STRIP == 0 for table in tables)


def see_strips(table: Tensor) -> Tensor:
    """View a table as strips `[strip, row, 32]`."""
    return table.view(len(table), table.shape[1] // STRIP, STRIP).transpose(0, 1)


def pack(table: Tensor, out: Tensor) -> Tensor:
    """Copy a table into strips; `out` is as large."""
    return out.view(table.shape[1] // STRIP, len(table), STRIP).copy_(see_strips(table))


@reordered
def sum_bags(index: Any, weights: Any, strips: Any, out: Any, starts: Any, first: Any, last: Any) -> None:
    """Add to each bag's row of `out` the weighted rows of the table that it names."""
    for strip in range(len(strips)):
        for bag in range(first, last):
            _sum_strip(strips, index, weights, out, (strip, bag, starts[bag], starts[bag + 1]))


@reordered
def sum_bags_twice(index: Any, weights: Any, strips: Any, outs: Any, starts: Any, first: Any, last: Any) -> None:
    """Do the same for two weights of each pair."""
    for strip in range(len(strips)):
        for bag in range(first, last):
            _sum_strip(strips, index, weights[0], outs[0], (strip, bag, starts[bag], starts[bag + 1]))
            _sum_strip(strips, index, weights[1], outs[1], (strip, bag, starts[bag], starts[bag + 1]))


@reordered
def dot_bags(index: Any, strips: Any, grad: Any, out: Any, starts: Any, first: Any, last: Any) -> None:
    """Add to `out` the product of each pair's row of the table with its bag's row of `grad`."""
    for strip in range(len(strips)):
        for bag in range(first, last):
            _dot_strip(strips, index, grad, out, (strip, bag, starts[bag], starts[bag + 1]))


@reordered
def dot_bags_twice(index: Any, strips: Any, grads: Any, outs: Any, starts: Any, first: Any, last: Any) -> None:
    """Do the same for two gradients."""
    for strip in range(len(strips)):
        for bag in range(first, last):
            _dot_strip(strips, index, grads[0], outs[0], (strip, bag, starts[bag], starts[bag + 1]))
            _dot_strip(strips, index, grads[1], outs[1], (strip, bag, starts[bag], starts[bag + 1]))


def _write_sum(typing: Any, table: Any, index: Any, weights: Any, out: Any, place: Any) -> Any:  # noqa: ARG001
    """Add to one strip of one row of `out` the weighted rows that its pairs name; `place` is strip, bag, first and last pair."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code, place = Code(context, builder), cgutils.unpack_tuple(builder, values[4])
        rows, indices, factors, target = (
            _strips(code, builder, signature, values, place[0]),
            code.data(signature, values, 1),
            code.data(signature, values, 2),
            _row(code, builder, signature, values, (3, *place[:2])),
        )
        sums = [code.variables([code.load(target, j) for j in range(_VECTORS)]), code.variables([code.zero()] * _VECTORS)]

        def add(pairs: list[Any]) -> None:
            for i, pair in enumerate(pairs):
                row, factor = _pick(code, builder, rows, indices, pair), code.splat(builder.load(code.after(factors, pair)))
                for j, variable in enumerate(sums[i % 2]):
                    builder.store(code.fma(factor, code.load(row, j), builder.load(variable)), variable)

        code.for_each(place[2], place[3], _AT_ONCE, add)
        for j in range(_VECTORS):
            code.save(builder.fadd(builder.load(sums[0][j]), builder.load(sums[1][j])), target, j)
        return context.get_dummy_value()

    return types.void(table, index, weights, out, place), generate


def _write_dot(typing: Any, table: Any, index: Any, grad: Any, out: Any, place: Any) -> Any:  # noqa: ARG001
    """Add to `out` of each pair the product of one strip of its row and of the bag's row of `grad`; `place` as above."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code, place = Code(context, builder), cgutils.unpack_tuple(builder, values[4])
        rows, indices, vector, target = (
            _strips(code, builder, signature, values, place[0]),
            code.data(signature, values, 1),
            _row(code, builder, signature, values, (2, *place[:2])),
            code.data(signature, values, 3),
        )
        factors = [code.load(vector, j) for j in range(_VECTORS)]

        def add(pairs: list[Any]) -> None:
            products = []
            for pair in pairs:
                row = _pick(code, builder, rows, indices, pair)
                product = builder.fmul(factors[0], code.load(row, 0))
                for j in range(1, _VECTORS):
                    product = code.fma(factors[j], code.load(row, j), product)
                products.append(product)
            place = code.bitcast(code.after(target, pairs[0]), len(pairs))
            builder.store(builder.fadd(builder.load(place, align=4), code.sum_lanes(products)), place, align=4)

        code.for_each(place[2], place[3], _AT_ONCE, add)
        return context.get_dummy_value()

    return types.void(table, index, grad, out, place), generate


_sum_strip: Any = intrinsic(_write_sum)
_dot_strip: Any = intrinsic(_write_dot)


def _row(code: Code, builder: Any, signature: Any, values: Any, place: tuple[int, Any, Any]) -> Any:
    """Return the pointer to a strip of a row of a plain table; `place` is the argument, strip and row."""
    width = cgutils.unpack_tuple(builder, code.array(signature, values, place[0]).shape)[1]
    return code.after(code.data(signature, values, place[0]), builder.add(builder.mul(place[2], width), builder.mul(place[1], number(STRIP))))


def _strips(code: Code, builder: Any, signature: Any, values: Any, strip: Any) -> Any:
    """Return the pointer to a strip of the table, which is the first argument, and the step from row to row."""
    step, row, _ = code.steps(signature, values, 0)
    return code.after(code.data(signature, values, 0), builder.mul(strip, step)), row


def _pick(code: Code, builder: Any, strips: Any, indices: Any, pair: Any) -> Any:
    """Return the pointer to the row of a strip that a pair names."""
    return code.after(strips[0], builder.mul(builder.load(code.after(indices, pair)), strips[1]))
