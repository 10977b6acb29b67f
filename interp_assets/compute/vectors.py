"""Innermost loops become vector instructions that are written out, because compilers do not keep sums in registers over loops of unknown length.

`Code` writes LLVM instructions for vectors of 16 float32 values into a Numba intrinsic; LLVM splits them where a processor has narrower ones,
so the order of the sums, and with it every bit of the results, is the same on all of them.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils

LANES: Final = 16
_VALUE_BYTES: Final = 4
_FLOAT: Final = ir.FloatType()
_INDEX: Final = ir.IntType(64)
_PLACE: Final = ir.IntType(32)
VECTOR: Final = ir.VectorType(_FLOAT, LANES)


class Code:
    """Writes vector instructions."""

    def __init__(self, context: Any, builder: Any) -> None:
        """Write with what Numba hands to an intrinsic."""
        self._context, self._builder = context, builder

    def data(self, signature: Any, values: Any, place: int) -> Any:
        """Return the pointer to the first element of an argument that is an array."""
        return self.array(signature, values, place).data

    def array(self, signature: Any, values: Any, place: int) -> Any:
        """Return an argument that is an array."""
        return self._context.make_array(signature.args[place])(self._context, self._builder, values[place])

    def steps(self, signature: Any, values: Any, place: int) -> list[Any]:
        """Return by how many values an array's neighbours lie apart, dimension by dimension."""
        strides = cgutils.unpack_tuple(self._builder, self.array(signature, values, place).strides)
        return [self._builder.udiv(stride, number(_VALUE_BYTES)) for stride in strides]

    def after(self, pointer: Any, n: Any) -> Any:
        """Return the pointer `n` values further."""
        return self._builder.gep(pointer, [n])

    def zero(self) -> Any:
        """Return a vector of zeros."""
        return ir.Constant(VECTOR, [0.0] * LANES)

    def variables(self, values: list[Any]) -> list[Any]:
        """Return variables with these values; they become registers."""
        found = [cgutils.alloca_once(self._builder, value.type) for value in values]
        for value, variable in zip(values, found, strict=True):
            self._builder.store(value, variable)
        return found

    def bitcast(self, pointer: Any, lanes: int) -> Any:
        """Return a pointer to as many values side by side."""
        return self._builder.bitcast(pointer, ir.VectorType(_FLOAT, lanes).as_pointer())

    def load(self, pointer: Any, j: int) -> Any:
        """Read the j-th vector behind a pointer."""
        return self._builder.load(self.bitcast(self.after(pointer, number(j * LANES)), LANES), align=4)

    def save(self, value: Any, pointer: Any, j: int) -> None:
        """Write the j-th vector behind a pointer."""
        self._builder.store(value, self.bitcast(self.after(pointer, number(j * LANES)), LANES), align=4)

    def splat(self, value: Any) -> Any:
        """Repeat one value in a vector."""
        one = self._builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(_PLACE, 0))
        return self._builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_PLACE, LANES), [0] * LANES))

    def prefetch(self, pointer: Any, n: Any) -> None:
        """Ask for the line of the cache that lies `n` values behind a pointer."""
        target = self._builder.bitcast(self.after(pointer, n), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [target.type, _PLACE, _PLACE, _PLACE])
        function = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0i8")
        self._builder.call(function, [target, *(ir.Constant(_PLACE, value) for value in (0, 3, 1))])

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Multiply and add, with one rounding; for vectors and for single values."""
        name = f"llvm.fma.v{LANES}f32" if a.type == VECTOR else "llvm.fma.f32"
        function = cgutils.get_or_insert_function(self._builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
        return self._builder.call(function, [a, b, c])

    def sum_lanes(self, vectors: list[Any]) -> Any:
        """Return the sums of 1, 2, 4 ... vectors, side by side: neighbours are added until only as many lanes are left."""
        n = len(vectors)
        while len(vectors) > 1:
            vectors = [self._add_neighbours(a, b, LANES) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        lanes, found = LANES, vectors[0]
        while lanes > n:
            lanes //= 2
            found = self._add_neighbours(found, found, lanes)
        return found

    def lane(self, vector: Any, j: int) -> Any:
        """Return one value of a vector."""
        return self._builder.extract_element(vector, ir.Constant(_PLACE, j))

    def for_each(self, first: Any, last: Any, n_at_once: int, act: Callable[[list[Any]], None]) -> None:
        """Act on numbers [first, last), so many at a time, then on the remaining ones alone."""
        builder = self._builder
        whole = builder.sub(last, builder.srem(builder.sub(last, first), number(n_at_once)))
        with cgutils.for_range_slice(builder, first, whole, number(n_at_once)) as (place, _):
            act([builder.add(place, number(i)) for i in range(n_at_once)])
        with cgutils.for_range_slice(builder, whole, last, number(1)) as (place, _):
            act([place])

    def _add_neighbours(self, a: Any, b: Any, lanes: int) -> Any:
        """Add lanes 0 and 1, 2 and 3, ... of two vectors, as if one followed the other; keep so many sums."""
        masks = [ir.Constant(ir.VectorType(_PLACE, lanes), [2 * i + odd for i in range(lanes)]) for odd in (0, 1)]
        return self._builder.fadd(self._builder.shuffle_vector(a, b, masks[0]), self._builder.shuffle_vector(a, b, masks[1]))


def number(value: int) -> Any:
    """Return a constant that counts or indexes."""
    return ir.Constant(_INDEX, value)
