"""What decides an artifact's id: a field that is new and stands at its default changes none.

    PYTHONPATH=tests/planning:tests/support python -c "import test_identity; test_identity.write()"

writes the golden paths anew, after a version of a stage was raised, and only then.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from interp_assets.errors import ArtifactError
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig, SaeConfig, make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.store import open_store

GOLDEN = Path(__file__).parents[1] / "golden" / "artifact_paths.json"
POINTS = ["resid_post.0", "mlp_out.1"]
ARMS: tuple[dict[str, Any], ...] = (
    *(
        {"name": name.replace("_", "-"), "architecture": name}
        for name in ("relu", "gated", "topk", "batch_topk", "matryoshka_batch_topk", "jump_relu", "jump_relu_tanh", "jump_relu_step")
    ),
    {"name": "transcoder", "task": "transcoder", "target_hook_point": "mlp_out.1"},
    {"name": "crosscoder", "task": "crosscoder", "more_hook_points": ["mlp_out.1"]},
    {"name": "foreign", "imported": "nowhere", "imported_digest": "0" * 32},
)


def make_wide(**changes: Any) -> PipelineConfig:
    """Return a configuration that uses every section."""
    content = {
        "name": "golden",
        "root": "memory://golden",
        "corpus": {"source": "files", "path": "nowhere"},
        "harvest": {"hook_points": POINTS},
        "shuffle": {"passes": 2, "fan_out": 2},
        "saes": [{"hook_point": POINTS[0], "d_sae": 64, "k": 4, **arm} for arm in ARMS],
        "features": {"saes": ["topk"], "latent_slices": 1},
        "heads": {},
        "steering": {"recipes": {"louder": [{"sae": "topk", "latent": 3, "clamp": "10 max"}]}, "prompts": ["import"]},
        "patching": [{"name": "names", "pairs": [{"clean": "a b", "corrupted": "a c", "answer": "b", "other": "c"}]}],
    }
    return make_config({**content, **changes})


def list_paths(config: PipelineConfig) -> list[str]:
    """Return the path, which ends with the id, of every artifact that a plan of two shards tells."""
    shards = [ShardSource(index=i, fingerprint=f"text-{i}", n_documents=2, n_bytes=100, spec={"files": [f"{i}.txt"]}) for i in range(2)]
    plan = PipelinePlan(
        shards=shards,
        tokenizer_fingerprint="tokenizer",
        model_fingerprint="model",
        hook_widths=dict.fromkeys(POINTS, 8),
        vocabulary_size=50,
        max_context=32,
    )
    pipeline, store = Pipeline(config, plan), open_store(config.root)
    found: set[str] = set()
    for asset in make_road(config):
        for key in asset.partition_keys(pipeline):
            try:
                found |= {ref.path for ref in asset.artifacts(pipeline, store, key)}
            except ArtifactError:
                continue
    return sorted(found)


def write() -> None:
    """Write the golden paths."""
    GOLDEN.write_text(json.dumps(list_paths(make_wide()), indent=1) + "\n", encoding="utf-8")


def test_ids_are_those_that_were_written_down() -> None:
    """A field more, or a default that moved, made every SAE of every pipeline anew: dfc33e33 became 87a08000 by one that nobody had set."""
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len([path for path in expected if path.startswith("4-sae/")]) > 20
    assert sorted(set(expected) - set(list_paths(make_wide()))) == []


class WiderSae(SaeConfig):
    """What a later version may look like: a number and a list more."""

    p_end: float = 1.0
    groups: tuple[int, ...] = ()


class WiderCorpus(CorpusConfig):
    """Likewise."""

    min_characters: int = 0


def test_a_new_field_at_its_default_changes_no_id() -> None:
    """Whoever adds one does not have to know that: it is left out by itself; and hashed as soon as somebody sets it."""
    sae, corpus = SaeConfig(name="a"), CorpusConfig(source="files", path="x")
    wider = WiderSae(**sae.model_dump())
    assert wider.identity() == sae.identity()
    assert WiderCorpus(**corpus.model_dump()).model_dump() == corpus.model_dump()
    assert WiderSae(name="a", p_end=0.5).identity() == {**sae.identity(), "p_end": 0.5}
    assert WiderSae(name="a", groups=(1,)).model_dump(mode="json")["groups"] == [1]
    assert WiderSae.model_validate_json(wider.model_copy(update={"p_end": 0.3}).model_dump_json()).p_end == 0.3


def test_options_are_hashed_where_there_are_any() -> None:
    """And leave the ids of all SAEs without them alone."""
    assert "options" not in SaeConfig(name="a").identity()
    assert SaeConfig(name="a", options={"betas": (0.9, 0.99)}).identity()["options"] == {"betas": (0.9, 0.99)}


@pytest.mark.parametrize(("section", "nothing"), [("heads", None), ("steering", None), ("patching", [])])
def test_a_section_that_is_not_there_is_not_dumped(section: str, nothing: object) -> None:
    """Pipelines without it keep what they were made with."""
    assert section not in make_wide(**{section: nothing}).model_dump()
    assert section in make_wide().model_dump()
