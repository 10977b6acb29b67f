"""Every stage, in the order of the data; a configuration becomes the road through all of them. A new stage is one line here."""

from importlib import import_module
from typing import Final

from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.road import Road, named

STAGES: Final = (
    "corpus",
    "harvest",
    "shuffle",
    "train",
    "visualize",
    "web",
)
"""Folders whose `assets.py` has a function `make_assets(config)`. They are imported by name, so that this list is all there is."""


def make_road(config: PipelineConfig) -> Road:
    """List every asset of a pipeline, each after those it is made from."""
    tables = {stage: import_module(f"interp_assets.{stage}.assets").make_assets(config) for stage in STAGES}
    return Road([asset for stage, assets in tables.items() for asset in named(assets, stage)])
