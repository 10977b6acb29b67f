"""One latent at many strengths, beside controls, becomes a dose curve: what the feature does that any push of that size would not.

For each strength and prompt a text is written under five arms, all in one batch (`decode.py`), and scored by the model without edits:

    feature    the latent is set to the strength: x + (c - f(x)) d
    other      another live latent of the same firing decile, set to the strength in its own units
    random     a random direction in the place of d, as long, so that every token is moved as far as the latent would move it there
    flip       the opposite direction
    zero       the latent is set to 0, once for all strengths

Outcomes: KL(without edits || with edits) and perplexity under the model without edits over the same text, the share of different pairs of
neighbouring tokens, what the latent reads afterwards, how far the activation moved, and the log probability of tokens that are named. Intervals hold
95% of 1,000 resamplings of the texts; `feature - controls` is paired: a text's outcome less the mean of its other and random ones.
"""

import html
import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from interp_assets.compute.seeds import stream
from interp_assets.errors import InputError
from interp_assets.garcon.backend import Chats, Continuation, Effect, Generated, WritingBackend
from interp_assets.garcon.plan import SaeClamp, name_tensor
from interp_assets.garcon.steering.recipe import Edits
from interp_assets.garcon.steering.texts import Sampling, make_generate_plan
from interp_assets.planning.progress import format_count

ARMS: Final = ("feature", "other", "random", "flip", "zero")
DIFFERENCE: Final = "feature - controls"
_CONTROLS: Final = ("other", "random")
_RESAMPLED: Final = 1000
COLOURS: Final = {"feature": "#d62728", "other": "#1f77b4", "random": "#7f7f7f", "flip": "#2ca02c", "zero": "#9467bd", DIFFERENCE: "#000000"}


class Dosing(Sampling, total=False):
    """How tokens are drawn, and tokens whose log probability is an outcome."""

    metric: Sequence[str | int]


class _Cell(NamedTuple):
    """One arm at one strength."""

    arm: str
    strength: str
    clamp: SaeClamp


class Dose:
    """Outcomes of every text, and their means beside the controls'."""

    def __init__(self, texts: pl.DataFrame, what: str, strengths: Sequence[str], seed: int) -> None:
        """`texts` has one line a text; `what` names the latent."""
        self.texts, self.what, self.strengths, self._seed = texts, what, list(strengths), seed
        self.outcomes = [name for name in texts.columns if name not in ("arm", "strength", "prompt", "continuation", "text")]

    @property
    def numbers(self) -> list[float]:
        """The strengths without their unit."""
        return [float(strength.split()[0].lstrip("q")) for strength in self.strengths]

    def table(self) -> pl.DataFrame:
        """Return one line a strength, arm and outcome: mean and its interval; `feature - controls` is an arm too."""
        lines = []
        for outcome, strength in product(self.outcomes, self.strengths):
            values = {arm: self._values(arm, strength, outcome) for arm in ARMS}
            controls = [values[arm] for arm in _CONTROLS if len(values[arm])]
            if controls:
                values[DIFFERENCE] = values["feature"] - np.mean(controls, axis=0)
            for arm, found in values.items():
                if len(found):
                    low, high = self._interval(found)
                    mean = float(np.mean(found))
                    lines.append({"outcome": outcome, "strength": strength, "arm": arm, "mean": mean, "low": low, "high": high})
        return pl.DataFrame(lines)

    def _values(self, arm: str, strength: str, outcome: str) -> NDArray[np.float64]:
        """Return an outcome of every text, in the order of prompts; `zero` has no strength."""
        chosen = self.texts.filter((pl.col("arm") == arm) & ((pl.col("strength") == strength) | (pl.col("arm") == "zero")))
        return chosen.sort("prompt", "continuation")[outcome].to_numpy()

    def _interval(self, values: NDArray[np.float64]) -> tuple[float, float]:
        draws = stream(self._seed, "bootstrap").generator().integers(0, len(values), (_RESAMPLED, len(values)))
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
        return float(low), float(high)

    def __repr__(self) -> str:
        """Say what it is."""
        return f"{self.what} at {', '.join(self.strengths)}: {self.texts.height} texts of {format_count(len(ARMS), 'arm')}"

    def _repr_html_(self) -> str:
        """Draw one curve an outcome, with intervals. Names are escaped."""
        table = self.table()
        drawn = "".join(_draw(table.filter(pl.col("outcome") == outcome), outcome, self.strengths, self.numbers) for outcome in self.outcomes)
        legend = " ".join(f"<span style='color:{colour}'>&#9632; {arm}</span>" for arm, colour in COLOURS.items())
        return f"<div><b>{html.escape(self.what)}</b> {legend}<br>{drawn}</div>"


