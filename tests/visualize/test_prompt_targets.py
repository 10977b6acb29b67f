"""Targets of a configured prompt: what a page without a model shows sums to the model's own logit and pre-activation, and leaves patterns alone."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_models import D_MODEL, make_tiny_config, make_tokenizer, save_model, write_texts

from interp_assets.corpus.plan import plan_corpus
from interp_assets.errors import ConfigError, InputError
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.patterns.targets import Latent, Logit, explain_targets
from interp_assets.garcon.subject import SubjectModel, load_subject_model
from interp_assets.harvest.heads.prompts import COLUMNS, FILES, PROMPT, SCALES, TARGETS, TERMS, join_targets, keep_prompt, unpack_prompt
from interp_assets.harvest.heads.refs import prompt_ref
from interp_assets.planning.config import ExecutionConfig, make_config
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import create_artifact, read_file
from interp_assets.storage.store import Store, open_store
from interp_assets.train.checkpoint import load_sae, save_sae
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae
from interp_assets.visualize.assets import find_target_obstacles
from interp_assets.visualize.prompt_targets import FILES as TARGET_FILES
from interp_assets.visualize.prompt_targets import keep_targets
from interp_assets.web.refs import attention_ref

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "prompt_targets.md").read_text(encoding="utf-8")
TEXT = "ab cd ab"
TOLD = {"text": TEXT, "logits": ["b"], "latents": ["demo:5"]}
TOKENIZER = make_tokenizer()


class World(NamedTuple):
    """A planned pipeline with an SAE."""

    pipeline: Pipeline
    store: Store
    subject: SubjectModel

    def other(self, **prompts: Any) -> Pipeline:
        """Return the same pipeline over other prompts."""
        content = self.pipeline.config.model_dump()
        return Pipeline(make_config({**content, "heads": {**content["heads"], "prompts": prompts}}), self.pipeline.plan)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Plan over a tiny model, layers 0 and 1 of which the second is shown, and publish an SAE of random weights."""
    root = tmp_path_factory.mktemp("targets")
    save_model(root / "model", "gemma2")
    saes = [{"name": name, "hook_point": point, "d_sae": 32, "k": 4} for name, point in (("demo", "resid_post.0"), ("heads", "z.0"))]
    sections: dict[str, Any] = {
        "heads": {"layers": [1], "prompts": {"told": TOLD, "plain": TEXT}},
        "execution": {"device": "cpu"},
        "shuffle": {"passes": 2, "fan_out": 2},
    }
    config = make_tiny_config(root / "model", write_texts(root / "texts"), harvest={"hook_points": ["resid_post.0", "z.0"]}, saes=saes, **sections)
    store = open_store("memory://targets")
    pipeline = plan_corpus(config, store)
    generator = torch.Generator().manual_seed(2)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, 32), (32, D_MODEL)))
    sae = Sae(kind="relu", W_enc=W_enc, b_enc=torch.ones(32), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(32), k=0)
    with create_artifact(store, sae_ref(pipeline, "demo")) as art:
        save_sae(art, sae, pipeline, config.sae("demo"), l0=4.0)
    return World(pipeline, store, load_subject_model(config.model, ExecutionConfig(device="cpu")))


def _read(world: World, made: Any, files: tuple[str, ...]) -> dict[str, bytes]:
    return {file: read_file(world.store, made.ref.path, made.manifest, file) for file in files}


