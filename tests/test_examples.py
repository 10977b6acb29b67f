"""The examples that the README points at stay valid."""

from pathlib import Path

import pytest

from interp_assets.planning.config import load_config, make_config
from interp_assets.shuffle.choice import choose
from interp_assets.shuffle.plan import ShardRows, job_bytes
from interp_assets.shuffle.rows import RowFormat

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_there_are_examples() -> None:
    """An empty folder must not pass."""
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_valid_configuration(path: Path) -> None:
    """A newcomer copies one of them first."""
    assert load_config(path).saes


def test_the_readme_configuration_is_valid() -> None:
    """It is what people paste: valid, and its shards fit a job's memory with twice the rows that its comment expects; the plan chooses the rest."""
    import yaml

    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    config = make_config(yaml.safe_load(text))
    assert config.features.saes == ["l8"]
    corpus, fmt = config.corpus, RowFormat(768, config.harvest.dtype)
    n_rows = 2 * 1000 * corpus.documents_per_shard
    assert 1000 * corpus.documents_per_shard * corpus.max_shards == 30_000_000
    assert job_bytes(n_rows, fmt) <= config.shuffle.memory_bytes
    assert choose([ShardRows(i, n_rows, n_rows) for i in range(corpus.max_shards - 1)], fmt, config.shuffle.memory_bytes).passes == 2
