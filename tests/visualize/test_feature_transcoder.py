"""Feature passes of a transcoder: latents fire on what it reads, decoder rows act where it writes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp_assets.errors import ConfigError
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline

READ, WRITTEN, D_OUT = "resid_post.0", "mlp_out.0", 8


@pytest.mark.parametrize("task", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_transcoder_fires_on_what_it_reads_and_acts_where_it_writes(
    make_world, run_passes, read_records, expect_records, tokenizer, unembedding, kind, task
):
    """Six dimensions in, eight out: evidence by brute force from the rows that are read, logits by the plain product of the decoder rows."""
    world = make_world(kind, d_in=6)
    rng = np.random.default_rng(3)
    W_dec = torch.from_numpy(rng.integers(-3, 4, (world.sae.d_sae, D_OUT))).float()
    W_skip = torch.ones(6, D_OUT) if task == "skip_transcoder" else None
    world.sae = replace(world.sae, W_dec=W_dec, b_dec=torch.zeros(D_OUT), W_skip=W_skip)
    content = world.pipeline.config.model_dump()
    content["harvest"]["hook_points"] = [READ, WRITTEN]
    content["saes"][0] |= {"task": task, "target_hook_point": WRITTEN}
    world.pipeline = Pipeline(make_config(content), replace(world.pipeline.plan, hook_widths={READ: 6, WRITTEN: D_OUT}))
    world = world.variant()
    records = [record for produced in run_passes(world) for record in read_records(world, produced)]
    effects = W_dec @ unembedding.matrix[:, 1:50]
    for record, wanted in zip(records, expect_records(world), strict=True):
        assert record["statistics"]["count"] == wanted["count"]
        assert record["examples"]["top"] == wanted["top"]
        own = effects[record["latent"]]
        assert record["logits"]["top"][0][1] == float(own.max())
        assert record["logits"]["bottom"][0][1] == float(own.min())
        assert float(own[record["logits"]["top"][0][0] - 1]) == float(own.max())
    assert any(record["statistics"]["count"] for record in records)


def test_a_crosscoder_is_refused_with_what_to_do():
    """Its row is that of several hook points; the passes read one."""
    sae = {"name": "cross", "task": "crosscoder", "hook_point": READ, "more_hook_points": [WRITTEN]}
    content = {"harvest": {"hook_points": [READ, WRITTEN]}, "saes": [sae], "features": {"saes": ["cross"]}}
    with pytest.raises(ConfigError, match=r"names the crosscoder 'cross': feature passes read one hook point. Take it out of the list"):
        make_config(content)
