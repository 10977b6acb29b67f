"""Bags of table rows become their weighted sums, or the products of their rows with one vector each, compiled to vector instructions.

What a sparse step does with its pairs is reading rows of a table (decoder, gradient, batch) in an order that no cache likes: a row of 512
float32 values is 2 KiB, the table 8 MiB or more, and each loop waits for memory, 37 ns a pair on 2 cores. So

    1. `pack` copies the table into strips of 32 columns `[strip, row, 32]`: those of 4,096 rows are 512 KiB and stay in the second-level cache
    2. each loop goes strip by strip through all bags, a bag's sums in two to four vector registers

which takes 12 to 17 ns a pair and loop with 4,096 rows in the table, 20 to 40 with 16,384. Strips that are not copied win nothing: their lines
fall on an eighth of the cache; but where few pairs name each row, copying takes longer than it saves, and loops see the table itself as strips.
Compilers do not keep sums in registers over a loop of unknown length, so the innermost loops are written as instructions for LLVM, which splits
vectors of 16 where a processor has narrower ones.

Every bag is summed in one order, on one thread. The loops over bags are called by `loops.over_bags`.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from interp_assets.compiled import reordered

STRIP: Final = 32
"""Columns of a strip: two vectors. 64 are 10% faster with 4,096 rows in the table, and a third slower with 16,384."""
_LANES: Final = 16
_VALUE_BYTES: Final = 4
_VECTORS: Final = STRIP // _LANES
_AT_ONCE: Final = 4
"""Pairs in flight, so that additions need not wait for each other."""
_FLOAT: Final = ir.FloatType()
_VECTOR: Final = ir.VectorType(_FLOAT, _LANES)
_INDEX: Final = ir.IntType(64)


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
        code, place = _Code(context, builder), cgutils.unpack_tuple(builder, values[4])
        rows, indices, factors, target = (
            code.strips(signature, values, place[0]),
            code.data(signature, values, 1),
            code.data(signature, values, 2),
            code.row(signature, values, (3, *place[:2])),
        )
        zero = ir.Constant(_VECTOR, [0.0] * _LANES)
        sums = [code.variables([code.load(target, j) for j in range(_VECTORS)]), code.variables([zero] * _VECTORS)]

        def add(pairs: list[Any]) -> None:
            for i, pair in enumerate(pairs):
                row, factor = code.pick(rows, indices, pair), code.splat(builder.load(builder.gep(factors, [pair])))
                for j, variable in enumerate(sums[i % 2]):
                    builder.store(code.fma(factor, code.load(row, j), builder.load(variable)), variable)

        code.for_each(place[2], place[3], add)
        for j in range(_VECTORS):
            code.save(builder.fadd(builder.load(sums[0][j]), builder.load(sums[1][j])), target, j)
        return context.get_dummy_value()

    return types.void(table, index, weights, out, place), generate


def _write_dot(typing: Any, table: Any, index: Any, grad: Any, out: Any, place: Any) -> Any:  # noqa: ARG001
    """Add to `out` of each pair the product of one strip of its row and of the bag's row of `grad`; `place` as above."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code, place = _Code(context, builder), cgutils.unpack_tuple(builder, values[4])
        rows, indices, vector, target = (
            code.strips(signature, values, place[0]),
            code.data(signature, values, 1),
            code.row(signature, values, (2, *place[:2])),
            code.data(signature, values, 3),
        )
        factors = [code.load(vector, j) for j in range(_VECTORS)]

        def add(pairs: list[Any]) -> None:
            products = []
            for pair in pairs:
                row = code.pick(rows, indices, pair)
                product = builder.fmul(factors[0], code.load(row, 0))
                for j in range(1, _VECTORS):
                    product = code.fma(factors[j], code.load(row, j), product)
                products.append(product)
            place = code.bitcast(builder.gep(target, [pairs[0]]), len(pairs))
            builder.store(builder.fadd(builder.load(place, align=4), code.sum_lanes(products)), place, align=4)

        code.for_each(place[2], place[3], add)
        return context.get_dummy_value()

    return types.void(table, index, grad, out, place), generate


_sum_strip: Any = intrinsic(_write_sum)
_dot_strip: Any = intrinsic(_write_dot)


