"""Rows, positions and heads of an operation become index arrays, by which a part of an activation is taken out, replaced, and compared.

Positions stand second in everything that comes here, patterns included (their queries). A position counts in its own row, from the end if
negative, and padding is none: so rows of unequal length are read and written as if each were alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from interp_assets.errors import InputError
from interp_assets.garcon.plan import Positions, Span
from interp_assets.garcon.points import BY_HEAD, HookPoint, n_heads


class Part(NamedTuple):
    """Places of an activation: which rows and positions, and which heads of each."""

    chosen: tuple[int, ...]
    """Rows, each with its places one after the other."""
    places: tuple[Sequence[int], ...]
    """Positions in each of them."""
    heads: tuple[int, ...] | None
    is_single: bool
    """One position, given as a number: the axis is taken away."""
    is_whole: bool
    """Every row, position and head, and no padding."""
    is_pattern: bool
    """Whoever reads and gives it has its heads before its queries."""
    row_lengths: tuple[int, ...]
    """Tokens of each row of the plan."""
    column: int | None = None
    """The position that is the same in every row, of every head: then no index is made, which on a GPU would have to be sent there. Else None."""

    @property
    def rows(self) -> list[int]:
        """Row of each place."""
        return [row for row, places in zip(self.chosen, self.places, strict=True) for _ in places]

    @property
    def positions(self) -> list[int]:
        """Position of each place in its row."""
        return [place for places in self.places for place in places]

    @property
    def counts(self) -> list[int]:
        """Places of each row, in the order of the rows."""
        return list(map(len, self.places))

    def select(self, shown: Tensor) -> Tensor:
        """Return the part as [places, ...]."""
        if self.is_whole:
            return shown.flatten(0, 1)
        if self.column is not None:
            return shown[:, self.column]
        rows, positions, heads = self._indices(shown)
        return shown[rows, positions] if heads is None else shown[rows[:, None], positions[:, None], heads]

    def take(self, shown: Tensor) -> Tensor:
        """Return a copy of the part as [rows, positions, ...], without positions for a single one; rows with fewer end in zeros."""
        if self.is_whole:
            return self._turned(shown.clone())
        chosen = self.select(shown)
        return chosen.clone() if self.is_single else self._turned(self.arrange(chosen).clone())

    def arrange(self, chosen: Tensor) -> Tensor:
        """Return [places, ...] as [rows, positions, ...]; rows with fewer end in zeros."""
        counts = self.counts
        most = max(counts)
        if min(counts) == most:
            return chosen.unflatten(0, (len(counts), most))
        padded = chosen.new_zeros((len(counts), most, *chosen.shape[1:]))
        padded[self._inside().to(padded.device)] = chosen
        return padded

    def put(self, shown: Tensor, replacement: Tensor) -> None:
        """Write [places, ...] into an activation."""
        if self.is_whole:
            shown.copy_(replacement.reshape(shown.shape))
            return
        if self.column is not None:
            shown[:, self.column] = replacement
            return
        rows, positions, heads = self._indices(shown)
        if heads is None:
            shown[rows, positions] = replacement.to(shown)
        else:
            shown[rows[:, None], positions[:, None], heads] = replacement.to(shown)

    def fit(self, given: Tensor, shown: Tensor, point: str, *, is_vector_enough: bool = False) -> Tensor:
        """Return a given tensor as [places, ...]: it has the part's shape, or the whole activation's, of which the same part is taken.

        Nothing is broadcast, but with `is_vector_enough` one vector (of each head) for all places. Raises `InputError` that names the shapes.
        """
        trail, n_rows = shown.shape[2:] if self.heads is None else (len(self.heads), *shown.shape[3:]), len(self.places)
        own = (n_rows, *trail) if self.is_single else (n_rows, max(self.counts), *trail)
        if n_rows == 1 and given.ndim == len(own) - 1:
            given = given[None]
        turned = self._turned(given) if given.ndim == shown.ndim else given
        if tuple(turned.shape) == tuple(own):
            return (turned if self.is_single else turned[self._inside().to(turned.device)]).to(shown)
        if tuple(turned.shape) == tuple(shown.shape):
            return self.select(turned).to(shown)
        if tuple(turned.shape) == (n_rows, *shown.shape[1:]):  # the whole point, of these rows alone
            return self._replace(chosen=tuple(range(n_rows))).select(turned).to(shown)
        vectors = (tuple(trail), tuple(trail[-1:])) if is_vector_enough else ()
        if tuple(given.shape) in vectors:
            return given.to(shown).expand(len(self.rows), *trail)
        allowed = [own if len(own) != shown.ndim else self._natural(own), self._natural(shown.shape), *vectors]
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(tuple(shape) for shape in allowed))
        raise InputError(f"What is written at {point!r} has shape {list(given.shape)}; expected {wanted}. Nothing is broadcast.")

    def row_means(self, shown: Tensor) -> Tensor:
        """Return, for every place, the mean over its row's positions."""
        means = torch.stack([shown[row, :length].mean(0) for row, length in enumerate(self.row_lengths)])[list(self.rows)]
        return means if self.heads is None else means[:, list(self.heads)]

    def _indices(self, shown: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, positions = (torch.tensor(index, device=shown.device) for index in (self.rows, self.positions))
        return rows, positions, None if self.heads is None else torch.tensor(self.heads, device=shown.device)[None, :]

    def _inside(self) -> Tensor:
        counts = torch.tensor(self.counts)
        return torch.arange(int(counts.max()))[None, :] < counts[:, None]

    def _turned(self, value: Tensor) -> Tensor:
        return value.transpose(1, 2) if self.is_pattern else value

    def _natural(self, shape: Sequence[int]) -> Sequence[int]:
        return (shape[0], shape[2], shape[1], *shape[3:]) if self.is_pattern else shape


def find_part(net: PreTrainedModel, point: HookPoint, at: Any, lengths: Sequence[int]) -> Part:
    """Resolve `rows`, `pos` and `heads` of an operation. Raises `InputError` for what lies outside, is empty, or has no heads."""
    rows: Sequence[int] = range(len(lengths)) if at.rows is None else at.rows
    heads = None
    if at.heads is not None:
        has_heads = point.kind in (*BY_HEAD, "pattern")
        count = n_heads(net, point.kind) if has_heads else 0
        if not has_heads:
            raise InputError(f"Hook point {point.name!r} has no heads: leave `heads` out, or name z.L, q.L, k.L, v.L or pattern.L.")
        if not at.heads or not all(0 <= head < count for head in at.heads) or len(set(at.heads)) != len(at.heads):
            raise InputError(f"Heads {list(at.heads)} of {point.name!r}: it has heads 0 to {count - 1}, each named once.")
        heads = tuple(at.heads)
    places = [_resolve(at.pos, lengths[row], row, point.name) for row in rows]
    is_single, is_all = isinstance(at.pos, int), at.rows is None and heads is None
    return Part(
        chosen=tuple(rows),
        places=tuple(places),
        heads=heads,
        is_single=is_single,
        is_whole=is_all and at.pos is None and min(lengths) == max(lengths),
        is_pattern=point.kind == "pattern",
        row_lengths=tuple(lengths),
        column=places[0][0] if is_single and is_all and places.count(places[0]) == len(places) else None,
    )


def _resolve(pos: Positions, length: int, row: int, point: str) -> Sequence[int]:
    if pos is None:
        return range(length)
    if isinstance(pos, Span):
        found = range(length)[slice(pos.start, pos.stop, pos.step)]
        if not found:
            raise InputError(f"Positions {pos.start}:{pos.stop}:{pos.step} at {point!r} are none of the {length} of row {row}.")
        return found
    wanted = [pos] if isinstance(pos, int) else list(pos)
    found = [place + length if place < 0 else place for place in wanted]
    if not found or not all(0 <= place < length for place in found) or len(set(found)) != len(found):
        raise InputError(f"Positions {wanted} at {point!r}: row {row} has {length} tokens, each named once.")
    return found
