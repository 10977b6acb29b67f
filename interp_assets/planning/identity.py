"""A section of a configuration becomes what its artifacts' ids are made of, which new fields leave alone.

An artifact's id is a hash of what a section dumps. A field that is not in `FIRST_FIELDS` is dumped only where it differs from its default, so
adding one changes the id of nothing that was made without it. Nobody adds to that table; a default, once published, stays.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, model_serializer

FIRST_FIELDS: Final[dict[str, str]] = {
    "CorpusConfig": (
        "source path subset split revision text_field context_length contexts shard_bytes documents_per_shard max_shards held_out_shards"
    ),
    "ModelConfig": "name revision dtype trust_remote_code",
    "HarvestConfig": "hook_points dtype excluded_positions excluded_token_ids",
    "ShuffleConfig": "passes fan_out memory_bytes",
    "SaeConfig": (
        "name hook_point architecture task target_hook_point more_hook_points d_sae k sparsity_coefficient learning_rate batch_rows n_rows "
        "dead_after_rows seed product_dtype imported imported_digest accepts_misfit"
    ),
    "FeaturesConfig": (
        "saes latent_slices top_k n_random window n_intervals examples_per_interval keep gather one_per_document distinct_tokens encode_dtype"
    ),
    "HeadsConfig": "layers top_k n_intervals examples_per_interval key_tokens prompts",
    "RetrainConfig": "after_tokens max_fvu_increase max_ce_recovered_decrease stale_after_days",
    "SteeringConfig": "recipes prompts strengths unit new_tokens n temperature",
    "PipelineConfig": "name root seed corpus model harvest shuffle saes features retrain execution",
}
"""The fields that ids were made of when this table was written: they are always dumped."""


def leave_out_later(section: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    """Return of a section's dump what ids were first made of, and of all later fields those that are not at their defaults."""
    first = {name for base in type(section).__mro__ for name in FIRST_FIELDS.get(base.__name__, "").split()}
    fields = type(section).model_fields
    return {
        name: value
        for name, value in dumped.items()
        if name in first or name not in fields or getattr(section, name) != fields[name].get_default(call_default_factory=True)
    }


class Section(BaseModel):
    """A part of a configuration: frozen, without fields that nobody knows, dumped as ids are made of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_serializer(mode="wrap")
    def _dump_identity(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return leave_out_later(self, dump(self))


def _check_name(name: str) -> str:
    if not name or not all(char.isascii() and (char.isalnum() or char in "_-.") for char in name) or name.startswith((".", "-")):
        message = f"{name!r} is no name: letters, digits, '_', '-' and '.' only, and not '.' or '-' first"
        raise ValueError(message)
    return name


Name = Annotated[str, AfterValidator(_check_name)]
"""A name that becomes a partition and a folder."""
