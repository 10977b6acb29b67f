"""The road is run: everything is recorded with the digests of its bytes, twice gives the same, and faults cost one partition."""

import shutil
import signal
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContext
from measured_saes import load_table
from road_world import Finished, copied_history, make_road_config

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.graph.backfill import run_backfill
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.events import as_metadata
from interp_assets.graph.jobs import RunError, explain_failure, find_missing, recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.planning.progress import AssetReport, Progress, format_bytes
from interp_assets.shuffle.refs import certificate_ref
from interp_assets.storage.manifest import create_artifact, remove_artifact
from interp_assets.storage.store import Store

SHARD = "shard-000002"


class _Loading(LoadingContext):
    """What Dagster's stale-status resolver wants to be handed."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance, self._loaders = instance, {}

    @property
    def instance(self) -> dg.DagsterInstance:
        return self._instance

    @property
    def loaders(self) -> dict:
        return self._loaders


def open_finished(config: PipelineConfig) -> tuple[Pipeline, Store]:
    """Open store and plan of a pipeline that has been run."""
    store = open_pipeline_store(config)
    return load_pipeline(config, store), store


def all_versions(config: PipelineConfig, instance: dg.DagsterInstance) -> dict[str, dict[str, str]]:
    """Return the recorded data version of every partition of every asset."""
    return {stop.name: recorded_versions(instance, stop) for stop in make_road(config)}


def stale_partitions(config: PipelineConfig, instance: dg.DagsterInstance) -> list[str]:
    """List what Dagster would show as stale or missing."""
    pipeline, _ = open_finished(config)
    resolver = CachingStaleStatusResolver(instance, build_defs(config).resolve_asset_graph(), _Loading(instance))
    return [
        f"{stop.name} {key}".strip()
        for stop in make_road(config)
        for key in stop.partition_keys(pipeline)
        if resolver.get_status(dg.AssetKey(list(stop.key)), key or None).value != "FRESH"
    ]


def materialize(config: PipelineConfig, instance: dg.DagsterInstance, name: str, partition: str | None) -> dg.ExecuteInProcessResult:
    """Materialize one partition the way a person does in Python."""
    job = build_defs(config).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(name.split("/"))], partition_key=partition, raise_on_error=False)


def test_every_partition_is_recorded_with_the_digest_of_its_artifacts(finished: Finished) -> None:
    """The data version is the digest of what lies in the store; so staleness follows bytes, not clicks."""
    pipeline, store = open_finished(finished.config)
    for stop in make_road(finished.config).rest:
        recorded = recorded_versions(finished.instance, stop)
        assert recorded == {key: make_road(pipeline.config).find_version(stop, pipeline, store, key) for key in stop.partition_keys(pipeline)}


def test_every_partition_has_one_event(finished: Finished) -> None:
    """Dagster's own event for a range is suppressed: a second event would carry no digest and hide the first."""
    pipeline, _ = open_finished(finished.config)
    for stop in make_road(finished.config):
        events = finished.instance.fetch_materializations(dg.AssetKey(list(stop.key)), limit=1000).records
        assert len(events) == len(stop.partition_keys(pipeline)), stop.name


def test_events_say_what_people_ask(finished: Finished) -> None:
    """Rows, bytes, seconds, where, digest and whether it was there before; plots where a number is not enough."""
    for stop in make_road(finished.config).rest:
        event = finished.instance.get_latest_materialization_event(dg.AssetKey(list(stop.key)))
        assert event is not None
        assert event.asset_materialization is not None
        metadata = event.asset_materialization.metadata
        assert {"rows", "bytes", "seconds", "digest", "reused"} <= set(metadata), stop.name
    plotted = {"activation_statistics": "norms.resid_post.0", "shuffle_certificate": "mixing.resid_post.0", "sae": "training"}
    pictures = [*plotted.items(), ("sae_evaluation", "firing_frequency"), ("sweep", "pareto"), ("sweep", "learning_curves")]
    for name, key in pictures:
        event = finished.instance.get_latest_materialization_event(dg.AssetKey(name))
        assert event is not None
        assert event.asset_materialization is not None
        text = str(event.asset_materialization.metadata[key].value)
        assert "data:image/png;base64," in text
        assert len(text) < 40_000


