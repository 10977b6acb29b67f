"""The shards of a corpus, planned without notes."""

from collections.abc import Sequence

from interp_assets.corpus.sources import survey_sources
from interp_assets.planning.config import CorpusConfig
from interp_assets.planning.pipeline import ShardSource
from interp_assets.storage.seen import SeenFiles


def plan_sources(config: CorpusConfig, seed: int, closed: Sequence[int] = ()) -> list[ShardSource]:
    """Divide the corpus into shards, reading all of it. Arguments and errors as for `survey_sources`."""
    with SeenFiles(None) as seen:
        return survey_sources(config, seed, closed, seen).shards
