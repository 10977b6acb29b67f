"""What other tools see in the same weights, written down once (`peers.py`): the same numbers stand at the same names here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_subject, make_tokenizer
from torch import Tensor

from interp_assets.garcon.session import Model

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "peers.json").read_text(encoding="utf-8"))
IDS, OTHER, PATCHED = [[5, 70, 33, 70, 9, 120, 4]], [[5, 71, 33, 71, 9, 12, 4]], 3


def _close(found: Tensor, golden: list[float]) -> None:
    torch.testing.assert_close(found.flatten(), torch.tensor(golden), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", sorted(GOLDEN["transformer_lens"]))
def test_transformerlens_sees_the_same_at_its_names(kind: str) -> None:
    """TransformerLens 4.3: the residual stream, heads and patterns, named in its own words."""
    llm = Model(make_subject(kind), make_tokenizer())
    golden = dict(GOLDEN["transformer_lens"][kind])
    _close(llm.run(IDS, read="logits", pos=-1)["logits"].tensor, golden.pop("logits"))
    assert len(golden) == 4
    with llm.trace(IDS) as t:
        reads = {name: t.read(name) for name in golden}
    for name, values in golden.items():
        _close(reads[name].tensor, values)


@pytest.mark.parametrize("layer", [0, 1])
def test_pyvene_interchanges_alike(layer: int) -> None:
    """Version 0.1.8: one position of a block's output from another text, and the logits that follow."""
    llm = Model(make_subject("gpt2"), make_tokenizer())
    source = llm.run(OTHER, read=f"resid_post.{layer}")[f"resid_post.{layer}"]
    with llm.trace(IDS) as t:
        t.patch(f"resid_post.{layer}", source, pos=PATCHED)
        logits = t.read("logits", pos=-1)
    _close(logits.tensor, GOLDEN["pyvene"][str(layer)])


@pytest.mark.parametrize("kind", sorted(GOLDEN["nnsight"]))
def test_nnsight_differentiates_alike_and_takes_heads_out(kind: str) -> None:
    """Version 0.8.1: a logit difference by every block and head from one backward, and the logits without one head."""
    llm, golden = Model(make_subject(kind), make_tokenizer()), GOLDEN["nnsight"][kind]
    with llm.trace(IDS) as t:
        grads = t.grad(t.logit_diff(5, 9), at=list(golden["grads"]))
    for name, values in golden["grads"].items():
        _close(grads[name].tensor, values)
    with llm.trace(IDS) as t:
        t.patch("z.1", "zero", heads=[0])
        logits = t.read("logits", pos=-1)
    _close(logits.tensor, golden["without head 0 of z.1"])


ENGINE = {"attn_probs": "pattern", "attn_out": "attn_raw", "mlp_out": "mlp_raw", "attn_out_post": "attn_out", "mlp_out_post": "mlp_out"}
"""Where interp-engine has another name: what its `mlp_out` is in a model with norms behind is not what is added to the stream."""


@pytest.mark.parametrize("kind", sorted(GOLDEN["interp_engine"]))
def test_interp_engine_sees_the_same(kind: str) -> None:
    """Version 1.14.2: every point of a block that both have, and the last norm."""
    llm, golden = Model(make_subject(kind), make_tokenizer()), GOLDEN["interp_engine"][kind]
    with llm.trace(IDS) as t:
        reads = {}
        for name in golden:
            kind_of_point, dot, layer = name.partition(".")
            reads[name] = t.read(ENGINE.get(kind_of_point, kind_of_point) + dot + layer)
    for name, values in golden.items():
        _close(reads[name].tensor, values)
