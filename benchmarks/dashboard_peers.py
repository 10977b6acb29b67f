"""Dashboards by SAEDashboard, or the cache of firings by delphi, on request: the child process of `bench_dashboards.py`.

Runs in an environment of its own that has the peer (benchmarks/README.md). A request names a folder with `setting.npz`: rows, an SAE, token ids and
an unembedding. Both begin at activations as ours does: what stands where their subject model would be hands out the stored rows, batch after batch.
"""

# ruff: noqa: PLC0415 - a peer is imported where it is measured
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from children import Run, serve
from torch import nn

CONTEXT, BATCH = 128, 64


class StoredRows(nn.Module):
    """Stands where a model computes activations, and hands out the next batch of the stored ones."""

    def __init__(self, rows: torch.Tensor) -> None:
        """Take the rows `[n, d_in]`."""
        super().__init__()
        self._batches = rows.reshape(-1, CONTEXT, rows.shape[1]).split(BATCH)
        self._next = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of a batch of contexts."""
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        assert batch.shape[:2] == tokens.shape
        return batch


class StoredModel(nn.Module):
    """A model of one module, `rows`."""

    def __init__(self, rows: torch.Tensor) -> None:
        """Take the rows."""
        super().__init__()
        self.rows, self.device = StoredRows(rows), torch.device("cpu")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return self.rows(tokens)


def load_setting(folder: Path) -> dict[str, torch.Tensor]:
    """Read rows (float32), weights and tokens."""
    with np.load(folder / "setting.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


def make_sae_dashboard(wanted: dict[str, Any]) -> Run:
    """Return SAEDashboard's run for the first latents, and its HTML with their data."""
    import sae_lens
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(wanted["folder"])
    setting = load_setting(folder)
    d_in, vocabulary = setting["unembedding"].shape
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w0", eos_token="w0", pad_token="w0")
    plain.save_pretrained(folder / "tokenizer")  # HookedTransformer loads it anew from where it came
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    sizes = {"n_layers": 1, "d_model": d_in, "n_ctx": CONTEXT, "d_head": 8, "n_heads": 1, "d_vocab": vocabulary}
    model = sae_lens.HookedSAETransformer(HookedTransformerConfig(**sizes, attn_only=True, device="cpu", seed=0), tokenizer=tokenizer)
    model.embed = StoredRows(setting["rows"])
    model.setup()
    model.pos_embed.W_pos.data.zero_()
    model.unembed.W_U.data.copy_(setting["unembedding"])
    d_sae = setting["W_enc"].shape[1]
    config = sae_lens.JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False)
    config.metadata.hook_name = "blocks.0.hook_resid_pre"
    sae = sae_lens.JumpReLUSAE(config)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            getattr(sae, name).copy_(setting[name])
    tokens = setting["tokens"].reshape(-1, CONTEXT)
    vis = SaeVisConfig(
        hook_point="blocks.0.hook_resid_pre", features=list(range(wanted["latents"])), minibatch_size_features=256, minibatch_size_tokens=BATCH
    )

    def run() -> None:
        found = SaeVisRunner(vis).run(encoder=sae, model=model, tokens=tokens)
        save_feature_centric_vis(sae_vis_data=found, filename=folder / "dashboards.html")

    return run


def make_delphi(wanted: dict[str, Any]) -> Run:
    """Return delphi's cache of all firings, in five files."""
    from delphi.latents.cache import LatentCache

    folder = Path(wanted["folder"])
    setting = load_setting(folder)
    n, model = wanted["latents"], StoredModel(setting["rows"])
    W, threshold = setting["W_enc"][:, :n].contiguous(), setting["threshold"][:n]
    tokens = setting["tokens"].reshape(-1, CONTEXT)

    def encode(rows: torch.Tensor) -> torch.Tensor:
        pre = rows @ W
        return torch.where(pre > threshold, pre, 0.0)

    def run() -> None:
        target = folder / "delphi"
        shutil.rmtree(target, ignore_errors=True)
        cache = LatentCache(model, {"rows": encode}, batch_size=BATCH)
        cache.run(tokens.numel(), tokens)
        cache.save_splits(5, target)

    return run


MAKERS = {"sae_dashboard": make_sae_dashboard, "delphi": make_delphi}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    serve(lambda wanted: MAKERS[wanted["peer"]](wanted))