def test_columns_scales_and_terms_are_those_of_the_model(world: World) -> None:
    """The oracle is the sum that a notebook makes; joined to the prompt they are what a page reads, and its patterns are as they were."""
    made = keep_targets(world.pipeline, world.store, world.subject, TOKENIZER, "told")
    assert keep_targets(world.pipeline, world.store, world.subject, TOKENIZER, "told").is_cached
    own = keep_prompt(world.pipeline, world.store, world.subject, TOKENIZER, "told")
    files, prompt = _read(world, made, TARGET_FILES), _read(world, own, FILES)
    row = TOKENIZER(TEXT)["input_ids"]
    saes = {"demo": AttachedSae(load_sae(world.pipeline, world.store, "demo"), "resid_post.0")}
    token = TOKENIZER("b")["input_ids"][0]
    expected = explain_targets(world.subject, row, [Logit(token), Latent("demo", 5)], saes)
    targets, n = json.loads(files[TARGETS]), len(row)
    assert [each["column"] for each in targets] == made.manifest.facts["targets"] == [f"logit:{token}", "feature:demo:5"]
    assert targets[0]["text"] == "b"
    columns = np.frombuffer(files[COLUMNS], "<f2").reshape(2, 2, n)
    scales = np.frombuffer(files[SCALES], "<f4").reshape(2, 1, n)
    terms, first = np.frombuffer(files[TERMS], "<f4").reshape(-1, n), 0
    for i, (target, wanted) in enumerate(zip(targets, expected, strict=True)):
        np.testing.assert_allclose(columns[:, i], wanted.columns.get(1, np.zeros((2, n))), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(scales[i, 0], wanted.scales.get(1, np.zeros(n)), rtol=1e-6)
        rows = terms[first : first + 2 + 2 + len(target["others"])]
        np.testing.assert_allclose(rows[2], wanted.value, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rows.sum(axis=0) - rows[2], rows[2], atol=1e-4)  # with the layer that is not shown
        first += len(rows)
    assert first == len(terms)
    joined = join_targets(prompt, files)
    described = json.loads(joined[PROMPT])
    assert described["columns"] == ["value", "output", f"logit:{token}", "feature:demo:5"]
    assert described["note"] == "The logit before it is bounded by 30."
    both, alone = unpack_prompt(joined, "here"), unpack_prompt(prompt, "here")
    assert np.array_equal(both.pattern("1.1"), alone.pattern("1.1"))
    assert np.array_equal(both.lengths[1], alone.lengths[1])
    whole = np.frombuffer(joined[COLUMNS], "<f2").reshape(2, 4, n)
    assert np.array_equal(whole[:, 2:], columns)
    assert set(re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)) == set(TARGET_FILES)
    assert set(re.findall(r"`(\w+)`", PAGE.split("## Facts")[1])) == set(made.manifest.facts) - {"made_from"}


def test_targets_change_no_id_but_their_own(world: World) -> None:
    """Naming a target makes no pattern again, and a bundle without targets is the one that it was; another SAE or text makes targets anew."""
    plain, told = world.other(a=TEXT), world.other(a=TOLD)
    spelled = world.other(a={"text": TEXT})
    assert prompt_ref(plain, "a") == prompt_ref(told, "a") == prompt_ref(spelled, "a")
    assert attention_ref(plain) == attention_ref(spelled) != attention_ref(told)
    assert world.other(a=TEXT).config.model_dump()["heads"]["prompts"] == {"a": TEXT}
    assert list(told.config.heads.explained) == ["a"]
    assert not spelled.config.heads.explained


def test_what_cannot_be_explained_is_refused_by_name(world: World) -> None:
    """Before anything is made where the configuration tells, else with the pieces of the token."""
    with pytest.raises((ValidationError, ConfigError), match=r"heads\.prompts names 'none', but the SAEs are"):
        world.other(a={"text": TEXT, "latents": ["none:3"]})
    with pytest.raises((ValidationError, ConfigError), match="latents"):
        world.other(a={"text": TEXT, "latents": ["demo"]})
    wrong = world.other(a={"text": TEXT, "latents": ["heads:3", "demo:32"]})
    assert find_target_obstacles(wrong, world.store) == [
        "`heads.prompts.a` names a latent of heads, which reads z.0: edges add up to what is read at resid_post.L alone.",
        "`heads.prompts.a` names latent 32 of demo, which has latents 0 to 31.",
    ]
    assert find_target_obstacles(world.pipeline, world.store) == []
    with pytest.raises(
        InputError, match=re.escape("`heads.prompts.a.logits`: 'ab' is 2 tokens, ['a', 'b']. Name one; most words begin with their space.")
    ):
        keep_targets(world.other(a={"text": TEXT, "logits": ["ab"]}), world.store, world.subject, TOKENIZER, "a")
