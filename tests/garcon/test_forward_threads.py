"""A forward has the same bits for any number of threads: what is harvested, measured and tried on a text is the same on a machine of another size."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from interp_assets.garcon.plan import Grad, LogitDiff, Plan, Read
from interp_assets.garcon.run import run_plan
from interp_assets.garcon.subject import SubjectModel

WIDTH = 1024
"""Sums of so many, over few rows, are what libraries divide among threads."""
SIZES = {"vocab_size": 70, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        **SIZES,
    ),
    "gpt2": GPT2Config(n_embd=WIDTH, n_inner=1536, n_layer=1, n_head=8, n_positions=64, **SIZES),
}


def digest(values: list[Tensor]) -> str:
    """Hash the bytes of tensors."""
    return hashlib.blake2b(b"".join(value.float().contiguous().numpy().tobytes() for value in values)).hexdigest()


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)])
def test_a_forward_does_not_depend_on_threads(family: str, dtype: torch.dtype) -> None:
    """Rows, logits, and logits with a replacement; a plain forward of 37 tokens had three answers for one, two and three threads."""
    torch.manual_seed(0)
    model = SubjectModel(AutoModelForCausalLM.from_config(CONFIGS[family]).to(dtype))
    tokens = torch.randint(3, 70, (1, 37), generator=torch.Generator().manual_seed(1))
    found = set()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        rows = model.capture(tokens, None, ["resid_post.0", "q.0", "mlp_out.0"])
        patched = model.logits_with_patch(tokens, None, "mlp_out.0", lambda value: value / 2)
        found.add(digest([*rows.values(), model.logits(tokens, None), patched]))
    assert len(found) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_exact_run_does_not_depend_on_threads(family: str) -> None:
    """Reads, metrics and derivatives of a trace whose numbers are to be had again elsewhere."""
    torch.manual_seed(0)
    model = SubjectModel(AutoModelForCausalLM.from_config(CONFIGS[family]))
    row = tuple(torch.randint(3, 70, (64,), generator=torch.Generator().manual_seed(1)).tolist())
    d = LogitDiff(name="d", token=5, other=9)
    asked = [  # at a pattern attention is the eager one, whose derivatives are others
        (Read(name="a", point="mlp_act.0"), d, Grad(name="g", of="d", at=("embed", "z.0", "resid_post.0"))),
        (Read(name="a", point="pattern.0"), d, Grad(name="g", of="d", at=("embed", "pattern.0"))),
    ]
    found = set()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        answers = [run_plan(model, Plan(rows=(row, row[::-1]), operations=operations), {}, exact=True) for operations in asked]
        found.add(digest([value for answer in answers for value in (*answer.tensors.values(), *answer.derivatives["g"].values())]))
    assert len(found) == 1
