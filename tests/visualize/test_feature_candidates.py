"""Pass A against the obvious way: encode everything, sort everything."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from interp_assets.manifest import read_file
from interp_assets.visualize.candidates import CANDIDATES, FIRINGS, STATISTICS, find_candidates
from interp_assets.tensors import load_tensors


def run_pass(world, index, latent_slice):
    return find_candidates(world.pipeline, world.store, world.sae, "demo", index, latent_slice)


def read_table(world, produced, name):
    return pq.read_table(io.BytesIO(read_file(world.store, produced.ref.path, produced.manifest, name)))


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_every_firing_is_kept_once_with_its_activation(make_world, kind):
    """The store of all firings must equal a dense encode exactly: later passes look up instead of encoding."""
    world = make_world(kind, keep="all")
    for index, dense in enumerate(world.dense()):
        rows, latents = [], []
        for latent_slice in range(2):
            table = read_table(world, run_pass(world, index, latent_slice), FIRINGS)
            latents.append(table["latent"].to_numpy()), rows.append(table["row_id"].to_numpy() - (index << 40))
            assert (table["activation"].to_numpy() == dense[rows[-1], latents[-1]]).all()
        expected_latents, expected_rows = np.nonzero(dense.T)
        assert (np.concatenate(latents) == expected_latents).all()
        assert (np.concatenate(rows) == expected_rows).all()