class _Code:
    """Writes vector instructions."""

    def __init__(self, context: Any, builder: Any) -> None:
        self._context, self._builder = context, builder

    def data(self, signature: Any, values: Any, place: int) -> Any:
        """Return the pointer to the first element of an argument that is an array."""
        return self._array(signature, values, place).data

    def row(self, signature: Any, values: Any, place: tuple[int, Any, Any]) -> Any:
        """Return the pointer to a strip of a row of a plain table; `place` is the argument, strip and row."""
        width = cgutils.unpack_tuple(self._builder, self._array(signature, values, place[0]).shape)[1]
        start = self._builder.add(self._builder.mul(place[2], width), self._builder.mul(place[1], _number(STRIP)))
        return self._builder.gep(self.data(signature, values, place[0]), [start])

    def strips(self, signature: Any, values: Any, strip: Any) -> Any:
        """Return the pointer to a strip of the table, which is the first argument, and the step from row to row."""
        strides = cgutils.unpack_tuple(self._builder, self._array(signature, values, 0).strides)
        step, row = (self._builder.udiv(stride, _number(_VALUE_BYTES)) for stride in strides[:2])
        return self._builder.gep(self.data(signature, values, 0), [self._builder.mul(strip, step)]), row

    def pick(self, strips: Any, indices: Any, pair: Any) -> Any:
        """Return the pointer to the row of a strip that a pair names."""
        index = self._builder.load(self._builder.gep(indices, [pair]))
        return self._builder.gep(strips[0], [self._builder.mul(index, strips[1])])

    def variables(self, values: list[Any]) -> list[Any]:
        """Return variables with these values; they become registers."""
        found = [cgutils.alloca_once(self._builder, _VECTOR) for _ in values]
        for value, variable in zip(values, found, strict=True):
            self._builder.store(value, variable)
        return found

    def bitcast(self, pointer: Any, lanes: int) -> Any:
        """Return a pointer to as many values side by side."""
        return self._builder.bitcast(pointer, ir.VectorType(_FLOAT, lanes).as_pointer())

    def load(self, pointer: Any, j: int) -> Any:
        """Read the j-th vector behind a pointer."""
        return self._builder.load(self.bitcast(self._builder.gep(pointer, [_number(j * _LANES)]), _LANES), align=4)

    def save(self, value: Any, pointer: Any, j: int) -> None:
        """Write the j-th vector behind a pointer."""
        self._builder.store(value, self.bitcast(self._builder.gep(pointer, [_number(j * _LANES)]), _LANES), align=4)

    def splat(self, value: Any) -> Any:
        """Repeat one value in a vector."""
        one = self._builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self._builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Multiply and add, with one rounding."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        function = cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.fma.v{_LANES}f32")
        return self._builder.call(function, [a, b, c])

    def sum_lanes(self, vectors: list[Any]) -> Any:
        """Return the sums of 1, 2, 4 ... vectors, side by side: neighbours are added until only as many lanes are left."""
        n = len(vectors)
        while len(vectors) > 1:
            vectors = [self._add_neighbours(a, b, _LANES) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        lanes, found = _LANES, vectors[0]
        while lanes > n:
            lanes //= 2
            found = self._add_neighbours(found, found, lanes)
        return found

    def _add_neighbours(self, a: Any, b: Any, lanes: int) -> Any:
        """Add lanes 0 and 1, 2 and 3, ... of two vectors, as if one followed the other; keep so many sums."""
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), lanes), [2 * i + odd for i in range(lanes)]) for odd in (0, 1)]
        return self._builder.fadd(self._builder.shuffle_vector(a, b, masks[0]), self._builder.shuffle_vector(a, b, masks[1]))

    def for_each(self, first: Any, last: Any, act: Callable[[list[Any]], None]) -> None:
        """Act on pairs, `_AT_ONCE` at a time, then on the remaining ones alone."""
        builder = self._builder
        whole = builder.sub(last, builder.srem(builder.sub(last, first), _number(_AT_ONCE)))
        with cgutils.for_range_slice(builder, first, whole, _number(_AT_ONCE)) as (pair, _):
            act([builder.add(pair, _number(i)) for i in range(_AT_ONCE)])
        with cgutils.for_range_slice(builder, whole, last, _number(1)) as (pair, _):
            act([pair])

    def _array(self, signature: Any, values: Any, place: int) -> Any:
        return self._context.make_array(signature.args[place])(self._context, self._builder, values[place])


def _number(value: int) -> Any:
    return ir.Constant(_INDEX, value)