def run_dose(backend: WritingBackend, prompts: Chats, edits: Edits, strengths: Sequence[str], options: dict[str, Any]) -> Dose:
    """Write all texts and measure them. Raises `InputError` for a recipe without one clamp, and for strengths that cannot be resolved."""
    clamps = [edit.write for edit in edits.edits if isinstance(edit.write, SaeClamp)]
    if len(clamps) != 1 or len(clamps[0].latents) != 1 or not strengths:
        raise InputError(
            f"A dose curve is of one clamped latent at some strengths; the recipe clamps {len(clamps)}, the strengths are {list(strengths)}."
        )
    return run_doses(backend, prompts, edits, clamps[0].latents, strengths, options)[0]


def run_doses(
    backend: WritingBackend,
    prompts: Chats,
    edits: Edits,
    latents: Sequence[int],
    strengths: Sequence[str],
    options: dict[str, Any],
    arms: Sequence[str] = ARMS,
) -> list[Dose]:
    """Return a dose curve of each latent, under some arms, in the place of the one that the only clamp is of; their texts share batches."""
    (edit,) = [edit for edit in edits.edits if isinstance(edit.write, SaeClamp)]
    clamp: Any = edit.write
    made = [_make_cells(backend, clamp.model_copy(update={"latents": (latent,)}), strengths, options["seed"]) for latent in latents]
    cells = [(latent, cell) for latent, (own, _) in zip(latents, made, strict=True) for cell in own if cell.arm in arms]
    tensors = {**edits.tensors, **{name: vector for _, beside in made for name, vector in beside.items()}}
    n_prompts = len(prompts.rows)
    lines: dict[int, list[dict[str, Any]]] = {latent: [] for latent in latents}
    n_texts = n_prompts * options["n"]
    per_batch = max(1, backend.most_texts // n_texts)
    for first in range(0, len(cells), per_batch):
        batch = cells[first : first + per_batch]
        own = [edit.model_copy(update={"write": cell.clamp.model_copy(update={"rows": _rows_of(i, n_prompts)})}) for i, (_, cell) in enumerate(batch)]
        placed = [placed for other in edits.edits for placed in (own if other is edit else [other])]
        repeated = Chats(prompts.rows * len(batch), prompts.roles * len(batch))
        plan = make_generate_plan(backend, repeated, Edits(tuple(placed), edits.freeze, {}), **options, score=True)
        found = backend.generate(plan, {name.tensor: tensors[name.tensor] for name in plan.tensors()})
        places = [i for i, written in enumerate(plan.edits) if isinstance(written.write, SaeClamp)]
        for i, ((latent, cell), place) in enumerate(zip(batch, places, strict=True)):
            lines[latent] += _measure(cell, found, found.effects[place], i * n_texts, n_prompts, options, backend)
    what = f"of {clamp.sae} at {clamp.point}"
    return [
        Dose(pl.DataFrame(found, infer_schema_length=None), f"Latent {latent} {what}", strengths, options["seed"]) for latent, found in lines.items()
    ]


def _rows_of(cell: int, n_prompts: int) -> tuple[int, ...]:
    return tuple(range(cell * n_prompts, (cell + 1) * n_prompts))


def _make_cells(backend: WritingBackend, clamp: Any, strengths: Sequence[str], seed: int) -> tuple[list[_Cell], dict[str, Any]]:
    """Return every arm at every strength, and the directions that they are written along."""
    latent = clamp.latents[0]
    direction, other = backend.controls(clamp.sae, latent, seed)
    drawn = torch.randn(len(direction), generator=torch.Generator().manual_seed(stream(seed, "dose", "random", latent).torch_seed()))
    along = {"random": (drawn / drawn.norm() * direction.norm())[None], "flip": -direction[None]}
    tensors = {name_tensor(vector).tensor: vector for vector in along.values()}
    cells = []
    for strength in strengths:
        value = (backend.latent_strength(strength, clamp.sae, latent),)
        cells.append(_Cell("feature", strength, clamp.model_copy(update={"values": value})))
        if other is not None:
            values = {"latents": (other,), "values": (backend.latent_strength(strength, clamp.sae, other),)}
            cells.append(_Cell("other", strength, clamp.model_copy(update=values)))
        cells += [_Cell(arm, strength, clamp.model_copy(update={"values": value, "along": name_tensor(vector)})) for arm, vector in along.items()]
    cells.append(_Cell("zero", "", clamp.model_copy(update={"values": (0.0,)})))
    return cells, tensors


def _measure(
    cell: _Cell, found: Generated, effect: Effect, first: int, n_prompts: int, options: dict[str, Any], backend: WritingBackend
) -> list[dict[str, Any]]:
    lines = []
    for i in range(n_prompts * options["n"]):
        text = found.texts[first + i]
        where = {"arm": cell.arm, "strength": cell.strength, "prompt": i // options["n"], "continuation": i % options["n"]}
        read = {"f_after": float(effect.after[first + i, 0]), "moved": float(effect.moved[first + i])}
        told = {"metric": _watched(text)} if options["watch"] else {}
        tokens = [token.token for token in text.tokens]
        lines.append({**where, **_scores(text), **read, **told, "text": backend.decode(tokens)})
    return lines


def _scores(text: Continuation) -> dict[str, float]:
    tokens = [token.token for token in text.tokens]
    pairs = list(pairwise(tokens))
    surprise = [-(token.base_logprob or 0.0) for token in text.tokens]
    kl = float(np.mean([token.kl or 0.0 for token in text.tokens]))
    return {"kl": kl, "perplexity": math.exp(float(np.mean(surprise))), "distinct_2": len(set(pairs)) / len(pairs) if pairs else math.nan}


def _watched(text: Continuation) -> float:
    """Return the mean log probability that the next token is one of those that are named."""
    return float(torch.tensor([token.watched for token in text.tokens], dtype=torch.float64).logsumexp(1).mean())


def _draw(table: pl.DataFrame, outcome: str, strengths: Sequence[str], numbers: Sequence[float]) -> str:
    """Draw an outcome's means over strengths as an SVG, one line an arm, intervals as bands."""
    width, height, left, top = 300, 190, 44, 22
    finite = [value for value in (*table["low"].to_list(), *table["high"].to_list()) if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    high = high if high > low else low + 1.0
    span = (max(numbers) - min(numbers)) or 1.0

    def place(number: float, value: float) -> str:
        x = left + (number - min(numbers)) / span * (width - left - 10)
        return f"{x:.1f},{top + (high - value) / (high - low) * (height - top - 28):.1f}"

    shapes = []
    for arm in (*ARMS, DIFFERENCE):
        lines = {line["strength"]: line for line in table.filter(pl.col("arm") == arm).to_dicts()}
        points = [(number, lines[strength]) for number, strength in zip(numbers, strengths, strict=True) if strength in lines]
        points = [(number, line) for number, line in points if all(math.isfinite(line[name]) for name in ("mean", "low", "high"))]
        if not points:
            continue
        band = [place(number, line["low"]) for number, line in points] + [place(number, line["high"]) for number, line in reversed(points)]
        mean = " ".join(place(number, line["mean"]) for number, line in points)
        shapes.append(f"<polygon points='{' '.join(band)}' fill='{COLOURS[arm]}' opacity='0.12'/>")
        shapes.append(f"<polyline points='{mean}' fill='none' stroke='{COLOURS[arm]}' stroke-width='1.5'><title>{arm}</title></polyline>")
    texts = [(2, 13, f"{outcome}"), (2, top + 8, f"{high:.3g}"), (2, height - 28, f"{low:.3g}")]
    texts += [(left, height - 8, strengths[numbers.index(min(numbers))]), (width - 60, height - 8, strengths[numbers.index(max(numbers))])]
    labels = "".join(f"<text x='{x}' y='{y}' font-size='11' fill='currentColor'>{html.escape(text)}</text>" for x, y, text in texts)
    return f"<svg width='{width}' height='{height}' role='img' aria-label='{html.escape(outcome)}'>{labels}{''.join(shapes)}</svg>"
