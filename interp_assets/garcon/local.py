"""A model that is loaded here answers plans, as `backend.py` has it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from interp_assets.garcon.backend import Answer, PointRow
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.plan import Metric, Plan
from interp_assets.garcon.points import find_point, list_points, point_shape
from interp_assets.garcon.run import run_plan
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.sweep import run_sweep


class LocalBackend:
    """A subject model, the tokenizer that belongs to it, and SAEs by name."""

    def __init__(self, subject: SubjectModel, tokenizer: Any, saes: Mapping[str, AttachedSae] | None = None) -> None:
        """Hold what was loaded."""
        self.subject, self.tokenizer, self.saes = subject, tokenizer, saes or {}

    @cached_property
    def pieces(self) -> Callable[[Sequence[Sequence[int]]], list[list[str]]]:
        """What writes every token of some rows as text."""
        return partial(_write, self.tokenizer)

    def list_points(self) -> list[PointRow]:
        """List the canonical points."""
        net = self.subject.net
        rows = []
        for point in list_points(net, with_refused=True):
            shape = "" if point.refused else str(list(point_shape(net, point) or ())).replace("'", "")
            rows.append(PointRow(point.name, shape, point.module_path, point.alias, point.refused))
        return rows

    def find_point(self, name: str) -> str:
        """Return the canonical name of a point."""
        return find_point(self.subject.net, name).name

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Return the token ids of each text."""
        return [[int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]] for text in texts]

    def run(self, plan: Plan, tensors: Mapping[str, Tensor], *, exact: bool = False, keep: bool = False) -> Answer:
        """Execute a plan: alone, and its answer is kept here anyhow."""
        del exact, keep
        return run_plan(self.subject, plan, tensors, self.saes)

    def sweep(self, row: Sequence[int], names: Sequence[str], source: Mapping[str, Tensor] | str, metric: Metric, by: str) -> tuple[float, Tensor]:
        """Sweep."""
        return run_sweep(self.subject, row, names, source, metric, by)


def _write(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[tokenizer.decode([token]) for token in row] for row in rows]
