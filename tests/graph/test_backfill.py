"""Partial backfills: only what failed, is missing or was made from other bytes is made, in Python and on the command line."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from road_world import Finished, copied_history
from sixteen_shards import BAD, N_SHARDS, damage, make_sixteen, open_finished
from typer.testing import CliRunner, Result

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ConfigError
from interp_assets.graph.backfill import find_failed, run_backfill
from interp_assets.graph.jobs import RunError, dagster_home, open_instance, recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.progress import AssetReport, Progress
from interp_assets.storage.manifest import create_artifact, load_manifest, read_file
from interp_assets.terminal.cli import app


@pytest.fixture(scope="module")
def many(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Return a finished pipeline of 16 shards. Tests copy it."""
    folder = tmp_path_factory.mktemp("many")
    config = make_sixteen(tiny_world, folder)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Finished(config, instance, list(run_road(config, instance)))


@pytest.fixture
def copied(many: Finished, tmp_path: Path) -> PipelineConfig:
    """Return a configuration on a copy of the finished artifacts, to be damaged."""
    shutil.copytree(many.config.root, tmp_path / "data")
    return elsewhere(many, tmp_path)


def elsewhere(finished: Finished, folder: Path) -> PipelineConfig:
    """Return the configuration of a finished pipeline at another root."""
    return finished.config.model_copy(update={"root": str(folder / "data")})


def stop_of(config: PipelineConfig, name: str) -> Asset:
    """Return an asset of the road."""
    return next(stop for stop in make_road(config) if stop.name == name)


def made(reports: list[AssetReport]) -> dict[str, int]:
    """Return how many partitions of each asset were run: made, or found and recorded."""
    return {item.name: item.n_made + item.n_found for item in reports}


def test_three_of_sixteen_fail_and_only_these_are_made_again(many: Finished, copied: PipelineConfig) -> None:
    """The heart of it: 13 shards are kept, 3 are made again, and since their bytes are the old ones nothing behind them runs."""
    with copied_history(many) as instance:
        versions = {stop.name: recorded_versions(instance, stop) for stop in make_road(copied)}
        good = damage(copied)
        (first,) = [item for item in run_backfill(copied, instance, select=["activations"]) if item.failed]
        assert first.failed == list(BAD)
        assert "tokens.parquet is damaged in block 0" in first.message
        assert find_failed(stop_of(copied, "activations"), [f"shard-{i:06d}" for i in range(N_SHARDS)], instance) == list(BAD)
        for path, data in good.items():
            path.write_bytes(data)
        assert made(list(run_backfill(copied, instance, only_failed=True))) == {"activations": 3}
        assert {stop.name: recorded_versions(instance, stop) for stop in make_road(copied)} == versions
        assert list(run_backfill(copied, instance)) == []