def test_what_is_measured_is_a_number_of_its_own(finished: Finished) -> None:
    """Dagster's UI draws numbers over experiments and time; inside JSON it draws nothing. What counts bytes stands there for people, too."""
    measured = {
        "sae_evaluation": {"fvu", "l0", "ce_recovered", "kl", "dead_share"},
        "sae": {"fvu", "l0", "loss", "dead_share", "input_wait_share"},
        "activations": {"mean_norm.resid_post.0"},
        "activation_statistics": {"mean_norm.resid_post.0", "max_mean_ratio.resid_post.0"},
        "shuffle_certificate": {"lowest_p.resid_post.0"},
        "token_shards": {"n_valid"},
    }
    for name, wanted in measured.items():
        for record in finished.instance.fetch_materializations(dg.AssetKey(name), limit=100).records:
            event = record.asset_materialization
            assert event is not None
            numbers = {key for key, value in event.metadata.items() if isinstance(value, dg.FloatMetadataValue | dg.IntMetadataValue)}
            assert wanted | {"rows", "bytes"} <= numbers, name
            assert event.metadata["size"].value == format_bytes(int(str(event.metadata["bytes"].value)))
            (row,) = [row.data for row in event.metadata["cost"].records if row.data["what"] == "bytes written"]
            assert row["in short"].endswith(f"{format_bytes(int(row['actual']))} taken")
            facts = event.metadata.get("facts")
            assert facts is None or not [key for key, value in facts.value.items() if not isinstance(value, str | bool)], name


def test_numbers_that_json_lacks_become_text() -> None:
    """A loss of NaN must not break the whole answer of Dagster's server: its floats are JSON's."""
    assert [as_metadata(value) for value in (float("nan"), float("-inf"), 0.1234567, 3)] == ["nan", "-inf", 0.123457, 3]


def test_every_check_answers_for_every_partition(finished: Finished) -> None:
    """One answer for a run of many partitions left each of them "skipped" in the UI, however the check went."""
    pipeline, _ = open_finished(finished.config)
    checks = [(stop, check.name) for stop in make_road(finished.config) for check in stop.checks]
    assert len(checks) >= 6
    for stop, name in checks:
        key = dg.AssetCheckKey(dg.AssetKey(list(stop.key)), name)
        records = finished.instance.event_log_storage.get_asset_check_execution_history(key, limit=1000)
        assert sorted(record.partition or "" for record in records) == sorted(stop.partition_keys(pipeline)), name
        for record in records:
            evaluation = record.evaluation
            assert evaluation is not None, (name, record.partition, record.status)
            assert evaluation.metadata, key
            assert evaluation.passed or name == "quality_bounds", key  # a tiny SAE on random weights need not be good
            target = evaluation.target_materialization_data
            assert target is not None
            assert target.run_id == record.run_id


def test_tags_that_people_see_are_short(finished: Finished) -> None:
    """The list of runs shows them under every run; the name of a process, of 80 characters, is for machines."""
    for run in finished.instance.get_runs():
        seen = {key: value for key, value in run.tags.items() if not key.startswith(".dagster/")}
        assert all(len(value) <= 40 for value in seen.values()), seen


def test_nothing_is_stale_after_a_run(finished: Finished) -> None:
    """A run in ranges must leave the same picture as clicking each partition."""
    assert stale_partitions(finished.config, finished.instance) == []


