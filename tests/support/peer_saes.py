"""Runs inside another environment, where SAELens, sparsify and dictionary_learning are installed: what they make of our folders, and we of theirs.

    python peer_saes.py jobs.json

Each job names a tool, a folder and where the answer goes. `load`: the tool opens the folder and encodes the rows of `rows.npy`. `save`: the tool
makes an SAE of random weights, encodes the rows and saves it into the folder in its own way. Nothing of ours is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(path: Path) -> None:
    """Do all jobs; the answers are `<answer>.latents.npy` and `<answer>.output.npy`."""
    jobs = json.loads(path.read_text())
    x = torch.from_numpy(np.load(path.parent / "rows.npy"))
    for job in jobs:
        coder = load(job["tool"], job["folder"]) if job["do"] == "load" else save(job["tool"], job["folder"], job["what"], x.shape[1])
        with torch.no_grad():
            latents, output = encode(job["tool"], coder, x)
        np.save(job["answer"] + ".latents.npy", latents.numpy())
        np.save(job["answer"] + ".output.npy", output.numpy())


def load(tool: str, folder: str) -> Any:
    """Open a folder with the function that the tool's users call."""
    if tool == "saelens":
        from sae_lens import SAE

        return SAE.load_from_disk(folder)
    if tool == "sparsify":
        from sparsify import SparseCoder

        return SparseCoder.load_from_disk(folder)
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(folder, "cpu")[0]


def encode(tool: str, coder: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and reconstruction."""
    if tool != "sparsify":
        return coder.encode(x), coder(x)
    top, indices, _ = coder.encode(x)
    latents = torch.zeros(len(x), coder.num_latents).scatter(1, indices, top)
    return latents, coder(x).sae_out


def save(tool: str, folder: str, what: str, d_in: int) -> Any:
    """Make an SAE of random weights and save it as the tool does."""
    torch.manual_seed(len(what))
    Path(folder).mkdir(parents=True, exist_ok=True)
    if tool == "saelens":
        coder = make_saelens(what, d_in)
        coder.save_model(folder)
        return coder
    if tool == "sparsify":
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(d_in, SparseCoderConfig(num_latents=40, k=4, transcode="transcoder" in what, skip_connection="skip" in what))
        randomize(coder)
        coder.save_to_disk(folder)
        return coder
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    sparse = {"AutoEncoderTopK": AutoEncoderTopK, "BatchTopKSAE": BatchTopKSAE, "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE}
    sizes: list[Any] = [4, *([[8, 32]] if what.startswith("Matryoshka") else [])]
    coder = sparse[what](d_in, 40, *sizes) if what in sparse else getattr(dictionary, what)(d_in, 40)
    randomize(coder)
    torch.save(coder.state_dict(), f"{folder}/ae.pt")
    (Path(folder) / "config.json").write_text(json.dumps({"trainer": {"dict_class": what, "k": 4}}))
    return load(tool, folder)


def make_saelens(what: str, d_in: int) -> Any:
    """Build one of SAELens' inference classes."""
    from sae_lens.registry import get_sae_class

    architecture, _, more = what.partition("+")
    fields: dict[str, Any] = {"d_in": d_in, "d_sae": 40, "dtype": "float32", "device": "cpu"}
    if architecture == "topk":
        fields |= {"k": 4, "rescale_acts_by_decoder_norm": more == "rescale"}
    if "transcoder" in architecture:
        fields |= {"d_out": 7, "apply_b_dec_to_input": False}
    make_coder, make_config = get_sae_class(architecture)
    coder = make_coder(make_config(**fields))
    randomize(coder)
    return coder


def randomize(coder: Any) -> None:
    """Give every tensor values that matter."""
    with torch.no_grad():
        for name, value in [*coder.named_parameters(), *coder.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape) * 0.5 if "threshold" not in name else torch.rand(value.shape) * 0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
