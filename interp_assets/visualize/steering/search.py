"""Live latents of an SAE become those that change what the model writes, and those that do not: found on some prompts, dosed on others.

1. Candidates are live latents, evenly over how often they fire: nobody picks them.
2. On every other prompt each is set to one strength, beside another latent and a random direction. Its effect is KL(without edits || with edits) less
   the controls' mean, with the interval over the prompts.
3. Those whose interval lies highest are *movers*; those whose effect is nearest to zero are *idle*.
4. Both are dosed on the prompts that nobody looked at before: the best of many looks better than it is, and only fresh prompts tell by how much.

Format: `docs/formats/steering_search.md`.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import polars as pl

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.garcon.backend import Chats
from interp_assets.garcon.steering.dose import DIFFERENCE, Dose, run_doses
from interp_assets.garcon.steering.recipe import load_recipe, make_edits
from interp_assets.garcon.subject import SubjectModel
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, load_manifest, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.visualize.steering.curves import open_backend
from interp_assets.visualize.steering.refs import search_edits, search_lineage, search_of, search_ref, steering_of

CANDIDATES: Final = "candidates.parquet"
TEXTS: Final = "texts.parquet"
MOVER, IDLE = "mover", "idle"
_OUTCOME: Final = "kl"
_TRIED: Final = ("feature", "other", "random")


class Search(NamedTuple):
    """What a search found."""

    candidates: pl.DataFrame
    """A line each, in the order of latents: `frequency`, effect `mean`, `low` and `high`, and which `role` it was given."""
    doses: dict[int, Dose]
    """Of movers, the strongest first, then of idle ones."""


@timed
def write_search(pipeline: Pipeline, store: Store, subject: SubjectModel, tokenizer: Any, sae: str, progress: Callable[[int], None]) -> Produced:
    """Write what a search among the latents of an SAE found; `progress` is advanced by texts."""
    ref, kept = search_ref(pipeline, sae), trace(Digests(store), search_lineage(pipeline, sae))
    if (manifest := find_current(store, ref, kept)) is not None:
        return Produced(ref, manifest, is_cached=True)
    steering, search = steering_of(pipeline), search_of(pipeline)
    backend = open_backend(pipeline, store, subject, tokenizer, [sae])
    tried, fresh = (
        Chats(tuple(map(tuple, backend.tokenize(prompts, special=True))), ()) for prompts in (steering.prompts[::2], fresh_prompts(steering.prompts))
    )
    options = {"new_tokens": steering.new_tokens, "n": steering.n, "temperature": steering.temperature, "seed": pipeline.config.seed, "watch": ()}
    firings = backend.saes[sae].firings
    latents = choose_candidates(firings.frequency.tolist(), firings.maximum.tolist(), search.candidates)
    edits = make_edits(load_recipe(search_edits(pipeline, sae, latents[0])), backend)
    doses = run_doses(backend, tried, edits, latents, [f"{search.strength:g} {steering.unit}"], options, _TRIED)
    candidates = rank_candidates(latents, [firings.frequency[latent].item() for latent in latents], doses, search.shown)
    progress(sum(dose.texts.height for dose in doses))
    chosen = chosen_latents(candidates)
    dosed = run_doses(backend, fresh, edits, chosen, [f"{strength:g} {steering.unit}" for strength in steering.strengths], options)
    texts = pl.concat([dose.texts.with_columns(latent=pl.lit(latent, pl.Int64)) for latent, dose in zip(chosen, dosed, strict=True)])
    progress(texts.height)
    with create_current(store, ref, kept) as art:
        for file, table in ((CANDIDATES, candidates), (TEXTS, texts)):
            content = io.BytesIO()
            table.write_parquet(content)
            art.put(file, content.getvalue(), n_rows=table.height)
        found = {role: candidates.filter(pl.col("role") == role)["latent"].to_list() for role in (MOVER, IDLE)}
        art.facts |= {
            "sae": sae,
            "chosen": chosen,
            "movers": found[MOVER],
            "idle": found[IDLE],
            "strengths": dosed[0].strengths,
            "what": dosed[0].what,
        }
    return art.produced


def choose_candidates(frequency: Sequence[float], maximum: Sequence[float], n: int) -> list[int]:
    """Return live latents, evenly over their order by frequency. Raises `InputError` for an SAE with fewer than two live latents."""
    live = sorted((latent for latent in range(len(maximum)) if maximum[latent] > 0), key=lambda latent: (frequency[latent], latent))
    if len(live) < 2:
        raise InputError(
            f"A search takes live latents; of {len(maximum):,} there are {len(live)}. Train the SAE longer, or take `steering.search` out."
        )
    n = min(n, len(live))
    return [live[(2 * i + 1) * len(live) // (2 * n)] for i in range(n)]


def fresh_prompts(prompts: Sequence[str]) -> list[str]:
    """Return those that no latent is chosen by: every second one."""
    return list(prompts[1::2])


def rank_candidates(latents: Sequence[int], frequency: Sequence[float], doses: Sequence[Dose], shown: int) -> pl.DataFrame:
    """Return the table of candidates: movers have the highest lower ends, above zero; idle ones the effects nearest to zero."""
    lines = []
    for latent, share, dose in zip(latents, frequency, doses, strict=True):
        table = dose.table()
        found = table.filter((pl.col("outcome") == _OUTCOME) & (pl.col("arm") == DIFFERENCE)).to_dicts()
        (line,) = found or [{"mean": 0.0, "low": 0.0, "high": 0.0}]
        lines.append({"latent": latent, "frequency": share, "mean": line["mean"], "low": line["low"], "high": line["high"]})
    movers = [line["latent"] for line in sorted(lines, key=lambda line: (-line["low"], line["latent"])) if line["low"] > 0][:shown]
    rest = sorted((line for line in lines if line["latent"] not in movers), key=lambda line: (abs(line["mean"]), line["latent"]))
    idle = [line["latent"] for line in rest[:shown]]
    roles = {**dict.fromkeys(movers, MOVER), **dict.fromkeys(idle, IDLE)}
    return pl.DataFrame([{**line, "role": roles.get(line["latent"], "")} for line in lines]).sort("latent")


def chosen_latents(candidates: pl.DataFrame) -> list[int]:
    """List those that are dosed: movers, the strongest first, then idle ones."""
    movers = candidates.filter(pl.col("role") == MOVER).sort("low", "latent", descending=[True, False])
    return [*movers["latent"].to_list(), *candidates.filter(pl.col("role") == IDLE)["latent"].to_list()]


def read_search(pipeline: Pipeline, store: Store, sae: str) -> Search:
    """Read what a search found. Raises `ArtifactMissingError` before it is made."""
    ref = search_ref(pipeline, sae)
    manifest = load_manifest(store, ref)
    candidates, texts = (pl.read_parquet(io.BytesIO(read_file(store, ref.path, manifest, file))) for file in (CANDIDATES, TEXTS))
    chosen, strengths = chosen_latents(candidates), list(manifest.facts["strengths"])
    if set(chosen) != set(texts["latent"].unique()):
        raise ArtifactCorruptError(f"{store.url}/{ref.path} has texts of other latents than were chosen. Re-materialize steering_search.")
    doses = {latent: texts.filter(pl.col("latent") == latent).drop("latent") for latent in chosen}
    return Search(candidates, {latent: Dose(own, f"Latent {latent} of {sae}", strengths, pipeline.config.seed) for latent, own in doses.items()})
