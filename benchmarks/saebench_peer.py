"""SAEBench's own formulas over the rows that an SAE of a pipeline was measured on: is what `metrics.json` calls by its names the same?

    PYTHONPATH=. python benchmarks/saebench_peer.py rows told --config p.yaml --sae a      writes the rows, the SAE's folder and our numbers
    .saebench/bin/python benchmarks/saebench_peer.py compare told                          SAEBench's function, in an environment of its own

SAEBench measures models of TransformerLens on OpenWebText. Neither is needed to compare formulas: `get_sparsity_and_variance_metrics` of its
`core` is handed the harvested rows where it asks a model for activations, and the SAE as SAELens reads our folder. Left out is what is defined
otherwise (explained variance over its own batches, an error that is divided by rows), and what takes a model (CE, KL).
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def write_rows(config: str, name: str, out: Path) -> None:
    """Keep the held-out rows, the SAE's folder and what was measured."""
    import torch  # noqa: PLC0415 - the other half runs elsewhere

    from interp_assets import lab  # noqa: PLC0415 - as above
    from interp_assets.storage.manifest import load_manifest, read_file  # noqa: PLC0415 - as above
    from interp_assets.train.evaluate import iter_held_out_rows  # noqa: PLC0415 - as above
    from interp_assets.train.refs import METRICS, evaluation_ref, sae_ref  # noqa: PLC0415 - as above

    run = lab.open(config)
    sae, evaluation = run.config.sae(name), evaluation_ref(run.pipeline, name)
    out.mkdir(parents=True, exist_ok=True)
    rows = torch.cat([block.x for block in iter_held_out_rows(run.pipeline, run.store, sae)]).float()
    np.save(out / "rows.npy", rows.numpy())
    for file in ("cfg.json", "sae_weights.safetensors"):
        (out / file).write_bytes(run.store.get(f"{sae_ref(run.pipeline, name).path}/{file}"))
    manifest = load_manifest(run.store, evaluation)
    told = json.loads(read_file(run.store, evaluation.path, manifest, METRICS))
    (out / "told.json").write_text(json.dumps(told))


def compare(folder: Path) -> int:
    """Print ours beside SAEBench's; exit 1 where they differ by more than a thousandth."""
    import torch  # noqa: PLC0415 - as above
    from sae_bench.evals.core.main import get_sparsity_and_variance_metrics  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    from sae_lens import SAE  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - SAEBench brings it

    rows, told = torch.from_numpy(np.load(folder / "rows.npy")), json.loads((folder / "told.json").read_text())
    sae: Any = SAE.load_from_disk(str(folder), device="cpu")
    cfg = SimpleNamespace(hook_name="rows", hook_head_index=None, hook_layer=0, d_sae=sae.cfg.d_sae)
    shown = SimpleNamespace(cfg=cfg, encode=sae.encode, decode=sae.decode, device="cpu")
    model = SimpleNamespace(run_with_cache=lambda places, **_: (None, {"rows": rows[places]}))  # what stands for tokens are the rows' places
    store = SimpleNamespace(get_batch_tokens=lambda _n: torch.arange(len(rows))[None])
    switches = dict.fromkeys(("compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics"), True)
    with torch.no_grad():
        found, _ = get_sparsity_and_variance_metrics(
            shown, model, store, n_batches=1, eval_batch_size_prompts=1, model_kwargs={}, compute_featurewise_density_statistics=False, **switches
        )
    ours = {name: value for section in told.values() if isinstance(section, dict) for name, value in section.items()}
    worst = 0.0
    for name in ("l0", "l1", "l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias", "cossim"):
        off = abs(found[name] - ours[name]) / abs(found[name])
        worst = max(worst, off)
        print(json.dumps({"name": name, "ours": ours[name], "saebench": found[name], "off": off, "n": len(rows)}))
    return int(worst > 1e-3)


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["rows", "compare"])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("told"))
    parser.add_argument("--config")
    parser.add_argument("--sae", default="demo")
    chosen = parser.parse_args()
    if chosen.step == "compare":
        return compare(chosen.folder)
    write_rows(chosen.config, chosen.sae, chosen.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
