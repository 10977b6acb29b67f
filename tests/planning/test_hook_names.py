"""Names of hook points: TransformerLens' mean what they mean there, and an artifact does not depend on which was typed."""

import pytest
from pydantic import ValidationError

from interp_assets.planning.config import HarvestConfig, make_config
from interp_assets.planning.hook_names import FIRST_KINDS, LAST_KINDS, LAYER_KINDS, alias_of, canonical_name, explain_other


def test_every_kind_has_a_name_in_transformer_lens_and_comes_back() -> None:
    """A kind without one could not be exported."""
    names = [*FIRST_KINDS, *(f"{kind}.11" for kind in LAYER_KINDS), *LAST_KINDS]
    assert [canonical_name(alias_of(name)) for name in names] == names
    assert alias_of("q.3", has_rope=False) == "blocks.3.attn.hook_q"


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("blocks.3.hook_mlp_out", "mlp_out.3"),
        ("blocks.3.mlp.hook_out", "mlp_raw.3"),
        ("blocks.03.hook_resid_pre", "resid_pre.3"),
        ("blocks.3.attn.hook_q", "blocks.3.attn.hook_q"),
        ("module:model.layers.3", "module:model.layers.3"),
    ],
)
def test_a_name_is_translated_only_to_the_same_tensor(name: str, ours: str) -> None:
    """What is added to the stream and what the module returns differ after a post-norm; queries differ before and after RoPE."""
    assert canonical_name(name) == ours
    assert bool(explain_other(name)) == (name == "blocks.3.attn.hook_q")


def test_a_configuration_means_the_same_in_either_words() -> None:
    """Ids follow from it: the same rows must not be made twice."""
    saes = [
        {"name": "a", "hook_point": "blocks.1.attn.hook_z"},
        {"name": "b", "hook_point": "z.1", "task": "crosscoder", "more_hook_points": ["mlp_act.0"]},
    ]
    config = make_config({"harvest": {"hook_points": ["blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"]}, "saes": saes, "features": {"saes": []}})
    assert config.harvest.hook_points == ["z.1", "mlp_act.0"]
    assert config.sae("a").hook_point == "z.1"
    with pytest.raises(ValidationError):
        HarvestConfig(hook_points=[])