def test_a_second_run_finds_nothing_to_do(finished: Finished) -> None:
    """`make demo` a second time takes seconds, because finished work is recognised."""
    with copied_history(finished) as instance:
        reports = list(run_road(finished.config, instance))
        assert {report.name: report.n_made for report in reports if report.n_made} == {"corpus_plan": 1}
        assert stale_partitions(finished.config, instance) == []


def test_the_whole_graph_twice_gives_the_same_bytes(finished: Finished, tiny_world: Path, tmp_path: Path) -> None:
    """Same inputs, same bytes, from text to the browser's bundle: in another folder, with other batch sizes."""
    execution = {"device": "cpu", "tokens_per_batch": 512, "rows_per_block": 128}
    config = make_road_config(tiny_world, tmp_path / "other", execution=execution)
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance))
        again, first = all_versions(config, instance), all_versions(finished.config, finished.instance)
    assert {name for name in first if again[name] != first[name]} == set()


@pytest.fixture
def copied(finished: Finished, tmp_path: Path, tiny_world: Path) -> PipelineConfig:
    """Return a configuration on a copy of the finished artifacts, to be damaged."""
    root = Path(finished.config.root)
    shutil.copytree(root, tmp_path / "copy")
    return make_road_config(tiny_world, tmp_path / "copy")


