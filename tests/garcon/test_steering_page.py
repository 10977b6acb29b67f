"""The page about steering: its examples and its recipe are run, with the shipped model and an SAE of random weights."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from interp_assets import lab
from interp_assets.garcon.features import AttachedSae, Firings
from interp_assets.train.sae import Sae

PAGE = Path(__file__).parents[2] / "docs" / "steering.md"
N_LATENTS = 40


def _examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    """A page lives only if a test executes it."""
    llm = lab.load("builtin:pystdlib_gpt2", device="cpu")
    d_in = llm.subject.d_model
    W_enc = torch.randn((d_in, N_LATENTS), generator=torch.Generator().manual_seed(0)) / d_in**0.5
    zeros = torch.zeros(N_LATENTS)
    sae = Sae(kind="relu", W_enc=W_enc, b_enc=zeros, W_dec=W_enc.T.contiguous(), b_dec=torch.zeros(d_in), threshold=zeros, k=0)
    firings = Firings(torch.ones(N_LATENTS), torch.linspace(0, 1, N_LATENTS), lambda _latent, share: share)
    llm.saes = {"demo": AttachedSae(sae, "resid_post.2", firings=firings)}
    llm.backend.norms = {"resid_post.2": 10.0}
    names: dict[str, Any] = {"llm": llm}
    examples = _examples("python")
    assert len(examples) == 2
    for number, example in enumerate(examples):
        exec(compile(example, f"{PAGE.name}, example {number}", "exec"), names)
    assert names["texts"].table()["kl"].max() > 1e-3
    assert names["dose"].texts.height == (4 * 4 + 1) * 2
    (recipe,) = _examples("yaml")
    (tmp_path / "page.yaml").write_text(recipe)
    save_file({"calm": torch.ones(d_in)}, tmp_path / "calm.safetensors")
    plan = llm.generate("import os\n", steer=str(tmp_path / "page.yaml"), new_tokens=2).plan
    assert [edit.write.op for edit in plan.edits] == ["sae_clamp", "sae_add", "add"]
    assert plan.freeze
