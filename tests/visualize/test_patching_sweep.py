"""Patched prompts as an asset: every cell is a run of its own, gradients are derivatives times changes, and what cannot be averaged is refused."""

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets import lab
from interp_assets.corpus.plan import plan_corpus
from interp_assets.errors import ArtifactMissingError, ConfigError, InputError
from interp_assets.garcon.session import Model
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset, Job
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.visualize.steering.patching import Patching
from interp_assets.visualize.steering.refs import patching_ref
from resources.world import World

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "patching_sweep.md"
PAIR = {"clean": "Mary gave", "corrupted": "Anna gave", "answer": "M", "other": "A"}
OTHER = {"clean": "hello you", "corrupted": "hallo you", "answer": "e", "other": "a"}
LONGER = {"clean": "so long", "corrupted": "so lung", "answer": "o", "other": "u"}
SETS: list[dict[str, Any]] = [
    {"name": "stream", "pairs": [PAIR, OTHER], "points": ["blocks.*.hook_resid_post", "blocks.1.hook_mlp_out"]},
    {"name": "heads", "pairs": [PAIR, LONGER], "points": ["z.*"], "by": "head"},
    {"name": "slopes", "pairs": [PAIR], "points": ["resid_post.*", "z.0"], "method": "gradient"},
    {"name": "slopes-of-heads", "pairs": [PAIR], "points": ["pattern.1", "z.1"], "by": "head", "method": "gradient"},
]


