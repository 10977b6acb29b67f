"""Latents of crosscoders while a text is written: known only when a forward has reached the last of their points, so that an unedited one goes ahead.

Before every forward of the edited rows, the same tokens run without the edits, with a cache of their own; what all points of a crosscoder read there
is encoded side by side. These are the latents that `crosscoders.py` takes from its first forward: those of the text without the plan's writes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interp_assets.garcon.crosscoders import encode_side_by_side
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.points import find_point
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.taps import Tap, tapped


class Ahead:
    """The unedited forwards of one generation, over the rows that are edited."""

    def __init__(self, subject: SubjectModel, coders: Mapping[str, AttachedSae]) -> None:
        """Take crosscoders by name."""
        self._subject, self._coders = subject, coders
        self._cache: Any = None

    def read(self, make_arguments: Callable[[Any], dict[str, Any]], n_new: int) -> dict[str, Tensor]:
        """Run the new columns, and return all latents of each crosscoder, [rows, columns, latents]; arguments are made for a cache."""
        seen: dict[str, Tensor] = {}
        names = dict.fromkeys(name for attached in self._coders.values() for name in attached.hook_points)
        taps = [Tap(find_point(self._subject.net, name), partial(_keep, seen, name, n_new)) for name in names]
        net: Any = self._subject.net
        with tapped(net, taps, n_new), torch.no_grad():
            self._cache = net(**make_arguments(self._cache)).past_key_values
        return {name: encode_side_by_side(attached, seen) for name, attached in self._coders.items()}

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows."""
        self._cache.batch_select_indices(rows.to(self._subject.device))


def _keep(seen: dict[str, Tensor], name: str, n_new: int, value: Tensor) -> Tensor:
    seen[name] = value[:, -n_new:].clone()  # keys and values come with those that the cache holds
    return value
