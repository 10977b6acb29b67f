"""A sweep is written in a line, and becomes plain SAEs with names that say what varies."""

from typing import Any

import pytest

from interp_assets.errors import ConfigError
from interp_assets.planning.config import make_config
from interp_assets.planning.grammar import MAX_ARMS, expand, set_values

DEFAULTS = {"k": 32, "d_sae": 2048, "learning_rate": 3e-4, "architecture": "batch_topk", "seed": 0}


def test_each_varies_all_with_all_and_ranges_are_written_out() -> None:
    """Twelve SAEs in a line: lists, a logarithmic range, and replicas by seed; `1e-4` is a number although YAML takes it for a word."""
    entry = {"name": "a", "architecture": "topk", "each": {"k": [16, 32], "learning_rate": {"log": ["1e-4", 1e-2, 3]}, "seed": {"count": 2}}}
    arms = expand([entry, {"name": "plain"}], DEFAULTS)
    assert len(arms) == 13
    assert [arm["learning_rate"] for arm in arms[0:6:2]] == [1e-4, 1e-3, 1e-2]
    assert arms[0] == {"name": "a-k16-learning_rate0.0001-seed0", "architecture": "topk", "k": 16, "learning_rate": 1e-4, "seed": 0}
    assert len({arm["name"] for arm in arms}) == 13
    assert arms[12] == {"name": "plain"}


def test_zip_goes_side_by_side_where_keeps_what_holds_and_options_are_fields() -> None:
    """A width with its own k; a condition that reads defaults too; and what a recipe varies."""
    zipped = expand([{"name": "w", "zip": {"d_sae": [64, 128], "options.p": [0.5, 1.0]}, "options": {"decay_share": 0.1}}], DEFAULTS)
    assert [(arm["d_sae"], arm["options"]) for arm in zipped] == [(64, {"decay_share": 0.1, "p": 0.5}), (128, {"decay_share": 0.1, "p": 1.0})]
    assert [arm["name"] for arm in zipped] == ["w-d_sae64-p0.5", "w-d_sae128-p1"]
    kept = expand([{"name": "b", "each": {"k": [16, 64, 256]}, "where": ["k < d_sae / 8", "architecture == 'batch_topk' and not k == 16"]}], DEFAULTS)
    assert [arm["k"] for arm in kept] == [64]
    words = expand([{"name": "c", "each": {"architecture": ["relu", "gated"], "options.groups": [[0.5, 0.5], [1.0]]}}], DEFAULTS)
    assert [arm["name"] for arm in words] == ["c-relu-groups0", "c-relu-groups1", "c-gated-groups0", "c-gated-groups1"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"each": {"k": 16}}, "saes.0.each.k is neither a list of values nor {count: 3}"),
        ({"each": {"k": {"log": [0, 1, 3]}}}, "saes.0.each.k is neither"),
        ({"each": {"k": {"log": [1, "x", 3]}}}, "saes.0.each.k is neither"),
        ({"each": {"k": []}}, "saes.0.each.k is neither"),
        ({"each": [16]}, "saes.0.each must name fields and their values"),
        ({"k": 1, "each": {"k": [2]}}, "k is said twice"),
        ({"zip": {"k": [1, 2], "seed": [1]}}, "need one length; they have {'k': 2, 'seed': 1}"),
        ({"each": {"k": [1, 2]}, "where": "k > 2"}, "'k > 2' leaves none of 2 SAEs"),
        ({"each": {"k": [1, 2]}, "where": "kk > 2"}, "there is no field 'kk'; did you mean 'k'?"),
        ({"each": {"k": [1, 2]}, "where": "__import__('os')"}, "it is no comparison of fields"),
        ({"each": {"k": [1, 2]}, "where": "k >"}, "cannot be read"),
        ({"each": {"k": {"count": MAX_ARMS}, "seed": {"count": 2}}}, "20,000 SAEs come of it, at most 10,000"),
    ],
)
def test_what_cannot_be_written_out_says_which_line(entry: dict[str, Any], message: str) -> None:
    """A sweep that is not what was meant costs days."""
    with pytest.raises(ConfigError) as caught:
        expand([{"name": "a", **entry}], DEFAULTS)
    assert message in str(caught.value)


def test_a_list_without_each_gets_the_corrected_line_and_alike_errors_one() -> None:
    """The first thing that anybody types; and twelve SAEs have one wrong field, not twelve."""
    with pytest.raises(ConfigError, match=r"saes\.0\.k: .*to try all of them: each: \{k: \[16, 32\]\}"):
        make_config({"saes": [{"name": "demo", "k": [16, 32]}]})
    with pytest.raises(ConfigError) as caught:
        make_config({"saes": [{"name": "demo", "kk": 1, "each": {"seed": {"count": 12}}}], "features": {"saes": []}})
    assert str(caught.value).splitlines()[0].endswith("has 1 wrong field:")
    assert "did you mean 'k'? (got 1), and 11 more of the list" in str(caught.value)


def test_settings_change_a_field_of_all_or_of_one() -> None:
    """`--set`: what varied varies no more, a list is varied, and other sections are reached by their path."""
    content = {"saes": [{"name": "a", "each": {"k": [1, 2], "seed": {"count": 2}}}, {"name": "b", "k": 3}]}
    assert [arm["k"] for arm in expand(set_values(content, ["saes.*.k=64"])["saes"], DEFAULTS)] == [64, 64, 64]
    assert [arm["k"] for arm in expand(set_values(content, ["saes.b.k=[8, 9]"])["saes"], DEFAULTS)] == [1, 1, 2, 2, 8, 9]
    changed = set_values(content, ["saes.1.options.decay_share=0.5", "corpus.max_shards=4", "seed=1e3", "name=nan"])
    assert changed["saes"][1] == {"name": "b", "k": 3, "options": {"decay_share": 0.5}}
    assert (changed["corpus"], changed["seed"], changed["name"]) == ({"max_shards": 4}, 1000, "nan")
    assert content["saes"][1] == {"name": "b", "k": 3}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("saes.*.k", "is no path=value"),
        ("saes.bb.k=1", "no entry of saes is called so; did you mean 'b'?"),
        ("saes.b=1", "no entry of saes"),
        ("seed.x.y=1", "'y' has no place there"),
    ],
)
def test_settings_that_name_nothing_are_refused(setting: str, message: str) -> None:
    """A setting that is passed over would look like a result."""
    with pytest.raises(ConfigError) as caught:
        set_values({"seed": {"x": 1}, "saes": [{"name": "b"}]}, [setting])
    assert message in str(caught.value)
