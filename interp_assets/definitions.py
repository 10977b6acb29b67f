"""Assembles the asset graph: a configuration becomes fresh Dagster definitions, without touching storage, models or the network.

`build_defs(config)` is for tests, deployments and the command line. `defs` is what `workspace.yaml` loads: the pipeline that the
environment variable `INTERP_CONFIG` names (a YAML file), or the demo pipeline. Nothing else is decided here.
"""

import os
import warnings

import dagster as dg

import interp_assets.corpus.assets
import interp_assets.corpus.checks
import interp_assets.corpus.sensors
import interp_assets.harvest.assets
import interp_assets.harvest.checks
import interp_assets.retraining
import interp_assets.shuffle.assets
import interp_assets.shuffle.checks
import interp_assets.train.assets
import interp_assets.train.checks
import interp_assets.visualize.assets
import interp_assets.visualize.checks
import interp_assets.web.assets
from interp_assets.config import PipelineConfig, demo_config, load_config
from interp_assets.partitions import make_layout
from interp_assets.progress import Progress
from resources.world import World

CONFIG_VARIABLE = "INTERP_CONFIG"


def build_defs(config: PipelineConfig | None = None, *, progress: Progress | None = None) -> dg.Definitions:
    """Make the definitions of a pipeline (default: the demo); `progress` hears how in-process runs go."""
    config = config or demo_config()
    layout = make_layout(config)
    stages = (
        interp_assets.corpus.assets,
        interp_assets.harvest.assets,
        interp_assets.shuffle.assets,
        interp_assets.train.assets,
        interp_assets.visualize.assets,
        interp_assets.web.assets,
        interp_assets.retraining,
    )
    checked = (
        interp_assets.corpus.checks,
        interp_assets.harvest.checks,
        interp_assets.shuffle.checks,
        interp_assets.train.checks,
        interp_assets.visualize.checks,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # backfill policies; Dagster's version is pinned
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitioned checks
        return dg.Definitions(
            assets=[asset for stage in stages for asset in stage.make_assets(layout)],
            asset_checks=[check for stage in checked for check in stage.make_checks(layout)],
            sensors=[interp_assets.corpus.sensors.make_sensor(layout), *interp_assets.retraining.make_sensors(layout)],
            resources={"world": World.make(config), "progress": progress or Progress()},
            executor=dg.in_process_executor,  # a run is one process: importing torch again for every step and check costs seconds
        )


def config_from_environment() -> PipelineConfig:
    """Read the configuration that `INTERP_CONFIG` names, or return the demo's."""
    path = os.environ.get(CONFIG_VARIABLE)
    return load_config(path) if path else demo_config()


defs = build_defs(config_from_environment())
