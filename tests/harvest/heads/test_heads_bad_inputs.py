"""What cannot be measured is refused by its place, and publishes nothing; what no row tells is null, never zero."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_net

from interp_assets.corpus.tokens import TokenShard, load_tokens
from interp_assets.errors import ConfigError, InputError, NonFiniteError
from interp_assets.garcon.attention import list_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.candidates import LayerSums, ShardRows, find_head_candidates, load_statistics
from interp_assets.harvest.heads.reading import chosen_layers, hear_shard
from interp_assets.harvest.heads.records import tabulate
from interp_assets.harvest.heads.refs import candidates_ref, heads_of
from interp_assets.harvest.heads.statistics import empty_statistics
from interp_assets.planning.config import make_config
from interp_assets.storage.manifest import find_manifest


def _tokens(n: int, *, valid: bool) -> TokenShard:
    """Return one context of one token, which nobody stored."""
    zeros = np.zeros(n, np.uint32)
    return TokenShard(zeros, zeros, zeros, np.full(n, valid), None, None)  # type: ignore[arg-type]


def test_a_key_that_is_not_finite_names_its_place_and_publishes_nothing(make_world: Callable[..., Any]) -> None:
    """A NaN in one document must not make every statistic of a head NaN, nor be counted as no attention."""
    world = make_world("gpt2")
    tokens = load_tokens(world.pipeline, world.store, 1)
    bad = int(np.flatnonzero(tokens.valid)[30])
    token = int(tokens.token_ids[bad])
    net = make_net("gpt2")
    with torch.no_grad():
        net.get_input_embeddings().weight[token] = torch.nan
    place = rf"A query of layer 0, head \d, is not finite: shard-000001, context \d+, position \d+, token id {token}\."
    with pytest.raises(NonFiniteError, match=place):
        find_head_candidates(world.pipeline, world.store, SubjectModel(net, "broken"), 1)
    assert find_manifest(world.store, candidates_ref(world.pipeline, 1)) is None


def test_a_context_that_is_too_long_is_refused_with_both_lengths() -> None:
    """The model would take positions that it has never seen, or none."""
    model = SubjectModel(make_net("gpt2"), "tiny")
    tokens = _tokens(60, valid=True)
    with pytest.raises(InputError, match="A context of 60 tokens is longer than the 48 of tiny"):
        list(hear_shard(model, list_attention(model.net), tokens, 0, lambda *_: None))


def test_a_layer_that_does_not_attend_is_refused_with_those_that_do() -> None:
    """A list of another model's layers."""
    with pytest.raises(InputError, match=r"has no attention in layer 5; those that attend are \[0, 1\]"):
        chosen_layers(SubjectModel(make_net("gpt2"), "tiny"), [1, 5])


def test_no_valid_row_gives_null_and_not_zero() -> None:
    """A head of which nothing was seen is not a head that does nothing; JSON has no NaN."""
    model = SubjectModel(make_net("gpt2"), "tiny")
    layer = list_attention(model.net)[0]
    tokens = _tokens(4, valid=False)
    sums = LayerSums(layer, ShardRows(tokens, np.zeros(1, np.uint32), 0, 0))
    for _ in hear_shard(model, [layer], tokens, 0, lambda _layer, heard, places: sums.add(heard, places)):
        pass
    assert sums.candidates(4).num_rows == 0
    for statistics in (sums.statistics, empty_statistics(2, 3, 2)):
        table = tabulate(0, statistics)
        assert set(table.drop("layer", "head", "rows").row(0)) == {None}
        json.dumps(table.to_dicts(), allow_nan=False)


def test_encoders_have_no_induction(make_world: Callable[..., Any]) -> None:
    """Whoever sees what follows has nothing to induce: null, beside everything else."""
    world = make_world("bert")
    produced = find_head_candidates(world.pipeline, world.store, world.subject, 0)
    row = tabulate(0, load_statistics(world.store, produced.ref, produced.manifest, 0)).row(0, named=True)
    assert row["induction"] is None
    assert row["duplicate"] > 0
    assert row["entropy"] > 0


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"layers": [2, 1]}, "name each layer once, in order"),
        ({"layers": []}, "heads.layers"),
        ({"examples_per_interval": 17}, "heads.examples_per_interval"),
        ({"top": 3}, "did you mean 'top_k'"),
    ],
)
def test_a_wrong_section_is_explained(heads: dict[str, Any], message: str) -> None:
    """More examples than a shard keeps of a bin would be no uniform choice."""
    with pytest.raises(ConfigError, match=message):
        make_config({"heads": heads})


def test_a_pipeline_without_the_section_says_so(small_pipeline: Any) -> None:
    """Who asks for heads that nobody configured learns which section is missing."""
    with pytest.raises(ConfigError, match="its configuration has no section `heads`"):
        heads_of(small_pipeline)
