"""The world hands out only what was planned."""

from pathlib import Path

import pytest
from road_world import make_road_config
from tiny_models import save_model, write_texts

from interp_assets.corpus.plan import plan_corpus
from interp_assets.errors import InputError
from resources.world import World


def test_a_model_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    """One rebuilt shard of other weights, under the planned id, would mix two models in one data set."""
    save_model(tmp_path / "model", "gpt2")
    write_texts(tmp_path / "texts", n_files=5, n_chars=900)
    config = make_road_config(tmp_path, tmp_path / "data")
    world = World(config)
    plan_corpus(config, world.store())
    assert world.model().d_model > 0
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"The model of .* has changed since it was planned .*Materialize `corpus_plan`"):
        world.model()
