"""Processes die at random points of every stage, run out of disk, meet each other, or have a wrong clock: the bytes in the end are the same."""

import multiprocessing as mp
import os
import resource
import signal
import threading
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import dagster as dg
import pytest
from fault_tally import RIGHT, Tally
from road_world import Finished, assert_as_if_nothing_happened, make_road_config
from s3_server import start_s3_server

from interp_assets.compute.seeds import stream
from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import make_token_shard
from interp_assets.garcon.subject import SubjectModel, load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.graph.jobs import RunError, recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.harvest.activations import harvest_shard
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import open_pipeline_store
from interp_assets.planning.progress import Progress
from interp_assets.storage.manifest import ArtifactWriter, find_manifest, make_ref, remove_artifact
from interp_assets.storage.store import open_store
from interp_assets.storage.verify import verify_tree

FORK = mp.get_context("forkserver")
FORK.set_forkserver_preload(["interp_assets.graph.jobs", "road_world"])
MAX_DELAY_S = 0.15
SEED = int(os.environ.get("FAULT_SEED", "0"))
"""Of the moments; another one is another run of the suite."""


class _Telling(Progress):
    """Tells the parent which asset begins."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
        self._pipe.send(asset)


def _run(config: PipelineConfig, pipe: Connection, max_file_bytes: int, environment: dict[str, str]) -> None:
    """Run the road in a child."""
    os.environ.update(environment)
    if max_file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    with dg.DagsterInstance.ephemeral() as instance:
        try:
            list(run_road(config, instance, progress=_Telling(pipe)))
        except RunError as error:
            pipe.send(f"error: {error}")
    pipe.send("end")


def run_until(config: PipelineConfig, asset: str, delay_s: float, max_file_bytes: int = 0, environment: dict[str, str] | None = None) -> str:
    """Run the road in a child and kill it `delay_s` after `asset` begins; return the last thing it said."""
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_run, args=(config, theirs, max_file_bytes, environment or {}))
    child.start()
    theirs.close()
    said = ""
    try:
        while said != "end" and not said.startswith("error"):
            said = ours.recv()
            if said == asset:
                child.join(delay_s)
                break
    except EOFError:
        said = "died"
    if child.is_alive() and said == asset:
        os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    return said


def test_a_process_that_is_killed_in_any_stage_loses_and_doubles_nothing(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """One store, a SIGKILL at a random moment of every asset, in order; then the road to its end."""
    config = make_road_config(tiny_world, tmp_path / "data")
    draws = stream(SEED, "faults", "kills")
    n_killed = sum(run_until(config, stop.name, draws.uniform() * MAX_DELAY_S) == stop.name for stop in make_road(config))
    assert n_killed >= len(make_road(config).rest)
    tally.fault("processes killed at a random moment of every asset", n_killed)
    assert run_until(config, "never", 0.0) == "end"
    tally.right(assert_as_if_nothing_happened(config, finished))


@pytest.mark.s3
def test_a_process_that_is_killed_while_it_writes_to_a_bucket_leaves_no_half_of_anything(
    finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally
) -> None:
    """Four large writers, on S3: uploads are abandoned in the middle, and what lies there is whole or not there."""
    server = start_s3_server(tmp_path / "s3")
    try:
        options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
        config = make_road_config(tiny_world, tmp_path / "data").model_copy(update={"root": "s3://test/killed"})
        draws = stream(SEED, "faults", "kills", "s3")
        assets = ("activations", "mixed_shards", "sae", "features/demo/feature_candidates")
        for asset in assets:
            assert run_until(config, asset, draws.uniform() * MAX_DELAY_S, environment=server.environment) == asset
        tally.fault("processes killed while they wrote to a bucket", len(assets))
        assert run_until(config, "never", 0.0, environment=server.environment) == "end"
        store = open_store(f"s3://test/killed/{config.name}", s3=options)
        tally.right(assert_as_if_nothing_happened(config, finished, store))
    finally:
        server.stop()


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """Files may grow to 12 kB only, as on a full disk: the message says what to do; with room again the bytes are the same."""
    config = make_road_config(tiny_world, tmp_path / "data")
    said = run_until(config, "never", 0.0, max_file_bytes=12_000)
    assert said.startswith("error: ")
    assert "Could not write" in said
    assert "Free some space and run the same command again" in said
    tally.fault("runs whose files may not grow")
    assert run_until(config, "never", 0.0) == "end"
    tally.right(assert_as_if_nothing_happened(config, finished), n_refused=1)


def test_writers_of_one_shard_make_one_artifact(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """A run that was thought dead and the one that replaced it: both finish, one manifest stands, its bytes are right."""
    config = make_road_config(tiny_world, tmp_path / "data")
    store = open_pipeline_store(config)
    pipeline = plan_corpus(config, store)
    tokenizer = load_tokenizer(config.model)
    models = [load_subject_model(config.model, config.execution) for _ in range(3)]
    errors: list[str] = []

    def work(model: SubjectModel) -> None:
        for index in pipeline.shard_indices:
            try:
                make_token_shard(pipeline, store, tokenizer, index)
                harvest_shard(pipeline, store, model, index)
            except Exception as error:  # noqa: BLE001 - counted below
                errors.append(str(error))

    for round_ in range(6):
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work(models[0])
        tally.fault("shards written by three writers at once", len(pipeline.shard_indices) * 2)
        made: set[str] = set()
        for stop in make_road(config).rest[:2]:
            found = {key: make_road(pipeline.config).find_version(stop, pipeline, store, key) for key in stop.partition_keys(pipeline)}
            assert found == recorded_versions(finished.instance, stop), (stop.name, errors)
            for key in stop.partition_keys(pipeline):
                made.update(ref.path for ref in stop.artifacts(pipeline, store, key))
        for path in made if round_ < 5 else ():
            remove_artifact(store, path)
    assert verify_tree(store) == []
    tally.outcomes[RIGHT] += 1


@pytest.mark.parametrize("year", [1970, 2106])
def test_a_wrong_clock_changes_no_digest(year: int, tmp_path: Path, tally: Tally) -> None:
    """Machines disagree about the time: an artifact from 1970 or 2106 is the same artifact."""
    ref = make_ref("example", "1-stage", identity={}, inputs={}, label="shard-000000")
    digests = set()
    for i, created in enumerate((datetime(year, 1, 1, tzinfo=UTC), datetime.now(UTC))):
        store = open_store(str(tmp_path / str(i)))
        writer = ArtifactWriter(store, ref)
        writer.put("a.bin", b"data")
        writer.publish(created)
        found = find_manifest(store, ref)
        assert found is not None
        digests.add(found.digest)
    assert len(digests) == 1
    tally.fault("artifacts published with a wrong clock")
    tally.outcomes[RIGHT] += 1
