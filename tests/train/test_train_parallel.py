"""Several training processes do what one does."""

import io

import polars as pl
import pytest
import torch

from interp_assets.errors import ConfigError, NonFiniteError
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store, save_plan
from interp_assets.storage.manifest import read_file
from interp_assets.storage.traffic import METER
from interp_assets.train.launch import run_training
from interp_assets.train.parallel import ONE_RANK, Ranks, check_grid
from interp_assets.train.recipes import RECIPES

TINY = {"name": "a", "d_sae": 48, "k": 2, "n_rows": 1500, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 300}


def with_processes(pipeline: Pipeline, root: str, n: int, n_slices: int = 1) -> Pipeline:
    """Return the pipeline at another root, trained by `n` processes, the latents divided over `n_slices`."""
    execution = pipeline.config.execution.model_copy(update={"processes": n, "latent_processes": n_slices})
    return Pipeline(pipeline.config.model_copy(update={"execution": execution, "root": root}), pipeline.plan)


def test_ranks_share_a_batch_without_loss() -> None:
    """Contiguous shares that cover every row."""
    shares = [Ranks(rank, 4).share(100) for rank in range(4)]
    assert [row for share in shares for row in range(100)[share]] == list(range(100))


def test_ranks_that_do_not_divide_the_batch_are_refused_with_those_that_do() -> None:
    """Dropping the remainder would lose data on every step."""
    with pytest.raises(ConfigError, match=r"3 training processes that share rows don't divide batch_rows = 100. .* \[1, 2, 4, 5, 10, 20, 25, 50\]"):
        Ranks(0, 3).share(100)


def test_slices_that_do_not_divide_are_refused_with_those_that_do() -> None:
    """Latents and processes alike; before anything starts."""
    with pytest.raises(ConfigError, match=r"3 latent slices don't divide d_sae = 100. Set execution.latent_processes to one of \[1, 2, 4"):
        Ranks(0, 3, 3).latents(100)
    with pytest.raises(ConfigError, match=r"latent_processes = 2 doesn't divide execution.processes = 3. Set latent_processes to one of \[1, 3\]"):
        check_grid(3, 2)


def test_a_grid_shares_rows_and_latents() -> None:
    """Ranks of one replica have the same rows and different latents."""
    grid = [Ranks(rank, 4, 2) for rank in range(4)]
    assert [(ranks.share(8), ranks.latents(6)) for ranks in grid] == [
        (slice(0, 4), slice(0, 3)),
        (slice(0, 4), slice(3, 6)),
        (slice(4, 8), slice(0, 3)),
        (slice(4, 8), slice(3, 6)),
    ]


def test_processes_that_do_not_fit_are_refused_before_they_start(make_planted, tmp_path) -> None:
    """A message after minutes of starting would be a waste."""
    planted = make_planted([TINY], root=str(tmp_path))
    with pytest.raises(ConfigError, match="don't divide d_sae = 48"):
        run_training(with_processes(planted.pipeline, str(tmp_path), 5, 5), planted.store, ["a"])


def test_one_rank_needs_no_process_group() -> None:
    """Each operation answers with its input."""
    value = torch.arange(3.0)
    assert ONE_RANK.sum(value) is value
    assert ONE_RANK.sum_replicas(value) is ONE_RANK.sum_slices(value) is value
    assert ONE_RANK.gather_rows(value) is ONE_RANK.gather_slices(value) is value
    ONE_RANK.barrier()


def test_processes_cannot_share_a_store_in_memory(make_planted) -> None:
    """They would find nothing there."""
    planted = make_planted([TINY])
    with pytest.raises(ConfigError, match="several training processes need a folder or a bucket"):
        run_training(with_processes(planted.pipeline, "memory://x", 2), planted.store, ["a"])


ALL = [{**TINY, "name": architecture, "architecture": architecture} for architecture in RECIPES]


def train_all(make_planted, root: str, n: int, n_slices: int) -> dict[str, pl.DataFrame]:
    """Train an SAE of each architecture with `n` processes that divide the latents `n_slices` times; return their logs.

    What they read and write is counted here: each reads every batch of 16 values of two bytes, and the first writes the weights.
    """
    pipeline = with_processes(make_planted(ALL, root=root).pipeline, root, n, n_slices)
    store = open_pipeline_store(pipeline.config)
    save_plan(store, pipeline.plan)
    seen, heard, before = [], [], METER.total()
    produced = run_training(pipeline, store, list(RECIPES), seen.append, heard.append).made
    moved = METER.total().since(before)
    assert moved.written_bytes >= sum(item.manifest.n_bytes for item in produced.values())
    assert moved.read_bytes >= n * 1500 * 16 * 2
    assert sum(seen) == 1500 * len(RECIPES)
    assert sorted(metrics.row.step for metrics in heard) == sorted([*range(1, 16)] * len(RECIPES))
    return {name: pl.read_parquet(io.BytesIO(read_file(store, item.ref.path, item.manifest, "training.parquet"))) for name, item in produced.items()}


@pytest.fixture(scope="module")
def of_one(make_planted, tmp_path_factory) -> dict[str, pl.DataFrame]:
    """Return the logs of a training in this process alone."""
    return train_all(make_planted, str(tmp_path_factory.mktemp("one")), 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "n_slices"), [(2, 1), *(pytest.param(n, 2, marks=pytest.mark.faults) for n in (2, 4))])
def test_a_grid_of_processes_trains_like_one(make_planted, of_one: dict[str, pl.DataFrame], tmp_path, n: int, n_slices: int) -> None:
    """Gradients, the top k of rows and batches, L0, AuxK and dead latents are those of all latents and of the global batch.

    Firing counts of the first step, before rounding differs, are equal; `dead_after_rows` is so small that AuxK takes part.
    """
    of_many = train_all(make_planted, str(tmp_path / "many"), n, n_slices)
    for name in RECIPES:
        one, many = of_one[name], of_many[name]
        assert one["l0"][0] == many["l0"][0]
        for column, tolerance in (("loss", 2e-3), ("fvu", 2e-3), ("l0", 2e-2), ("gradient_norm", 2e-2), ("auxk_loss", 2e-2)):
            torch.testing.assert_close(torch.tensor(many[column].to_list()), torch.tensor(one[column].to_list()), rtol=tolerance, atol=1e-5, msg=name)
        assert list(one["dead_share"]) == pytest.approx(list(many["dead_share"]), abs=0.05)
    assert max(of_one["topk"]["auxk_loss"]) > 0


@pytest.mark.slow
def test_an_sae_that_fails_in_the_processes_fails_here_and_alone(make_planted, tmp_path) -> None:
    """With its type and its message; the other one of the same processes is trained."""
    root = str(tmp_path)
    planted = make_planted([TINY, {**TINY, "name": "b", "learning_rate": 1e25}], root=root)
    pipeline = with_processes(planted.pipeline, root, 2)
    store = open_pipeline_store(pipeline.config)
    save_plan(store, pipeline.plan)
    found = run_training(pipeline, store, ["b", "a"])
    assert list(found.made) == ["a"]
    with pytest.raises(NonFiniteError, match=r"The loss of SAE .b. is .* at step"):
        found.take("b")
