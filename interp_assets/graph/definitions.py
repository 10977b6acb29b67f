"""A configuration becomes fresh Dagster definitions, without touching storage, models or the network: the road, its sensors, and retraining.

`build_defs(config)` is for tests, deployments and the command line. `defs` is what `workspace.yaml` loads: the pipeline that the
environment variable `INTERP_CONFIG` names (a YAML file), or the demo pipeline. Nothing else is decided here.
"""

import os

# Every process of Dagster's that runs a step loads this module first, and inherits from one that did. Idle threads of OpenMP would spin on the
# cores that compiled loops use: steps of training take 5 to 15% longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dagster as dg

from interp_assets.graph.assembly import CONFIG_VARIABLE, assemble
from interp_assets.graph.retraining import make_retraining, make_retraining_sensor
from interp_assets.graph.sensors import make_sensor
from interp_assets.planning.config import PipelineConfig, load_config
from interp_assets.planning.demo import demo_config
from interp_assets.planning.progress import Progress


def build_defs(config: PipelineConfig | None = None) -> dg.Definitions:
    """Make the definitions of a pipeline (default: the demo)."""
    config = config or demo_config()
    retraining = (
        dg.Definitions(assets=[make_retraining(config)], sensors=[make_retraining_sensor()]) if config.retrain.after_tokens else dg.Definitions()
    )
    return dg.Definitions.merge(assemble(config, Progress()), dg.Definitions(sensors=[make_sensor(config)]), retraining)


def config_from_environment() -> PipelineConfig:
    """Read the configuration that `INTERP_CONFIG` names, or return the demo's."""
    path = os.environ.get(CONFIG_VARIABLE)
    return load_config(path) if path else demo_config()


defs = build_defs(config_from_environment())
