"""A text becomes the features that fire on it, token by token: search by example, with the subject model and the SAE in the server's memory.

The text is laid into contexts as the corpus was (`corpus/tokens.py`), run through the subject model up to the hook point, and encoded; a position
that the harvest would not have counted (BOS and the like) is shown and not counted here. Answered are the features with the strongest activations
and, for every token, its own strongest. Model and SAE are loaded when the first text comes, which takes seconds; later texts take milliseconds.
The numbers are those of the records up to the rounding of the stored activations.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any, Final, NamedTuple

import torch

from interp_assets.corpus.tokens import find_valid, lay_out, tokenize_example
from interp_assets.errors import InputError
from interp_assets.garcon.subject import SubjectModel, load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.planning.config import HarvestConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import format_count
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.sae import Sae
from interp_assets.visualize.digits import round_significant

MAX_TEXT: Final = 2000
"""Characters of a text."""
MAX_TOKENS: Final = 512
SHOWN: Final = 30
"""Features of an answer."""
SHOWN_AT_TOKEN: Final = 8


class Probe(NamedTuple):
    """What a text is run through."""

    model: SubjectModel
    tokenizer: Any
    sae: Sae
    hook_point: str
    corpus: CorpusConfig
    harvest: HarvestConfig = HarvestConfig()


class Examples:
    """Answers texts about one bundle; loads what it needs when the first one comes. Safe to use from several threads."""

    def __init__(self, make: Callable[[], Probe]) -> None:
        """`make` loads model and SAE."""
        self._make, self._probe, self._lock = make, None, Lock()

    def ask(self, text: str, latent: int | None = None) -> dict[str, Any]:
        """Run a text. Raises `InputError` for one that is empty or too long. `latent` is told of, even if it is not among the strongest."""
        if not text.strip() or len(text) > MAX_TEXT:
            raise InputError(f"The text has {len(text):,} characters; give 1 to {MAX_TEXT:,}.")
        with self._lock:  # one forward at a time
            if self._probe is None:
                self._probe = self._make()
            return run_example(self._probe, text, latent)


def load_probe(pipeline: Pipeline, store: Store, name: str) -> Probe:
    """Load subject model, tokenizer and the SAE called `name`. Raises `InputError` or `ArtifactMissingError` with the next step."""
    config = pipeline.config
    sae, model = load_sae(pipeline, store, name), load_subject_model(config.model, config.execution)
    return Probe(model, load_tokenizer(config.model), sae.to(model.device), config.sae(name).hook_point, config.corpus, config.harvest)


@torch.no_grad()
def run_example(probe: Probe, text: str, latent: int | None = None) -> dict[str, Any]:
    """Return `tokens`, `masked` places and `features`: latent, its largest activation, and [place, activation] wherever it fires.

    The features are those that fire most strongly, and `latent`, which may not fire at all.

    `by_token` lists for every place its strongest [latent, activation].
    """
    ids = tokenize_example(probe.corpus, probe.tokenizer, text)
    if not len(ids):
        raise InputError("The tokenizer makes no token of this text.")
    if len(ids) > MAX_TOKENS:
        raise InputError(f"The text has {format_count(len(ids), 'token')}, at most {MAX_TOKENS} are run. Shorten it.")
    layout = lay_out(probe.corpus, probe.tokenizer, [ids])
    latents = []
    for context in range(int(layout.contexts.max()) + 1):
        tokens = torch.from_numpy(layout.token_ids[layout.contexts == context].astype("int64"))[None].to(probe.model.device)
        rows = probe.model.capture(tokens, None, [probe.hook_point])[probe.hook_point][0]
        latents.append(probe.sae.encode(rows.float()).cpu())
    valid = torch.from_numpy(find_valid(layout, probe.harvest, probe.tokenizer))
    fired = torch.cat(latents) * valid[:, None]
    largest, order = fired.amax(0).topk(min(SHOWN, fired.shape[1]))
    chosen = order[largest > 0].tolist()
    if latent is not None and latent not in chosen:
        chosen.append(latent)
    strongest, owners = fired.topk(min(SHOWN_AT_TOKEN, fired.shape[1]), dim=1)
    return {
        "tokens": layout.token_ids.tolist(),
        "masked": (~valid).nonzero()[:, 0].tolist(),
        "l0": round(float((fired > 0).sum() / valid.sum().clamp_min(1)), 2),
        "features": [{"latent": shown, "max": _round(fired[:, shown].max()), "activations": _sparse(fired[:, shown])} for shown in chosen],
        "by_token": [
            [[int(latent), _round(value)] for value, latent in zip(values, names, strict=True) if value > 0]
            for values, names in zip(strongest, owners, strict=True)
        ],
    }


def _sparse(values: torch.Tensor) -> list[list[Any]]:
    return [[int(place), _round(values[place])] for place in values.nonzero()[:, 0]]


def _round(value: torch.Tensor) -> float:
    return float(round_significant(value.double().reshape(1).numpy())[0])