def test_ctrl_c_stops_a_run_in_the_middle_of_a_partition_and_keeps_finished_ones(many: Finished, tmp_path: Path) -> None:
    """Dagster hears an interrupt between two events of a step and takes it for a failure; a person wants the command to end now."""
    config = elsewhere(many, tmp_path)
    begun: list[tuple[str, str]] = []

    class Interrupting(Progress):
        def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
            begun.append((asset, partition))

        def advance(self, n: int) -> None:
            if begun[-1] == ("activations", "shard-000004") and begun.count(begun[-1]) == 1:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(KeyboardInterrupt):
            list(run_road(config, instance, progress=Interrupting()))
        assert begun[-1] == ("activations", "shard-000004")
        assert begun.count(begun[-1]) == 1
        assert sorted(recorded_versions(instance, stop_of(config, "activations"))) == [f"shard-{i:06d}" for i in range(4)]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_ctrl_c_stops_a_training_in_the_middle(many: Finished, tmp_path: Path) -> None:
    """All SAEs of a run train before the first of them is recorded: an interrupt that Dagster kept for later was forgotten there."""
    shutil.copytree(Path(many.config.root) / many.config.name, tmp_path / "data" / many.config.name)
    folders = [path.parent for path in (tmp_path / "data" / many.config.name / "4-sae").glob("*/sae_weights.safetensors")]
    for folder in folders:
        shutil.rmtree(folder)
    config = elsewhere(many, tmp_path)
    begun, n_advanced = [], []

    class Interrupting(Progress):
        def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
            begun.append(asset)

        def advance(self, n: int) -> None:
            if begun[-1] == "sae":
                n_advanced.append(n)
                if len(n_advanced) == 2:
                    os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with copied_history(many) as instance:
        with pytest.raises(KeyboardInterrupt):
            list(run_road(config, instance, select=["sae"], progress=Interrupting()))
        assert begun[-1] == "sae"
        assert len(n_advanced) == 2
        assert not any((folder / "manifest.json").exists() for folder in folders)
        list(run_road(config, instance, select=["sae"]))
        assert all((folder / "manifest.json").exists() for folder in folders)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_named_partition_with_a_flipped_byte_is_made_again(many: Finished, copied: PipelineConfig) -> None:
    """A file of the right size counts as done wherever nothing is read; who names a partition wants its bytes."""
    with copied_history(many) as instance:
        (rows,) = Path(copied.root).glob("*/2-activations/*/shard-000002-*/rows.safetensors")
        good = rows.read_bytes()
        rows.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert list(run_backfill(copied, instance)) == []
        reports = list(run_backfill(copied, instance, select=["activations"], partitions=["shard-000002"]))
        assert made(reports) == {"activations": 1}
        assert rows.read_bytes() == good
        assert list(run_backfill(copied, instance)) == []


def test_a_run_says_which_shards_failed_and_a_backfill_finishes_the_road(many: Finished, tmp_path: Path) -> None:
    """The first run of a pipeline meets three bad shards: a backfill makes them and all that was waiting for them."""
    reports: list[AssetReport] = []
    shutil.copytree(Path(many.config.root) / many.config.name / "1-corpus", tmp_path / "data" / many.config.name / "1-corpus")
    config = elsewhere(many, tmp_path)
    shutil.copy(Path(many.config.root) / many.config.name / "plan.json", tmp_path / "data" / many.config.name / "plan.json")
    with dg.DagsterInstance.ephemeral() as instance:
        good = damage(config)
        with pytest.raises(RunError, match=r"3 of 16 partitions failed .*the finished ones are kept"):
            reports.extend(run_road(config, instance))
        ran = {item.name: item for item in reports}
        assert ran["shuffle_pass_1"].n_made == N_SHARDS - 3 - 1  # the held-out shard has no share
        stuck = {item.name: item for item in run_backfill(config, instance)}
        assert stuck["activations"].failed == list(BAD)
        assert stuck["shuffle_pass_1"].waiting == list(BAD)
        assert stuck["shuffle_pass_1"].n_made == 0  # the run has made what it could
        assert stuck["sae"].waiting == ["demo", "other"]
        for path, data in good.items():
            path.write_bytes(data)
        done = made(list(run_backfill(config, instance, only_failed=True)))
        assert (done["activations"], done["shuffle_pass_1"], done["sae"]) == (3, 3, 2)
        assert "token_shards" not in done
        names = {stop.name: recorded_versions(instance, stop) for stop in make_road(config).rest}
        assert names == {stop.name: recorded_versions(many.instance, stop) for stop in make_road(config).rest}


def test_other_bytes_under_the_same_id_are_noticed(many: Finished, copied: PipelineConfig) -> None:
    """A token shard that was made elsewhere with another digest makes its own activations and the statistics out of date, and no other shard's."""
    with copied_history(many) as instance:
        pipeline, store = open_finished(copied)
        ref = token_shard_ref(pipeline, 3)
        old = load_manifest(store, ref)
        files = {entry.name: (read_file(store, ref.path, old, entry.name), entry.n_rows) for entry in old.files}
        with create_artifact(store, ref, replace=True) as art:
            for name, (data, n_rows) in files.items():
                art.put(name, data, n_rows=n_rows, block_bytes=1 << 20)  # other blocks: another manifest, another digest
            art.facts |= old.facts
        assert load_manifest(store, ref).digest != old.digest
        done = made(list(run_backfill(copied, instance, select=["token_shards", "activations", "activation_statistics"])))
        assert done == {"token_shards": 1, "activations": 1, "activation_statistics": 1}


