"""The examples that the README points at stay valid."""

from pathlib import Path

import pytest

from interp_assets.planning.config import load_config, make_config
from interp_assets.shuffle.estimate import estimate_passes

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
    """It is what people paste: valid, and with a shuffle whose jobs fit the memory that they are given."""
    import yaml

    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    config = make_config(yaml.safe_load(text))
    assert config.features.saes == ["l8"]
    n_rows, shuffle = 87_000_000, config.shuffle  # what its comment promises; 768 values in bfloat16 and a row id
    assert estimate_passes(n_rows, 768 * 2 + 8, shuffle.memory_bytes, (shuffle.passes, shuffle.fan_out)).memory_bytes <= shuffle.memory_bytes
