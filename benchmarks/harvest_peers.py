"""Activations by SAELens' cache, TransformerLens' bridge or nnsight on request: the child process of `bench_harvest.py`.

Runs in an environment of its own that has the peers (benchmarks/README.md). A request names a folder with a saved model and `batches.npz`, and each
peer does what its documentation shows for it, stopped at the layer where it can stop. The bridge and nnsight get our batches of documents of mixed
length, and keep the activations in memory only: no file, no checks, no statistics. SAELens' cache writes its Arrow files; it has rows of one length
only and gets the same tokens cut into rows of 128.
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

ROW = 128


def load_batches(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return token ids and masks, padded on the right."""
    found = np.load(folder / "batches.npz")
    return [(torch.from_numpy(found[f"ids{i}"]), torch.from_numpy(found[f"mask{i}"])) for i in range(len(found.files) // 2)]


def load_net(folder: Path, *, is_encoder: bool) -> Any:
    """Load the saved model."""
    from transformers import AutoModel, AutoModelForCausalLM

    return (AutoModel if is_encoder else AutoModelForCausalLM).from_pretrained(folder / "model").eval()


def make_sae_lens(wanted: dict[str, Any]) -> Run:
    """Return SAELens' `CacheActivationsRunner` over the same tokens in rows of one length."""
    if wanted["is_encoder"]:
        raise KeyError("way to load an encoder: AutoModelForCausalLM and HookedTransformer are decoders")
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner
    from sae_lens.config import CacheActivationsRunnerConfig

    folder = Path(wanted["folder"])
    tokens = torch.cat([ids[mask] for ids, mask in load_batches(folder)])
    n_rows = len(tokens) // ROW // 8 * 8
    rows = Dataset.from_dict({"input_ids": tokens[: n_rows * ROW].reshape(n_rows, ROW).tolist()})
    target = folder / "sae_lens"
    config = CacheActivationsRunnerConfig(
        dataset_path="", model_name=str(folder / "model"), model_class_name="AutoModelForCausalLM", hook_name=wanted["module"],
        d_in=wanted["d_in"], training_tokens=n_rows * ROW, context_size=ROW, prepend_bos=False, streaming=False, device="cpu",
        dtype=wanted["dtype"], new_cached_activations_path=str(target), model_batch_size=8, buffer_size_gb=0.05, autocast_lm=False,
    )  # fmt: skip
    runner = CacheActivationsRunner(config, override_dataset=rows)
    is_first = [True]

    def run() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if not is_first[0]:
            runner.activations_store.iterable_dataset = iter(rows)
            runner.activations_store.iterable_sequences = runner.activations_store._iterate_tokenized_sequences()  # noqa: SLF001
        is_first[0] = False
        runner.run()

    return run


def make_bridge(wanted: dict[str, Any]) -> Run:
    """Return TransformerLens' bridge, run with a cache of one hook point and stopped after its block."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    folder = Path(wanted["folder"])
    net, batches = load_net(folder, is_encoder=wanted["is_encoder"]), load_batches(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    bridge = TransformerBridge.boot_transformers(str(folder / "model"), hf_model=net, tokenizer=tokenizer, device="cpu")
    name = f"blocks.{wanted['layer']}.hook_out"

    @torch.no_grad()
    def run() -> None:
        kept = []
        for ids, mask in batches:
            _, cache = bridge.run_with_cache(ids, names_filter=[name], stop_at_layer=wanted["layer"] + 1, return_type=None)
            kept.append(cache[name][mask])

    return run


def make_nnsight(wanted: dict[str, Any]) -> Run:
    """Return nnsight's trace of one module's output, stopped there."""
    from nnsight import NNsight

    folder = Path(wanted["folder"])
    net, batches = load_net(folder, is_encoder=wanted["is_encoder"]), load_batches(folder)
    model = NNsight(net)
    module = model
    for part in wanted["module"].split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)

    @torch.no_grad()
    def run() -> None:
        kept = []
        for ids, mask in batches:
            arguments = {"attention_mask": mask.long()} if wanted["is_encoder"] else {"use_cache": False}
            with model.trace(input_ids=ids, **arguments) as tracer:
                found = module.output.save()
                tracer.stop()
            kept.append((found[0] if isinstance(found, tuple) else found)[mask])

    return run


MAKERS = {"sae_lens": make_sae_lens, "transformer_lens": make_bridge, "nnsight": make_nnsight}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    serve(lambda wanted: MAKERS[wanted["peer"]](wanted))
