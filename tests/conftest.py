"""What all tests share: stores and a small pipeline whose plan is made by hand."""

import own_place  # isort: skip - before what reads the environment when it is imported
import checked  # noqa: F401 # isort: skip - before the package, whose types it has checked

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.storage.store import Store, open_store

torch.set_num_threads(1)  # for what several tests share
settings.register_profile("untimed", settings.default, deadline=None)  # how long an example takes says what else the machine does
settings.load_profile("untimed")


def pytest_unconfigure() -> None:
    """Remove the folders that tests ran in."""
    own_place.remove_places()


@pytest.fixture(scope="session", autouse=True)
def _shared_place() -> None:
    """Make what several tests share in an empty folder, too."""
    own_place.enter(own_place.SESSION)


_numbers = count()


@pytest.fixture(autouse=True)
def _place() -> Iterator[None]:
    """Run each test in an empty folder with an empty home, so that it finds nothing of `make demo`'s; fail one that writes into the checkout."""
    before = own_place.list_checkout()
    place = own_place.make_place(f"test-{next(_numbers)}")
    own_place.enter(place)
    yield
    own_place.enter(own_place.SESSION)
    shutil.rmtree(place, ignore_errors=True)  # a program that was killed may still end there
    left = own_place.list_checkout() - before
    assert not left, f"This test, or one beside it, left {sorted(left)} at the root of the checkout: write below tmp_path."


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices, and a test process on every core: more threads only wait for each other. What a test sets is not left to the next."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def memory_store() -> Store:
    """Return an empty store in memory."""
    return open_store("memory://test")


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    """Return an empty store in a temporary folder."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def small_config() -> PipelineConfig:
    """Return a configuration of four small shards, one of them held out."""
    return make_config(
        {
            "name": "small",
            "corpus": {"source": "files", "path": "nowhere", "context_length": 16, "held_out_shards": 1},
            "harvest": {"hook_points": ["resid_post.0"]},
            "shuffle": {"fan_out": 2},
            "saes": [{"name": "demo", "hook_point": "resid_post.0", "d_sae": 32, "k": 4}],
        }
    )


@pytest.fixture
def small_pipeline(small_config: PipelineConfig) -> Pipeline:
    """Return the small configuration with a plan made by hand."""
    shards = [ShardSource(index=i, fingerprint=f"text-{i}", n_documents=2, n_bytes=100, spec={"files": [f"{i}.txt"]}) for i in range(4)]
    plan = PipelinePlan(
        shards=shards,
        tokenizer_fingerprint="tokenizer",
        model_fingerprint="model",
        hook_widths={"resid_post.0": 8},
        vocabulary_size=50,
        max_context=32,
    )
    return Pipeline(small_config, plan)
