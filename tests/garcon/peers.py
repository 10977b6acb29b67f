"""Ask TransformerLens and pyvene what they see in tiny models, and write it down as golden values.

They are installed in an environment of their own: pip install transformer-lens==4.3.0 pyvene==0.1.8.
Then: PYTHONPATH=tests/support python tests/garcon/peers.py
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_net, save_model

GOLDEN = Path(__file__).parent / "golden" / "peers.json"
IDS, OTHER = [[5, 70, 33, 70, 9, 120, 4]], [[5, 71, 33, 71, 9, 12, 4]]
LENS_KINDS = ("gpt2", "llama")
LENS_POINTS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern")
PATCHED = 3
"""The position whose block output pyvene interchanges."""


def round_all(value: torch.Tensor) -> Any:
    """Return numbers with the digits that float32 has."""
    return [round(number, 7) for number in value.detach().flatten().tolist()]


def ask_transformer_lens(kind: str) -> dict[str, Any]:
    """Return activations at some of its hooks, of a model in a local folder."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = save_model(Path(tempfile.mkdtemp()) / kind, kind)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    logits, cache = bridge.run_with_cache(torch.tensor(IDS))
    return {"logits": round_all(logits[0, -1]), **{name: round_all(cache[name]) for name in LENS_POINTS}}


def ask_pyvene(layer: int) -> list[float]:
    """Return the last logits when one position of a block's output comes from another text."""
    import pyvene

    net = make_net("gpt2")
    made = {"layer": layer, "component": "block_output", "intervention_type": pyvene.VanillaIntervention}
    model = pyvene.IntervenableModel(pyvene.IntervenableConfig([made], model_type=type(net)), model=net)
    _, output = model(
        base={"input_ids": torch.tensor(IDS)}, sources=[{"input_ids": torch.tensor(OTHER)}], unit_locations={"sources->base": (PATCHED, PATCHED)}
    )
    return round_all(output.logits[0, -1])


def main() -> None:
    """Write the golden values."""
    found = {
        "transformer_lens": {kind: ask_transformer_lens(kind) for kind in LENS_KINDS},
        "pyvene": {str(layer): ask_pyvene(layer) for layer in (0, 1)},
    }
    GOLDEN.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