def test_a_run_in_the_background_can_still_be_ended(finished: Finished, copied: PipelineConfig) -> None:
    """A shell's background job ignores SIGINT; Dagster would let SIGTERM do the same after its first run, and `kill` would do nothing."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with copied_history(finished) as instance:
            assert list(run_road(copied, instance, select=["token_shards"]))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_corrupted_shard_that_is_rebuilt_leaves_downstream_fresh(finished: Finished, copied: PipelineConfig) -> None:
    """One flipped byte costs one partition: its reader refuses it, rebuilding it gives the same digest, and nothing else is stale."""
    pipeline, store = open_finished(copied)
    with copied_history(finished) as instance:
        before = all_versions(copied, instance)
        ref = activation_shard_ref(pipeline, "resid_post.0", 2)
        flip_byte(Path(copied.root) / copied.name / ref.path / "rows.safetensors", -5)
        remove_artifact(store, certificate_ref(pipeline, "resid_post.0").path)
        failed = materialize(copied, instance, "features/demo/feature_candidates", "slice-000|" + SHARD)
        assert failed.success  # its own artifact is there; nothing is read
        for name in ("shuffle_pass_1",):
            drop_artifacts(copied, name, SHARD)
            refused = materialize(copied, instance, name, SHARD)
            assert not refused.success
            assert "rows.safetensors is damaged in block 0" in str(explain_failure("", refused))
        remove_artifact(store, ref.path)
        assert materialize(copied, instance, "activations", SHARD).success
        assert list(run_road(copied, instance))
        assert all_versions(copied, instance) == before
        assert stale_partitions(copied, instance) == []


def test_a_range_keeps_what_it_finished_when_one_partition_fails(finished: Finished, copied: PipelineConfig) -> None:
    """Three of four shards are good: they are recorded, the bad one is named, and the next run makes only that one."""
    pipeline, store = open_finished(copied)
    stop = next(stop for stop in make_road(copied) if stop.name == "activations")
    for index in pipeline.shard_indices:
        remove_artifact(store, activation_shard_ref(pipeline, "resid_post.0", index).path)
    ref = token_shard_ref(pipeline, 2)
    tokens = Path(copied.root) / copied.name / ref.path / "tokens.parquet"
    good = tokens.read_bytes()
    flip_byte(tokens, 100)
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(RunError) as caught:
            list(run_road(copied, instance, select=["token_shards", "activations"]))
        n_shards = len(pipeline.shard_indices)
        assert f"1 of {n_shards} partitions failed ({SHARD}); the finished ones are kept" in str(caught.value)
        assert "tokens.parquet is damaged in block 0" in str(caught.value)
        assert find_missing(make_road(pipeline.config), stop, pipeline, store, instance) == [SHARD]
        tokens.write_bytes(good)
        reports = {report.name: report.n_made for report in run_road(copied, instance, select=["activations"])}
        assert reports == {"corpus_plan": 1, "activations": 1}


def test_one_bad_sae_of_a_sweep_costs_only_itself(finished: Finished, copied: PipelineConfig) -> None:
    """The others are trained, measured and compared, the bad one is named, and the command fails: it made nothing of all this."""
    fields = {**copied.saes[0].model_dump(), "name": "good", "seed": 1}
    config = make_config({**copied.model_dump(), "saes": [*copied.saes, fields, {**fields, "name": "bad", "learning_rate": 1e25}]})
    reports: list[AssetReport] = []
    with copied_history(finished) as instance:
        with pytest.raises(RunError, match=r"1 of 2 partitions failed \(bad\).*The loss of SAE 'bad' is"):
            reports.extend(run_road(config, instance, select=["sae", "sae_evaluation", "sweep"]))
        found = {report.name: report for report in reports}
        assert (found["sae"].n_made, found["sae"].failed) == (1, ["bad"])
        assert (found["sae_evaluation"].n_made, found["sae_evaluation"].failed, found["sae_evaluation"].waiting) == (1, [], ["bad"])
        assert sorted(recorded_versions(instance, next(stop for stop in make_road(config) if stop.name == "sae"))) == ["demo", "good", "other"]
        pipeline, store = open_finished(config)
        assert load_table(pipeline, store)["name"].to_list() == ["demo", "other", "good"]
        again = {item.name: item for item in run_backfill(config, instance)}
        assert (again["sae"].failed, again["sae_evaluation"].waiting) == (["bad"], ["bad"])


def test_a_stopped_sae_is_a_result_and_not_a_failure(finished: Finished, copied: PipelineConfig) -> None:
    """`stop` asks for it: the command is done, says who was given up and why, makes all else, and again does nothing more."""
    fields = {**copied.saes[0].model_dump(), "name": "good", "seed": 1}
    saes = [*copied.saes, fields, {**fields, "name": "slow", "learning_rate": 1e-9}]
    config = make_config({**copied.model_dump(), "saes": saes, "stop": {"at": [0.5], "margin": 0.0}})
    told: list[str] = []

    class Hearing(Progress):
        def tell(self, sentence: str) -> None:
            told.append(sentence)

    with copied_history(finished) as instance:
        for n_made in (1, 0):
            reports = {item.name: item for item in run_road(config, instance, select=["sae", "sae_evaluation", "sweep"], progress=Hearing())}
            for name in ("sae", "sae_evaluation"):
                found = reports[name]
                assert (found.n_made, found.n_reused, list(found.stopped), list(found.failed), list(found.waiting)) == (
                    n_made,
                    3 - n_made,
                    ["slow"],
                    [],
                    [],
                )
            assert sum("'slow' was stopped at step" in sentence for sentence in told) == 1
            told.clear()
        pipeline, store = open_finished(config)
        assert load_table(pipeline, store)["name"].to_list() == ["demo", "other", "good"]
        again = {item.name: item for item in run_backfill(config, instance, select=["sae", "sae_evaluation"])}
        assert [(item.stopped, item.failed, item.waiting) for item in again.values()] == [(["slow"], [], [])] * 2


def test_what_is_only_recorded_is_not_counted_as_made_or_written(finished: Finished) -> None:
    """A new history over finished artifacts writes nothing: "sae 1 made 169.2 kB" was said of it."""
    with dg.DagsterInstance.ephemeral() as instance:
        reports = list(run_road(finished.config, instance, select=["token_shards", "activations", "activation_statistics"]))[1:]
    assert [(report.n_made, report.n_bytes) for report in reports] == [(0, 0)] * 3
    assert [report.n_found for report in reports] == [report.n_partitions for report in reports]


def test_a_deleted_artifact_is_made_again(finished: Finished, copied: PipelineConfig) -> None:
    """Dagster remembers that a shard was made; the store decides whether it is there."""
    with copied_history(finished) as instance:
        drop_artifacts(copied, "activations", SHARD)
        reports = {report.name: report.n_made for report in run_road(copied, instance)}
        assert {name: n for name, n in reports.items() if n} == {"corpus_plan": 1, "activations": 1}


def test_training_refuses_a_shuffle_without_a_valid_certificate(finished: Finished, copied: PipelineConfig) -> None:
    """An SAE must not learn the order of its data, even when someone materializes it alone, past the blocking check."""
    pipeline, store = open_finished(copied)
    ref = certificate_ref(pipeline, "resid_post.0")
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(copied, instance, select=["token_shards"]))
        with create_artifact(store, ref, replace=True) as art:
            art.put("certificate.json", b"{}")
            art.facts["passed"] = False
        refused = materialize(copied, instance, "sae", "demo")
    assert not refused.success
    assert "The shuffle of resid_post.0 has no valid certificate" in str(explain_failure("", refused))


def test_new_text_makes_one_new_shard(tiny_world: Path, tmp_path: Path) -> None:
    """A landed file is one more partition; the shards that were there are found and not made again."""
    texts = tmp_path / "texts"
    shutil.copytree(tiny_world / "texts", texts)
    config = make_road_config(tiny_world, tmp_path / "data", corpus={"path": str(texts), "shard_bytes": 900})
    with dg.DagsterInstance.ephemeral() as instance:
        first = list(run_road(config, instance, select=["token_shards"]))
        (texts / "zz.txt").write_text("def more(text):\n    return text\n" * 40)
        second = list(run_road(config, instance, select=["token_shards"]))
        n_shards = first[1].n_partitions
        assert (second[1].n_partitions, second[1].n_made) == (n_shards + 1, 1)
        assert instance.get_dynamic_partitions("shards")[-1] == f"shard-{n_shards:06d}"
        (texts / "zz.txt").unlink()
        third = list(run_road(config, instance, select=["token_shards"]))
        assert (third[1].n_partitions, third[1].n_made) == (n_shards, 0)


def test_an_unknown_asset_is_named_with_those_there_are(road_config: PipelineConfig) -> None:
    """A typing error must not look like an empty run."""
    with (
        dg.DagsterInstance.ephemeral() as instance,
        pytest.raises(Exception, match="There is no asset 'activation'; this pipeline has"),
    ):
        list(run_road(road_config, instance, select=["activation"]))


def test_progress_hears_of_every_partition(tiny_world: Path, tmp_path: Path) -> None:
    """The bars of the command line are driven by this; a step that says nothing looks like a hang."""
    heard = _Heard()
    config = make_road_config(tiny_world, tmp_path / "data")
    with dg.DagsterInstance.ephemeral() as instance:
        reports = list(run_road(config, instance, select=["token_shards", "activations"], progress=heard))
    n_partitions = sum(report.n_partitions for report in reports)
    assert (heard.n_planned, heard.n_begun, heard.n_ended) == (n_partitions - 1, n_partitions, n_partitions)
    assert heard.n_units > 0


class _Heard(Progress):
    n_planned = n_begun = n_ended = n_units = 0

    def plan(self, n_partitions: int) -> None:
        self.n_planned = n_partitions

    def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
        self.n_begun += 1

    def advance(self, n: int) -> None:
        self.n_units += n

    def end(self) -> None:
        self.n_ended += 1


def flip_byte(path: Path, at: int) -> None:
    """Change one bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def drop_artifacts(config: PipelineConfig, name: str, partition: str) -> None:
    """Delete the artifacts of one partition."""
    pipeline, store = open_finished(config)
    stop = next(stop for stop in make_road(config) if stop.name == name)
    for ref in stop.artifacts(pipeline, store, partition):
        remove_artifact(store, ref.path)
