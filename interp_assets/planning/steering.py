"""What of a configuration steers and patches a model: which latents are dosed on which prompts, and which pairs of prompts are patched."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from interp_assets.planning.hook_names import LAYER_KINDS, canonical_name, explain_other
from interp_assets.planning.identity import Name, Section

Text = Annotated[str, Field(min_length=1)]


def _check_point(name: str) -> str:
    """Return our name of a point inside or between blocks, with its layer or a star for all of them."""
    first = name.replace("*", "0", 1)
    kind, _, layer = canonical_name(first).partition(".")
    if kind not in LAYER_KINDS or not layer.isdecimal():
        told = explain_other(first) or f"name one as resid_post.3, or resid_post.* for all layers; the kinds are {', '.join(LAYER_KINDS)}"
        message = f"{name!r} is no hook point inside or between blocks: {told}"
        raise ValueError(message)
    return f"{kind}.*" if "*" in name else f"{kind}.{layer}"


PatchedPoint = Annotated[str, AfterValidator(_check_point)]
"""Hook points of a prompt set, in our words whichever they were named in."""


class SearchConfig(Section):
    """How a sweep finds latents that change what is written, and some that do not: on every other prompt, to be dosed on the rest. All identity."""

    candidates: Annotated[int, Field(ge=2)] = 64
    """Live latents that are tried, evenly over how often they fire."""
    strength: float = 5.0
    """What each is set to, in units of `steering.unit`."""
    shown: Annotated[int, Field(ge=1)] = 3
    """Of those that move predictions most beyond their controls, and of those that move them least, so many are dosed."""


class SteeringConfig(Section):
    """Which latents are dosed, on which prompts; nothing is steered without this section. All identity."""

    recipes: dict[Name, list[dict[str, Any]]] = {}
    """By name: edits as in a recipe's file, of which one clamps a latent of an SAE of `features.saes`. Each is a partition."""
    search: SearchConfig | None = None
    """Latents that a sweep finds, of each SAE of `features.saes`; none without it."""
    prompts: Annotated[list[Text], Field(min_length=1)]
    """Texts that are continued."""
    strengths: Annotated[list[float], Field(min_length=1)] = [-10.0, -2.0, 0.0, 1.0, 2.0, 5.0, 10.0]
    """What the clamped latent is set to, in units of `unit`."""
    unit: Literal["max", "raw", "norm"] = "max"
    """Of the strengths: the latent's largest activation, the units of activations, or the mean norm at its hook point."""
    new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens that are added to a prompt."""
    n: Annotated[int, Field(ge=1)] = 1
    """Continuations of each prompt; more than one makes sense with a temperature."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token."""

    @model_validator(mode="after")
    def _check_work(self) -> "SteeringConfig":
        if not self.recipes and not self.search:
            message = "there is nothing to steer by: write steering.recipes, or `search: {}` to find latents"
            raise ValueError(message)
        return self


class PairConfig(Section):
    """Two prompts of as many tokens that differ in what the answer follows from. All identity."""

    clean: Text
    """The prompt whose activations are put into the other."""
    corrupted: Text
    """The prompt that they are put into."""
    answer: Text
    """One token, with its leading space if it has one: the metric is its logit after the corrupted prompt less that of `other`."""
    other: str = ""
    """One token, as above; empty: the metric is the log probability of `answer`, in nats."""


class PatchingConfig(Section):
    """Pairs of prompts, and where activations of the clean one take the place of the corrupted one's, a cell at a time. All identity."""

    name: Name
    """Name of the set; it becomes a partition."""
    pairs: Annotated[list[PairConfig], Field(min_length=1)]
    points: Annotated[list[PatchedPoint], Field(min_length=1)] = ["resid_post.*"]
    """Hook points inside or between blocks, by our names or TransformerLens'; `*` in the place of the layer stands for all."""
    by: Literal["position", "head"] = "position"
    """What a cell is at a point: one position, or one head at all positions (`z.*`, `q.*`, `pattern.*` and their like)."""
    method: Literal["exact", "gradient"] = "exact"
    """`exact` runs the model once a cell, all cells in one batch; `gradient` estimates them all by one backward, to first order."""

    @model_validator(mode="after")
    def _check_metric(self) -> "PatchingConfig":
        if len({bool(pair.other) for pair in self.pairs}) > 1:
            message = f"some pairs of {self.name!r} have an `other` and some have none: their metrics cannot be averaged. Make two sets of them"
            raise ValueError(message)
        return self
