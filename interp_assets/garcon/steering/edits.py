"""Edits of a text that is being written act in every forward on the positions that are new in it, as they would if all were computed again.

A forward computes some columns of a batch whose rows are padded on the left: the whole prompt at first, then one column for each token. What an
edit reaches is a mask over all columns so far, and at a point only those are written that stand there: the new ones, but at keys and values all
that the cache still holds, because a cache keeps what stood there before the writes.

At a point, in this order: frozen rows take what the row without edits has; latents of SAEs are read; the writes, as listed; what the latents
then read. So an edit's own answer tells what it did to the very text: how far it moved the activations, its latents before and after, and how
much of them its SAE explains (FVU). Edits of one SAE on different rows, as in a dose curve, are one write: many strengths cost what one does.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Effect
from interp_assets.garcon.features import SCANNED_ROWS, AttachedSae, check_latents, encode_part
from interp_assets.garcon.parts import Part
from interp_assets.garcon.plan import Edit, GeneratePlan, LatentsRead, SaeAdd, SaeClamp, When
from interp_assets.garcon.points import BY_HEAD, HookPoint, find_point, n_heads, point_shape
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.taps import Tap, order_of
from interp_assets.garcon.writes import Beside, apply_write


class Batch(NamedTuple):
    """Which rows a forward has, and which columns."""

    own: Tensor
    """[rows]: the continuation that each belongs to."""
    is_edited: Tensor
    """[rows] bool."""
    twins: Tensor
    """[rows]: the row that has the same tokens without edits; itself where there is none."""
    is_token: Tensor
    """[rows, columns so far]: False on padding."""
    is_special: Tensor
    """[rows, columns so far]: special tokens, which FVU leaves out."""
    n_new: int
    """Columns that this forward computes."""


class _Read:
    """Of one SAE: latents that edits ask for, in this forward, and what FVU needs, over all."""

    def __init__(self, attached: AttachedSae, wanted: Sequence[int]) -> None:
        self.attached, self.wanted = attached, list(wanted)
        self.latents = torch.empty(0)
        """[rows, new columns, wanted]."""
        self.x_hat = torch.empty(0)
        self.is_counted = torch.empty(0)
        self.n, self.squared_error, self.squares = 0, 0.0, 0.0
        self.sum = torch.zeros(1, dtype=torch.float64)

    def measure(self, x: Tensor, x_hat: Tensor) -> None:
        wide = x.flatten(1).double()
        self.n += len(x)
        self.squared_error += float((wide - x_hat).square().sum())
        self.squares += float(wide.square().sum())
        self.sum = self.sum + wide.sum(0).cpu()

    @property
    def fvu(self) -> float:
        deviation = self.squares - float(self.sum.square().sum()) / max(1, self.n)
        return self.squared_error / deviation if self.n > 1 and deviation > 1e-12 * self.squares else float("nan")


class _Group:
    """Edits of a point that are made at once: one of any kind, or writes by one SAE on rows that differ."""

    def __init__(self, edits: Sequence[tuple[int, Edit]], row_of: Tensor, *, is_first: bool) -> None:
        """`row_of` says which of the edits is on a continuation, -1 for none; `is_first`, that nothing was written on its rows before."""
        self.edits, self.row_of, self.is_first = edits, row_of, is_first
        self.write = edits[0][1].write
        sae_write = isinstance(self.write, SaeClamp | SaeAdd)
        self.sae = self.write.sae if isinstance(self.write, SaeClamp | SaeAdd) else ""
        n_latents = len(self.write.latents) if isinstance(self.write, SaeClamp | SaeAdd) else 0
        self.latents = torch.tensor([edit.write.latents for _, edit in edits] if sae_write else [], dtype=torch.int64)  # type: ignore[union-attr]
        self.values = torch.tensor([edit.write.values for _, edit in edits] if sae_write else [])  # type: ignore[union-attr]
        self.directions = torch.empty(0)
        self.n, self.moved = torch.zeros(len(row_of)), torch.zeros(len(row_of))
        self.before, self.after = torch.zeros(len(row_of), n_latents), torch.zeros(len(row_of), n_latents)
        self.places: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        """Rows and new columns that were written in this forward."""

    def add(self, own: Tensor, moved: Tensor) -> None:
        """Count places of continuations, and how far each was moved."""
        self.n.index_add_(0, own, torch.ones(len(own)))
        self.moved.index_add_(0, own, moved.float().cpu())

    def effect(self, place: int) -> Effect:
        """Return what one of the edits did."""
        n = torch.where(self.row_of == place, self.n, 0.0)
        moved, before, after = (torch.where(n > 0, sums / n, torch.nan) for sums in (self.moved, self.before.mT, self.after.mT))
        return Effect(n.long(), moved, before.mT, after.mT)


class Editor:
    """The edits of a plan over the forwards of one generation."""

    def __init__(self, subject: SubjectModel, plan: GeneratePlan, beside: Beside) -> None:
        """Resolve points and SAEs. Raises `InputError` for what the model or an SAE does not have."""
        self._subject, self._net, self._plan, self._beside = subject, subject.net, plan, beside
        self._points: dict[str, HookPoint] = {}
        self._reads: dict[str, _Read] = {}
        self._reads_at: dict[str, list[str]] = {}
        self._conditions: dict[When, Tensor] = {}  # over all columns so far
        edits_at: dict[str, list[int]] = {}
        for index, edit in enumerate(plan.edits):
            for point in self._resolve(edit):
                edits_at.setdefault(point.name, []).append(index)
        self._frozen = {self._at(name).name for name in plan.freeze}
        self._groups = {name: list(self._grouped(name, indices)) for name, indices in edits_at.items()}
        self._told = [torch.empty(0)] * len(plan.latents)
        """Of each SAE whose latents are told: [rows, latents] at the last column of this forward, after the edits."""
        self._told_at: dict[str, list[int]] = {}
        for place, wanted in enumerate(plan.latents):
            self._told_at.setdefault(self._point_of_told(wanted).name, []).append(place)
        self._mask = torch.zeros((len(plan.edits), 0, 0), dtype=torch.bool)
        self._n_met: dict[str, int] = {}

    @property
    def is_idle(self) -> bool:
        """Tell that nothing is ever written."""
        return not self._plan.edits and not self._frozen

    @property
    def crosscoders(self) -> dict[str, tuple[AttachedSae, list[int]]]:
        """The crosscoders that are written, and which of their latents have to be read ahead."""
        return {name: (read.attached, read.wanted) for name, read in self._reads.items() if read.attached.more}

    def take_latents(self, found: Mapping[str, Tensor], rows: Tensor, n_rows: int) -> None:
        """Take latents of crosscoders in the new columns of some rows, [rows, columns, latents], before the forward of all rows."""
        for name, latents in found.items():
            read = self._reads[name]
            read.latents = latents.new_zeros((n_rows, *latents.shape[1:]))
            read.latents[rows.to(latents.device)] = latents

    def extend(self, reached: Tensor) -> None:
        """Take which of the new columns each edit reaches, [edits, rows, columns] bool."""
        self._mask = torch.cat([self._mask, reached], dim=2) if self._mask.numel() else reached

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch."""
        self._mask = self._mask[:, rows]
        self._conditions = {when: fires[rows.to(fires.device)] if fires.numel() else fires for when, fires in self._conditions.items()}

    def taps(self, batch: Batch) -> list[Tap]:
        """Return what is done at every point in the next forward."""
        self._n_met = dict.fromkeys(self._points, 0)
        return [Tap(point, partial(self._meet, point, batch)) for point in self._points.values()]

    def check_met(self) -> None:
        """Raise `InputError` for a point that the last forward did not reach once."""
        for name, count in self._n_met.items():
            if count != 1:
                told = "did not fire in" if count == 0 else "fired more than once in one forward of"
                raise InputError(
                    f"Hook point {name!r} (module {self._points[name].module_path!r}) {told} {self._subject.name}: it cannot be written."
                )

    @property
    def told(self) -> list[list[float]]:
        """The plan's latents in every row at the last column of this forward."""
        return torch.cat(self._told, dim=1).tolist() if self._told else []

    def effects(self) -> list[Effect]:
        """Return what each edit did so far, a crosscoder's at the first of its points."""
        placed = [
            (index, group.effect(place))
            for name, groups in self._groups.items()
            for group in groups
            for place, (index, edit) in enumerate(group.edits)
            if self._at(edit.write.point).name == name
        ]
        return [effect for _, effect in sorted(placed, key=lambda pair: pair[0])]

    def fvu(self) -> dict[str, float]:
        """Return for each SAE that is written what share of the variance over the edited text it does not explain."""
        return {name: read.fvu for name, read in self._reads.items() if read.n}

    def _resolve(self, edit: Edit) -> list[HookPoint]:
        """Return the points that an edit writes at: several of a crosscoder."""
        write, net = edit.write, self._net
        point = self._at(write.point)
        points = [point]
        if write.heads is not None:
            count = n_heads(net, point.kind) if point.kind in (*BY_HEAD, "pattern") else 0
            if not write.heads or not all(0 <= head < count for head in write.heads):
                raise InputError(f"Heads {list(write.heads)} of {point.name!r}: it has {f'heads 0 to {count - 1}' if count else 'no heads'}.")
        if isinstance(write, SaeClamp | SaeAdd):
            attached = self._beside.sae(write.sae)
            own = find_point(net, attached.written_at)
            if own != point or write.heads is not None:
                raise InputError(f"The SAE {write.sae!r} belongs to {own.name!r}, all heads of it; the plan has it at {point.name!r}.")
            points += [self._at(name) for name in attached.more]
            self._read_latents(write.sae, write.latents, point)
        else:
            self._check_vector(write, point)
        if write.when is not None:
            if self._beside.sae(write.when.sae).more:
                raise InputError(f"{write.when.sae!r} is a crosscoder: its latents are known after a forward, so no write can wait for one.")
            for target in points:
                self._read_latents(write.when.sae, (write.when.latent,), target)
            self._conditions[write.when] = torch.empty(0, dtype=torch.bool)
        return points

    def _check_vector(self, write: Any, point: HookPoint) -> None:
        """Raise `InputError` for a tensor that is no vector: a text that is being written has no length yet."""
        given, shape = getattr(write, "value", None), point_shape(self._net, point)
        if given is None or isinstance(given, str) or shape is None:
            return
        trail = tuple(shape[2:]) if write.heads is None else (len(write.heads), *shape[3:])
        if tuple(given.shape) not in (trail, trail[-1:]):
            raise InputError(
                f"What is written at {point.name!r} has shape {list(given.shape)}; while a text is written, one vector for every position is wanted, "
                f"of shape {list(trail)}."
            )

    def _read_latents(self, sae: str, latents: Sequence[int], target: HookPoint) -> None:
        """Have latents read at their SAE's own point, before the writes; those of a crosscoder are read ahead."""
        attached = self._beside.sae(sae)
        check_latents(attached, tuple(latents))
        at = self._at(attached.hook_point)
        if not attached.more and order_of(at.name) > order_of(target.name):
            raise InputError(f"A write at {target.name!r} waits for a latent at {at.name!r}, which a forward reaches later.")
        if sae not in self._reads:
            self._reads[sae] = _Read(attached, ())
            if not attached.more:
                self._reads_at.setdefault(at.name, []).append(sae)
        self._reads[sae].wanted += [latent for latent in latents if latent not in self._reads[sae].wanted]

    def _point_of_told(self, wanted: LatentsRead) -> HookPoint:
        attached = self._beside.sae(wanted.sae)
        check_latents(attached, wanted.latents)
        if attached.more:
            raise InputError(f"{wanted.sae!r} is a crosscoder: its latents are known after a forward. Read them of the whole text, by a trace.")
        return self._at(attached.hook_point)

    def _at(self, name: str) -> HookPoint:
        point = find_point(self._net, name)
        return self._points.setdefault(point.name, point)

    def _grouped(self, name: str, indices: Sequence[int]) -> Iterator[_Group]:
        """Yield the edits of a point in their order, those together that can be made at once."""
        written: set[int] = set()
        pending: dict[int, set[int]] = {}
        for index in [*indices, -1]:
            rows = self._rows_of(index) if index >= 0 else set()
            taken = set().union(*pending.values())
            if pending and (index < 0 or self._kind(index) != self._kind(next(iter(pending))) or taken & rows):
                yield self._make_group(name, pending, is_first=not taken & written)
                written, pending = written | taken, {}
            pending[index] = rows

    def _kind(self, index: int) -> object:
        """Return what edits of one group share; for an edit that stands alone something that no other has."""
        write = self._plan.edits[index].write
        return (write.op, write.sae, len(write.latents)) if isinstance(write, SaeClamp | SaeAdd) and write.when is None else index

    def _rows_of(self, index: int) -> set[int]:
        plan = self._plan
        prompts = plan.edits[index].write.rows
        return {prompt * plan.n + i for prompt in (range(len(plan.rows)) if prompts is None else prompts) for i in range(plan.n)}

    def _make_group(self, name: str, edits: dict[int, set[int]], *, is_first: bool) -> _Group:
        row_of = torch.full((len(self._plan.rows) * self._plan.n,), -1)
        for place, rows in enumerate(edits.values()):
            row_of[sorted(rows)] = place
        group = _Group([(index, self._plan.edits[index]) for index in edits], row_of, is_first=is_first)
        if group.sae:
            attached = self._beside.sae(group.sae)
            W_dec = attached.sae.W_dec
            writes: list[Any] = [edit.write for _, edit in group.edits]
            given = [W_dec[list(write.latents)] if write.along is None else self._beside.tensor(write.along).to(W_dec) for write in writes]
            for write, rows in zip(writes, given, strict=True):
                if rows.shape != (len(write.latents), W_dec.shape[1]):
                    raise InputError(f"Directions at {write.point!r} have shape {list(rows.shape)}; expected {[len(write.latents), W_dec.shape[1]]}.")
            group.directions, group.values = torch.stack(given)[..., self._columns_of(attached, name)], group.values.to(W_dec)
        return group

    def _columns_of(self, attached: AttachedSae, name: str) -> slice:
        """Return which numbers of a decoder row belong to a point."""
        if not attached.more:
            return slice(None)
        names = [self._at(own).name for own in attached.hook_points]
        ends = list(accumulate(self._subject.d_in(own) for own in names))
        place = names.index(name)
        return slice(ends[place] - self._subject.d_in(name), ends[place])

    def _meet(self, point: HookPoint, batch: Batch, value: Tensor) -> Tensor:
        """Do at a point what the edits want there; `value` has the point's own shape."""
        self._n_met[point.name] += 1
        is_pattern = point.kind == "pattern"
        shown = value.transpose(1, 2) if is_pattern else value  # columns stand second
        if shown.ndim < 3 or len(shown) != len(batch.own) or shown.shape[1] > batch.is_token.shape[1]:
            raise InputError(f"Hook point {point.name!r} gives {list(value.shape)} for {len(batch.own)} rows of tokens: it cannot be written.")
        if point.name in self._frozen:
            shown = torch.where(batch.is_edited.to(shown.device).view(-1, *[1] * (shown.ndim - 1)), shown[batch.twins.to(shown.device)], shown)
        for sae in self._reads_at.get(point.name, ()):
            self._read(sae, shown, batch)
        self._measure_targets(point, shown, batch)
        if groups := self._groups.get(point.name):
            shown = shown.clone()
            for group in groups:
                self._write(group, shown, batch)
            for group in groups:
                self._read_after(group, shown, batch)
        for place in self._told_at.get(point.name, ()):
            wanted = self._plan.latents[place]
            self._told[place] = encode_part(self._beside.sae(wanted.sae), shown[:, -1], wanted.latents).cpu()
        return shown.transpose(1, 2) if is_pattern else shown

    def _read(self, name: str, shown: Tensor, batch: Batch) -> None:
        """Read an SAE at its point on the edited rows: latents that edits ask for are kept, and what it makes of the activations."""
        read = self._reads[name]
        new = shown[:, -batch.n_new :]
        rows, columns = _edited_places(batch, new)
        kept, x_hat = [new.new_zeros((0, len(read.wanted)), dtype=torch.float32)], []
        is_written = any(group.sae == name for groups in self._groups.values() for group in groups)
        for part in new[rows, columns].split(SCANNED_ROWS):
            latents = encode_part(read.attached, part, None)
            kept.append(latents[:, read.wanted])
            if is_written:
                x_hat.append(read.attached.sae.reconstruct(part.flatten(1).float(), latents))
        read.latents = new.new_zeros((*new.shape[:2], len(read.wanted)), dtype=torch.float32)
        read.latents[rows, columns] = torch.cat(kept)
        read.x_hat = torch.cat(x_hat) if x_hat else torch.empty(0)
        read.is_counted = ~batch.is_special[:, -batch.n_new :].to(new.device)[rows, columns]
        for when, fires in self._conditions.items():
            if when.sae == name:
                now = read.latents[..., read.wanted.index(when.latent)] > when.above
                self._conditions[when] = torch.cat([fires, now], dim=1) if fires.numel() else now

    def _measure_targets(self, point: HookPoint, shown: Tensor, batch: Batch) -> None:
        """Compare what SAEs made of the activations with what arrives where they are written."""
        for read in self._reads.values():
            if len(read.x_hat) and find_point(self._net, read.attached.written_at) == point:
                new = shown[:, -batch.n_new :]
                read.measure(new[_edited_places(batch, new)][read.is_counted], read.x_hat[read.is_counted])
                read.x_hat = torch.empty(0)

    def _write(self, group: _Group, shown: Tensor, batch: Batch) -> None:
        """Make the edits of a group in place, and count what they do to the new columns."""
        first = batch.is_token.shape[1] - shown.shape[1]
        reached = self._mask[[index for index, _ in group.edits], :, first:].any(0).to(shown.device)
        if group.write.when is not None:
            reached = reached & self._conditions[group.write.when][:, first:].to(shown.device)
        rows, columns = reached.nonzero(as_tuple=True)
        now = shown[rows, columns]
        if group.sae:
            shown[rows, columns] = self._moved(group, now, rows, columns, batch, is_new_alone=shown.shape[1] == batch.n_new)
        elif len(rows):
            apply_write(group.write, _make_part(group.write, rows, columns), shown, self._beside, {})
        n_old = max(0, shown.shape[1] - batch.n_new)
        is_new = columns >= n_old
        rows, columns, now = rows[is_new], columns[is_new], now[is_new].flatten(1)
        change = (shown[rows, columns].flatten(1) - now).norm(dim=1) / now.norm(dim=1).clamp_min(1e-30)
        group.add(batch.own[rows.cpu()], change)
        group.places = (rows, columns - n_old)

    def _moved(self, group: _Group, now: Tensor, rows: Tensor, columns: Tensor, batch: Batch, *, is_new_alone: bool) -> Tensor:
        """Return activations moved along the directions of a group, by its values or from what the latents are to these."""
        read = self._reads[group.sae]
        which = group.row_of[batch.own[rows.cpu()]].to(now.device)
        change = group.values.to(now.device)[which]
        if isinstance(group.write, SaeClamp):
            is_read = is_new_alone and (group.is_first or read.attached.is_read_elsewhere)
            if not is_read and read.attached.is_read_elsewhere:
                kind = "transcoder" if read.attached.is_transcoder else "crosscoder"
                where = ", ".join(read.attached.hook_points if read.attached.more else (read.attached.written_at,))
                raise InputError(f"The {kind} {group.sae!r} is written at {where}, which a cache keeps: it cannot be clamped.")
            change = change - (self._latents(group, rows, columns, which) if is_read else _encode(read.attached, now, group.latents[which.cpu()]))
        moved = torch.einsum("pl,pld->pd", change, group.directions.to(now.device)[which])
        return now + moved.to(now.dtype).reshape(now.shape)

    def _latents(self, group: _Group, rows: Tensor, columns: Tensor, which: Tensor) -> Tensor:
        """Return what the latents of a group read in this forward, [places, latents]."""
        read = self._reads[group.sae]
        index = torch.tensor([[read.wanted.index(latent) for latent in latents] for latents in group.latents.tolist()], device=rows.device)
        return read.latents[rows, columns].gather(1, index[which])

    def _read_after(self, group: _Group, shown: Tensor, batch: Batch) -> None:
        """Read the latents of a group before all writes of the point, and after them."""
        rows, columns = group.places
        if not group.sae or not len(rows):
            return
        read, own = self._reads[group.sae], batch.own[rows.cpu()]
        which = group.row_of[own].to(rows.device)
        group.before.index_add_(0, own, self._latents(group, rows, columns, which).cpu())
        now = shown[:, -batch.n_new :][rows, columns]
        nothing = torch.full((len(rows), group.latents.shape[1]), torch.nan)
        group.after.index_add_(0, own, nothing if read.attached.is_read_elsewhere else _encode(read.attached, now, group.latents[which.cpu()]).cpu())


def _encode(attached: AttachedSae, rows: Tensor, latents: Tensor) -> Tensor:
    """Return some latents of each row, [places, latents]."""
    parts = zip(rows.split(SCANNED_ROWS), latents.to(rows.device).split(SCANNED_ROWS), strict=True)
    return torch.cat([encode_part(attached, part, None).gather(1, wanted) for part, wanted in parts])


def _edited_places(batch: Batch, new: Tensor) -> tuple[Tensor, Tensor]:
    places = (batch.is_token[:, -new.shape[1] :] & batch.is_edited[:, None]).to(new.device)
    rows, columns = places.nonzero(as_tuple=True)
    return rows, columns


def _make_part(write: Any, rows: Tensor, columns: Tensor) -> Part:
    """Return the places of a write that all take one vector."""
    places: dict[int, list[int]] = {}
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        places.setdefault(row, []).append(column)
    return Part(
        chosen=tuple(places),
        places=tuple(places.values()),
        heads=write.heads,
        is_single=False,
        is_whole=False,
        is_pattern=write.point.partition(".")[0] == "pattern",
        row_lengths=(),
    )
