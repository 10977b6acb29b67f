"""Planted rows: seeds become rows whose features are known, and a pipeline of them needs neither text nor a model."""

from typing import Any

import pytest
import torch

from interp_assets.corpus.plan import plan_corpus
from interp_assets.errors import ConfigError, InputError
from interp_assets.graph.stages import make_road
from interp_assets.harvest.planted import make_planting, plant_rows
from interp_assets.harvest.refs import activation_shard_ref, truth_ref
from interp_assets.lab import Opened
from interp_assets.planning.asset import Job
from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import open_pipeline_store
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.tensors import load_tensors
from interp_assets.storage.verify import verify_tree
from interp_assets.train.own.columns import RECOVERY, read_metrics
from interp_assets.train.refs import evaluation_ref
from resources.world import World

SAE = {"name": "a", "d_sae": 24, "k": 3, "n_rows": 4000, "batch_rows": 200, "learning_rate": 5e-3}


def configure(**corpus: Any) -> PipelineConfig:
    """Return a pipeline of few planted rows."""
    fields = {"source": "planted", "features": 20, "width": 16, "n_rows": 3000, "rows_per_shard": 1000, "context_length": 128, **corpus}
    more = {
        "root": "memory://planted",
        "shuffle": {"passes": 2, "fan_out": 2},
        "features": {"saes": []},
        "execution": {"device": "cpu", "profile_steps": 0},
    }
    return make_config({"name": "toy", "corpus": fields, "saes": [SAE], **more})