class Made:
    """A planned pipeline of which nothing is made but what is patched."""

    def __init__(self, root: Path) -> None:
        save_model(root / "model", "gpt2")
        write_texts(root / "texts", n_files=4)
        self.config = make_tiny_config(root / "model", root / "texts", root=str(root / "data"), execution={"device": "cpu"}, patching=SETS)
        self.store: Store = open_pipeline_store(self.config)
        self.pipeline = plan_corpus(self.config, self.store)
        self.llm: Model = lab.Opened(self.pipeline, self.store).model()

    def patch(self, name: str, sets: list[dict[str, Any]] | None = None) -> tuple[Asset, Job, Produced]:
        """Make one partition, of other sets if they are given."""
        pipeline = self.pipeline if sets is None else Pipeline(make_config({**self.config.model_dump(), "patching": sets}), self.pipeline.plan)
        (asset,) = [asset for asset in make_road(pipeline.config) if asset.group == "steer"]
        job = Job(World(pipeline.config), pipeline, self.store, (name,))
        (produced,) = asset.make(job)(name)
        return asset, job, produced


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Plan a tiny pipeline."""
    return Made(tmp_path_factory.mktemp("patching"))


def _read(made: Made, name: str) -> Patching:
    made.patch(name)
    return lab.Opened(made.pipeline, made.store).patching(name)


def _metric(llm: Model, text: str, pair: dict[str, str], **patch: Any) -> float:
    with llm.trace(text) as t:
        if patch:
            t.patch(patch.pop("point"), patch.pop("value"), **patch)
        d = t.logit_diff(pair["answer"], pair["other"])
    return d.value


def test_every_cell_is_a_run_with_one_place_of_the_clean_prompt(made: Made) -> None:
    """By position and by head; the oracle is a trace a cell, for every pair."""
    for name, pairs, kind, point in (("stream", [PAIR, OTHER], "pos", "mlp_out.1"), ("heads", [PAIR, LONGER], "heads", "z.0")):
        patching = _read(made, name)
        for number, pair in enumerate(pairs):
            source = made.llm.run(pair["clean"], read=point)[point]
            base = _metric(made.llm, pair["corrupted"], pair)
            told = patching.pairs.row(number, named=True)
            assert told["clean"] == pytest.approx(_metric(made.llm, pair["clean"], pair), abs=1e-6)
            assert told["corrupted"] == pytest.approx(base, abs=1e-6)
            assert told["n_tokens"] == len(pair["clean"])
            cells = {line["column"]: line["effect"] for line in patching.cells.to_dicts() if (line["pair"], line["point"]) == (number, point)}
            assert list(cells) == list(range(len(pair["clean"]) if kind == "pos" else 2))
            for column, effect in cells.items():
                where = {"pos": slice(column, column + 1)} if kind == "pos" else {"heads": [column]}
                found = _metric(made.llm, pair["corrupted"], pair, point=point, value=source, **where)
                assert effect == pytest.approx(found - base, abs=3e-6), (name, number, column)


def test_gradients_are_derivatives_times_changes_summed_over_a_cell(made: Made) -> None:
    """All heads of a position, all positions of a head, all keys of a query: the oracle multiplies by hand."""
    for name, points, kept in (("slopes", ["resid_post.1", "z.0"], (1, 1)), ("slopes-of-heads", ["pattern.1", "z.1"], (1, 2))):
        cells = _read(made, name).cells
        source = made.llm.run(PAIR["clean"], read=points)
        with made.llm.trace(PAIR["corrupted"]) as t:
            now = {point: t.read(point) for point in points}
            slopes = t.grad(t.logit_diff(PAIR["answer"], PAIR["other"]), at=points)
        for point, axis in zip(points, kept, strict=True):
            product = slopes[point].tensor * (source[point].tensor - now[point].tensor)
            expected = product.sum([i for i in range(product.ndim) if i != axis])
            found = [line["effect"] for line in cells.to_dicts() if line["point"] == point]
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-6)


def test_a_table_averages_over_the_pairs_and_says_what_comes_back(made: Made) -> None:
    """The last position of the last layer carries all of the answer: its share of the lead is 1. Without a lead there is no share."""
    patching = _read(made, "stream")
    table = patching.table()
    assert table.columns == ["point", "column", "label", "effect", "recovered"]
    assert table["point"].unique(maintain_order=True).to_list() == ["resid_post.0", "resid_post.1", "mlp_out.1"]
    last = table.row(17, named=True)
    assert (last["point"], last["column"], last["label"]) == ("resid_post.1", 8, "e …")
    assert last["recovered"] == pytest.approx(1.0, abs=1e-4)
    assert table.row(0, named=True)["label"] == "M → A …"
    assert "2 pairs, the clean prompts ahead by" in repr(patching)
    drawn = patching._repr_html_()
    assert drawn.count("<tr") == 4
    level = Patching(patching.cells, patching.pairs.with_columns(clean="corrupted"), patching.what)
    assert level.table()["recovered"].null_count() == table.height
    torch.testing.assert_close(level.grid()[0].flatten(), torch.tensor(table["effect"].to_list(), dtype=torch.float64))


def test_what_was_computed_is_found_and_shown(made: Made) -> None:
    """Its id is of prompts, places, method and model, not of its name; the picture is one that Dagster's UI draws; the forecast is of the method."""
    asset, job, first = made.patch("stream")
    _, _, again = made.patch("stream")
    assert again.is_cached
    assert again.manifest.digest == first.manifest.digest
    found = lab.Opened(made.pipeline, made.store).patching("stream")
    columns = re.findall(r"^\| `(\w+)` \| (?:string|int64|float64) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [*found.cells.columns, *found.pairs.columns] == columns
    assert asset.partition_keys(made.pipeline) == ["stream", "heads", "slopes", "slopes-of-heads"]
    shown = asset.shows(job, "stream", [first])
    assert str(shown["cells"]).startswith("![logit difference with one position of the clean prompt: 2 pairs")
    assert shown["n_pairs"] == 2
    renamed = [{**SETS[0], "name": "again"}, {**SETS[0], "name": "slopes", "method": "gradient"}]
    pipeline = Pipeline(make_config({**made.config.model_dump(), "patching": renamed}), made.pipeline.plan)
    assert patching_ref(pipeline, "again").artifact_id == first.ref.artifact_id
    assert patching_ref(pipeline, "slopes").artifact_id != first.ref.artifact_id
    takes = {name: asset.takes(pipeline, made.store, name).busy_s for name in ("again", "slopes")}
    assert takes["again"] > takes["slopes"] > 0
    with pytest.raises(ConfigError, match=r"No set of prompts is called 'names'; `patching` has \['stream', 'heads'"):
        lab.Opened(made.pipeline, made.store).patching("names")
    with pytest.raises(ArtifactMissingError):
        lab.Opened(pipeline, made.store).patching("slopes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": [{**PAIR, "clean": "Maria gave"}]}, "Pair 0 of the set 'x' has 10 clean and 9 corrupted tokens"),
        ({"pairs": [PAIR, LONGER]}, "The pairs of the set 'x' have [9, 7] tokens, so position 3 is not the same in all"),
        ({"pairs": [{**PAIR, "answer": "Mary"}]}, "'Mary' is 4 tokens"),
        ({"points": ["resid_post.9"]}, "resid_post.9"),
        ({"points": ["resid_post.*"], "by": "head"}, "A sweep by head needs points with one number of heads"),
        ({"points": ["resid_post.*"], "by": "head", "method": "gradient"}, "A sweep by head needs points with one number of heads"),
    ],
)
def test_what_cannot_be_patched_is_refused(made: Made, change: dict[str, Any], message: str) -> None:
    """With the pair, the tokens or the point, and what to do."""
    with pytest.raises(InputError, match=re.escape(message)):
        made.patch("x", [{"name": "x", "pairs": [PAIR], **change}])


