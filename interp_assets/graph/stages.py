"""Every stage, in the order of the data; a configuration becomes the road through all of them. A new stage is one line here."""

from types import ModuleType
from typing import Final

import interp_assets.corpus.assets
import interp_assets.harvest.assets
import interp_assets.shuffle.assets
import interp_assets.train.assets
import interp_assets.visualize.assets
import interp_assets.web.assets
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.road import Road, named

STAGES: Final[tuple[ModuleType, ...]] = (
    interp_assets.corpus.assets,
    interp_assets.harvest.assets,
    interp_assets.shuffle.assets,
    interp_assets.train.assets,
    interp_assets.visualize.assets,
    interp_assets.web.assets,
)


def make_road(config: PipelineConfig) -> Road:
    """List every asset of a pipeline, each after those it is made from."""
    return Road([asset for stage in STAGES for asset in named(stage.make_assets(config), stage.__name__.split(".")[-2])])
