"""The subject model becomes sizes and seconds, before its weights are loaded: what every pass through it takes."""

from typing import Final

from interp_assets.garcon.facts import find_facts
from interp_assets.planning.machine import ONE_WORKER
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.dtypes import ITEM_BYTES
from interp_assets.storage.seen import open_seen

ROWS_PER_S: Final = 10_000
"""Rows of a small model on two cores; large ones are bound by two operations for each parameter and row."""


def model_bytes(pipeline: Pipeline) -> int:
    """Return what the subject model's weights take."""
    return _count_parameters(pipeline) * ITEM_BYTES[pipeline.config.model.dtype]


def forward_s(pipeline: Pipeline, n_tokens: float) -> float:
    """Return the seconds that a forward over so many tokens takes one worker, by its operations."""
    return 2.0 * _count_parameters(pipeline) * n_tokens / ONE_WORKER.flops


def _count_parameters(pipeline: Pipeline) -> int:
    config = pipeline.config
    if config.corpus.is_planted:
        return config.corpus.features * config.corpus.width
    with open_seen() as seen:
        return pipeline.remember("parameters", lambda: find_facts(config.model, config.harvest.hook_points, seen).n_parameters)