def test_a_configuration_is_refused_that_mixes_metrics_or_names() -> None:
    """Before anything is planned; a log probability needs no other answer."""
    alone = {key: value for key, value in PAIR.items() if key != "other"}
    with pytest.raises(ConfigError, match="some pairs of 'x' have an `other` and some have none"):
        make_config({"patching": [{"name": "x", "pairs": [PAIR, alone]}]})
    with pytest.raises(ConfigError, match=r"two sets of prompts in `patching` have one name: \['x', 'x'\]"):
        make_config({"patching": [{"name": "x", "pairs": [PAIR]}] * 2})
    for point, told in (
        ("resid_pots.*", r"'resid_pots\.\*' is no hook point inside or between blocks: name one as resid_post\.3, or"),
        ("logits", "'logits' is no hook point inside or between blocks"),
        ("module:transformer.h.*.mlp", "is no hook point inside or between blocks"),
        ("blocks.*.attn.hook_q", r"it is read before RoPE, q\.0 after it"),
    ):
        with pytest.raises(ConfigError, match=told):
            make_config({"patching": [{"name": "x", "pairs": [PAIR], "points": [point]}]})
    assert make_config({"patching": [{"name": "x", "pairs": [PAIR], "points": ["blocks.*.hook_mlp_out"]}]}).patching[0].points == ["mlp_out.*"]
    with pytest.raises(ConfigError, match="did you mean 'pairs'"):
        make_config({"patching": [{"name": "x", "pairs": [PAIR], "pair": []}]})


def test_a_log_probability_is_a_metric_too(made: Made) -> None:
    """Where a pair names no other answer."""
    alone = {key: value for key, value in PAIR.items() if key != "other"}
    sets = [{"name": "alone", "pairs": [alone], "points": ["resid_post.0"]}]
    _, job, _ = made.patch("alone", sets)
    with made.llm.trace(PAIR["clean"]) as t:
        d = t.logprob(PAIR["answer"])
    assert lab.Opened(job.pipeline, made.store).patching("alone").pairs["clean"][0] == pytest.approx(d.value, abs=1e-6)


def test_dagster_sees_a_partition_for_each_set_and_nothing_without_one() -> None:
    """Made from the plan alone: no SAE is needed."""
    assert [asset for asset in make_road(make_config({})) if asset.group == "steer"] == []
    assert "patching" not in make_config({}).model_dump()
    node = build_defs(make_config({"patching": SETS})).resolve_asset_graph().get(dg.AssetKey(["patching_sweep"]))
    assert node.partitions_def is not None
    assert list(node.partitions_def.get_partition_keys()) == [asked["name"] for asked in SETS]
    assert {key.to_user_string() for key in node.parent_keys} == {"corpus_plan"}