def test_a_named_partition_is_made_whatever_its_state(many: Finished, copied: PipelineConfig) -> None:
    """A person who asks for one shard of one asset gets a run of it, and of nothing else."""
    with copied_history(many) as instance:
        assert made(list(run_backfill(copied, instance, select=["activations"], partitions=[BAD[0]]))) == {"activations": 1}
        with pytest.raises(ConfigError, match=r"There is no partition 'shard-3' in activations. They look like \['shard-000000'"):
            list(run_backfill(copied, instance, select=["activations"], partitions=["shard-3"]))


@pytest.mark.slow
def test_the_command_lines_make_the_same_partitions(copied: PipelineConfig, tmp_path: Path) -> None:
    """`interp backfill --failed` and Dagster's own command share one history; the exit code says whether something is left."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(copied.model_dump()))
    environment = {**os.environ, "INTERP_CONFIG": str(tmp_path / "p.yaml"), "DAGSTER_HOME": str(dagster_home(copied)), "PYTHONWARNINGS": "ignore"}
    dagster = ["-m", "dagster", "asset", "materialize", "-m", "interp_assets.graph.definitions", "--select", "activations", "--partition", BAD[0]]

    def interp_backfill(*options: str) -> Result:
        command = ["backfill", "--config", str(tmp_path / "p.yaml"), "--select", "activations", *options]
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, command)

    with open_instance(copied) as instance:
        list(run_road(copied, instance, select=["token_shards", "activations"]))
        good = damage(copied)
        failed = interp_backfill()
        assert failed.exit_code == 1
        assert f"3 failed: {', '.join(BAD)}" in failed.stdout
        for path, data in good.items():
            path.write_bytes(data)
        done = subprocess.run([sys.executable, *dagster], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        rest = interp_backfill("--failed")
        assert rest.exit_code == 0, rest.output
        assert "activations: 2 partitions to make" in rest.stdout
        assert ["activations", "2", "made,", "14", "there", "already"] in [line.split()[:6] for line in rest.stdout.splitlines()]
        records = instance.fetch_materializations(dg.AssetKey("activations"), limit=100).records
        assert len(records) == N_SHARDS + 3


CRASHING = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
from interp_assets.planning.config import load_config
from interp_assets.graph.jobs import open_instance, run_road
from interp_assets.planning.progress import AssetReport, Progress
class Dying(Progress):
    n = 0
    def begin(self, asset, partition, n_units=None):
        self.n += asset == "activations"
        if self.n == 4:
            os.kill(os.getpid(), signal.SIGKILL)
config = load_config(sys.argv[1])
with open_instance(config) as instance:
    list(run_road(config, instance, select=["token_shards", "activations"], progress=Dying()))
"""


def test_a_crash_in_a_range_keeps_every_finished_partition(tiny_world: Path, tmp_path: Path) -> None:
    """One run makes all shards and is killed in the fourth: three are recorded, its run is known to be dead, and only the others are made."""
    config = make_sixteen(tiny_world, tmp_path, n_shards=6)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    crashed = subprocess.run([sys.executable, "-c", CRASHING, str(tmp_path / "p.yaml")], cwd=tmp_path, capture_output=True, check=False)
    assert crashed.returncode == -9
    with open_instance(config) as instance:
        kept = {f"shard-{i:06d}" for i in range(3)}
        assert instance.get_materialized_partitions(dg.AssetKey("activations")) == kept
        assert set(recorded_versions(instance, stop_of(config, "activations"))) == kept
        (run,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        assert instance.run_launcher.check_run_worker_health(run).status.value == "FAILED"
        assert made(list(run_backfill(config, instance, select=["activations"]))) == {"activations": 6 - 3}
        assert list(run_backfill(config, instance, select=["token_shards", "activations"])) == []
