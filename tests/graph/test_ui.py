"""The clicks of the runbook, in Dagster's real UI: three shards of sixteen have failed, and a person makes these three again."""

import socket
import urllib.request
from pathlib import Path

import dagster as dg
import pytest
import yaml
from chromium import Visit, run_chromium
from daemon_world import set_up_home, wait_for
from sixteen_shards import BAD, N_SHARDS, damage, make_sixteen

from interp_assets.graph.backfill import run_backfill
from interp_assets.graph.jobs import open_instance, recorded_versions, run_road
from interp_assets.graph.processes import DagsterUi, start_dagster
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]


def start(config: PipelineConfig, folder: Path) -> DagsterUi:
    """Start Dagster's webserver and daemon, as `interp dev` does."""
    (folder / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return start_dagster(config, folder / "p.yaml", port)


def answers(url: str) -> bool:
    """Say whether a server is up."""
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=5):
            return True
    except OSError:
        return False


def test_a_person_backfills_the_three_failed_shards(tiny_world: Path, tmp_path: Path) -> None:
    """*Materialize*, *Failed*, *Launch backfill*: these three are made, by Dagster's own daemon, and no asset behind them is due."""
    config = make_sixteen(tiny_world, tmp_path)
    set_up_home(config, concurrency={"pools": {"granularity": "run", "default_limit": 3}, "runs": {"max_concurrent_runs": 3}})
    stops = [stop for stop in make_road(config) if stop.stage in ("corpus", "harvest", "shuffle")]
    names = [stop.name for stop in stops]
    with open_instance(config) as instance:
        list(run_road(config, instance, select=names))
        before = {stop.name: recorded_versions(instance, stop) for stop in stops}
        good = damage(config)
        (failed,) = [item for item in run_backfill(config, instance, select=["activations"]) if item.failed]
        assert failed.failed == list(BAD)
        for path, data in good.items():
            path.write_bytes(data)
        n_before, n_runs = len(events(instance)), instance.get_runs_count()
        with start(config, tmp_path) as ui:
            wait_for(lambda: answers(ui.url), 120, ui.log)
            click_backfill(ui.url)
            wait_for(lambda: len(events(instance)) >= n_before + len(BAD), 180, ui.log)
            wait_for(lambda: all(run.is_finished for run in instance.get_runs()), 60, ui.log)
        assert sorted(event.partition or "" for event in events(instance)[: len(BAD)]) == list(BAD)
        assert instance.get_runs_count() - n_runs == len(BAD)  # they do not follow each other: a run for each
        assert {stop.name: recorded_versions(instance, stop) for stop in stops} == before
        assert list(run_backfill(config, instance, select=names)) == []


def click_backfill(url: str) -> None:
    """Do what docs/runbook.md says. The browser is gone afterwards: while Playwright runs, this thread has an event loop, and Dagster wants one."""
    with run_chromium() as chromium:
        page = Visit(chromium, color_scheme="light").page
        page.set_default_timeout(60_000)
        page.goto(f"{url}/assets/activations?view=partitions")
        page.get_by_text(f"Failed ({len(BAD)})").wait_for()
        assert page.get_by_text(f"Materialized ({N_SHARDS - len(BAD)})").is_visible()
        page.get_by_role("button", name="Materialize…").click()
        page.get_by_role("button", name="Failed", exact=True).click()
        page.get_by_text("3 partitions", exact=True).wait_for()
        page.get_by_role("button", name="Launch backfill").click()
        page.get_by_role("button", name="Launch backfill").wait_for(state="detached")


def events(instance: dg.DagsterInstance) -> list[dg.AssetMaterialization]:
    """List the materializations of `activations`, the newest first."""
    records = instance.fetch_materializations(dg.AssetKey("activations"), limit=100).records
    return [record.asset_materialization for record in records if record.asset_materialization is not None]
