"""Several training processes do what one does."""

import io

import polars as pl
import pytest
import torch

from interp_assets.errors import ConfigError, NonFiniteError
from interp_assets.manifest import read_file
from interp_assets.pipeline import Pipeline, open_pipeline_store, save_plan
from interp_assets.train.launch import run_training
from interp_assets.train.parallel import ONE_RANK, Ranks

TINY = {"name": "a", "d_sae": 48, "k": 2, "n_rows": 1500, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 300}


def with_processes(pipeline: Pipeline, root: str, n: int) -> Pipeline:
    """Return the pipeline at another root, trained by `n` processes."""
    execution = pipeline.config.execution.model_copy(update={"processes": n})
    return Pipeline(pipeline.config.model_copy(update={"execution": execution, "root": root}), pipeline.plan)


def test_ranks_share_a_batch_without_loss() -> None:
    """Contiguous shares that cover every row."""
    shares = [Ranks(rank, 4).share(100) for rank in range(4)]
    assert [row for share in shares for row in range(100)[share]] == list(range(100))


def test_ranks_that_do_not_divide_the_batch_are_refused_with_those_that_do() -> None:
    """Dropping the remainder would lose data on every step."""
    with pytest.raises(ConfigError, match=r"3 training processes don't divide batch_rows = 100. .* \[1, 2, 4, 5, 10, 20, 25, 50\]"):
        Ranks(0, 3).share(100)


def test_one_rank_needs_no_process_group() -> None:
    """Each operation answers with its input."""
    value = torch.arange(3.0)
    assert ONE_RANK.sum(value) is value
    assert ONE_RANK.gather_rows(value) is value
    ONE_RANK.sum_all([value])
    ONE_RANK.barrier()


def test_processes_cannot_share_a_store_in_memory(make_planted) -> None:
    """They would find nothing there."""
    planted = make_planted([TINY])
    with pytest.raises(ConfigError, match="several training processes need a folder or a bucket"):
        run_training(with_processes(planted.pipeline, "memory://x", 2), planted.store, ["a"])


@pytest.mark.slow
def test_two_processes_train_like_one(make_planted, tmp_path) -> None:
    """Gradients, the batch's top k, L0 and dead latents are those of the global batch."""
    saes = [{**TINY, "name": architecture, "architecture": architecture} for architecture in ("batch_topk", "jump_relu", "gated")]
    names = [sae["name"] for sae in saes]
    logs: list[dict[str, pl.DataFrame]] = []
    for n in (1, 2):
        root = str(tmp_path / f"processes-{n}")
        pipeline = with_processes(make_planted(saes, root=root).pipeline, root, n)
        store = open_pipeline_store(pipeline.config)
        save_plan(store, pipeline.plan)
        seen, heard = [], []
        produced = run_training(pipeline, store, names, seen.append, heard.append)
        assert sum(seen) == 4500
        assert sorted(metrics.row.step for metrics in heard) == sorted([*range(1, 16)] * 3)
        logs.append(
            {name: pl.read_parquet(io.BytesIO(read_file(store, item.ref.path, item.manifest, "training.parquet"))) for name, item in produced.items()}
        )
    for name in names:
        for column, tolerance in (("loss", 2e-3), ("fvu", 2e-3), ("l0", 1e-2), ("gradient_norm", 2e-2)):
            one, two = (torch.tensor(log[name][column].to_list()) for log in logs)
            torch.testing.assert_close(one, two, rtol=tolerance, atol=1e-5)
        assert list(logs[0][name]["dead_share"]) == pytest.approx(list(logs[1][name]["dead_share"]), abs=0.05)


@pytest.mark.slow
def test_an_error_in_a_process_is_raised_here(make_planted, tmp_path) -> None:
    """With its type and its message, and without workers left behind."""
    root = str(tmp_path)
    planted = make_planted([TINY], root=root, nan_row=700)
    pipeline = with_processes(planted.pipeline, root, 2)
    store = open_pipeline_store(pipeline.config)
    save_plan(store, pipeline.plan)
    with pytest.raises(NonFiniteError, match="is nan at step 7"):
        run_training(pipeline, store, ["a"])