def draw(n_rows: int = 20_000, seed: int = 0, **fields: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return features, rows, and the strengths that rows are made of."""
    corpus = CorpusConfig.model_validate({"source": "planted", "features": 21, "width": 16, **fields})
    planting = make_planting(corpus, seed)
    blocks = plant_rows(corpus, planting, seed, 1, n_rows)
    return planting, torch.cat([block.rows for block in blocks]), torch.cat([block.strengths for block in blocks])


def test_rows_are_sums_of_unit_directions() -> None:
    """And of noise, where some is wanted; the same seeds give the same bits, others do not."""
    planting, rows, strengths = draw(5000)
    torch.testing.assert_close(rows, strengths @ planting.directions, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(planting.directions.norm(dim=1), torch.ones(21))
    assert float(strengths.min()) == 0
    assert torch.equal(rows, draw(5000)[1])
    assert not torch.equal(rows, draw(5000, seed=1)[1])
    _, noisy, again = draw(5000, noise=0.5)
    assert float((noisy - again @ planting.directions).std()) == pytest.approx(0.5, rel=0.02)


def test_frequencies_fall_from_the_most_to_the_least() -> None:
    """By the power of the rank that is asked for."""
    planting, _, strengths = draw(frequency={"zipf": 1.0, "most": 0.4, "least": 0.02})
    found = (strengths > 0).double().mean(0)
    assert (float(planting.probability[0]), float(planting.probability[-1])) == (pytest.approx(0.4), pytest.approx(0.02))
    torch.testing.assert_close(found, planting.probability.double(), rtol=0.1, atol=0.005)
    expected = 0.02 + 0.38 * (1 / 2 - 1 / 21) / (1 - 1 / 21)
    assert float(planting.probability[1]) == pytest.approx(expected)


def test_children_fire_under_their_parents_and_one_at_a_time() -> None:
    """A tree of three roots, each with two children, each of these with two."""
    tree = {"roots": 3, "branching": 2, "depth": 2, "probability": 0.5}
    planting, _, strengths = draw(hierarchy=tree, frequency={"zipf": 0.0, "most": 0.5})
    fires = strengths > 0
    assert planting.parent.tolist()[:9] == [-1, -1, -1, 0, 0, 1, 1, 2, 2]
    assert planting.parent.tolist()[9:11] == [3, 3]
    children = (planting.parent >= 0).nonzero().view(-1)
    assert not bool((fires[:, children] & ~fires[:, planting.parent[children]]).any())
    assert not bool((fires[:, 3] & fires[:, 4]).any())
    own = fires[fires[:, 0]].double().mean(0)
    assert float(own[3] + own[4]) == pytest.approx(0.75, abs=0.03), "one of two, each wanting to with a half"
    shared = draw(hierarchy={**tree, "exclusive": False}, frequency={"zipf": 0.0, "most": 0.5})[2] > 0
    assert bool((shared[:, 3] & shared[:, 4]).any())


def test_common_causes_correlate_features_and_leave_their_frequencies() -> None:
    """A copula: by chance alone pairs of these would be uncorrelated."""
    alike = {"zipf": 0.0, "most": 0.3}
    planting, _, strengths = draw(frequency=alike, correlation={"rank": 2, "scale": 0.6})
    fires = (strengths > 0).double()
    assert float((fires.mean(0) - 0.3).abs().max()) < 0.02
    found = torch.corrcoef(fires.T) - torch.eye(21)
    same = (planting.causes @ planting.causes.T / 0.36).round() == 2
    same.fill_diagonal_(False)
    assert float(found[same].mean()) > 0.3
    independent = torch.corrcoef((draw(frequency=alike)[2] > 0).double().T) - torch.eye(21)
    assert float(independent.abs().max()) < 0.05


@pytest.fixture(scope="module")
def run() -> Opened:
    """Make the whole road of a planted pipeline."""
    config = configure(hierarchy={"roots": 2, "branching": 3, "depth": 1}, frequency={"zipf": 0.5, "most": 0.3, "least": 0.1})
    store = open_pipeline_store(config)
    pipeline, world = plan_corpus(config, store), World(config)
    for asset in make_road(config):
        if not asset.plan:
            keys = tuple(asset.partition_keys(pipeline))
            make = asset.make(Job(world, pipeline, store, keys))
            for key in keys:
                make(key)
    return Opened(pipeline, store)


def test_a_planted_pipeline_is_one_like_any_other(run: Opened) -> None:
    """From seeds to an evaluation that knows the truth; what lies there is whole, and made once."""
    assert list(verify_tree(run.store)) == []
    facts = load_manifest(run.store, evaluation_ref(run.pipeline, "a")).facts
    assert facts["ce_recovered"] is None
    assert 0 < facts["f1"] <= 1
    assert facts["n_rows"] == 1000
    assert set(read_metrics(run.pipeline, run.store, "a")) == {f"planted.{name}" for name in RECOVERY}
    truth = load_manifest(run.store, truth_ref(run.pipeline))
    tensors = load_tensors(run.store, truth_ref(run.pipeline).path, truth, "truth.safetensors")
    assert tuple(tensors["directions"].shape) == (20, 16)
    assert truth.facts["l0"] == pytest.approx(facts["true_l0"])
    rows = run.activations("resid_post.2")[1000:2000].tensor
    expected = torch.cat([block.rows for block in plant_rows(run.config.corpus, make_planting(run.config.corpus, 0), 0, 1, 1000)])
    assert torch.equal(rows, expected.to(torch.bfloat16))
    with pytest.raises(InputError, match="The rows of this pipeline are planted: there is no model"):
        run.model()


def test_what_rows_are_made_of_is_their_identity() -> None:
    """Another seed or probability makes other rows, a longer context only other tokens."""
    first, seeded, denser = configure(), configure().model_copy(update={"seed": 1}), configure(frequency={"most": 0.5})
    paths = []
    for config in (first, seeded, denser):
        pipeline = plan_corpus(config, open_pipeline_store(config))
        paths.append(activation_shard_ref(pipeline, "resid_post.2", 0).path)
    assert len(set(paths)) == 3


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"hierarchy": {"roots": 16}}, r"hierarchy has 336 features \(roots, branching, depth\), and corpus.features is 20"),
        ({"correlation": {"rank": 100, "scale": 0.2}}, r"scale² x rank is 4.00, and has to be below 1"),
        ({"frequency": {"most": 1.0}}, "corpus.frequency.most"),
        ({"frequency": {"most": 0.01, "least": 0.3}}, r"least frequent feature fires with 0.3, and the most frequent with 0.01"),
    ],
)
def test_what_cannot_be_planted_is_refused(corpus: dict[str, Any], message: str) -> None:
    """With the field."""
    with pytest.raises(ConfigError, match=message):
        configure(**corpus)


def test_what_needs_text_or_a_model_is_refused() -> None:
    """Before anything runs."""
    with pytest.raises(ConfigError, match=r"planted rows have no text and no model, which features.saes, heads needs"):
        make_config({"corpus": {"source": "planted"}, "heads": {}})
    config = configure(n_rows=500)
    with pytest.raises(ConfigError, match=r"corpus.held_out_shards is 1, and planted rows make 1 shard"):
        plan_corpus(config, open_pipeline_store(config))
