"""Pipelines as tests want them: a corpus planned without notes, and a plan that is carried out otherwise."""

from collections.abc import Sequence
from typing import Any

from interp_assets.corpus.sources import survey_sources
from interp_assets.planning.pipeline import Pipeline, ShardSource
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.seen import SeenFiles


def plan_sources(config: CorpusConfig, seed: int, closed: Sequence[int] = ()) -> list[ShardSource]:
    """Divide the corpus into shards, reading all of it. Arguments and errors as for `survey_sources`."""
    with SeenFiles(None) as seen:
        return survey_sources(config, seed, closed, seen).shards


def executing(pipeline: Pipeline, **changes: Any) -> Pipeline:
    """Return a pipeline that is the same but for fields of `execution`, which nothing's id depends on."""
    execution = pipeline.config.execution.model_copy(update=changes)
    return Pipeline(pipeline.config.model_copy(update={"execution": execution}), pipeline.plan)
