"""Ask other tools what they see in tiny models, and write it down as golden values.

    PYTHONPATH=tests/support python tests/garcon/peers.py PEER ...      what is not asked about stays as it is

Each is installed in an environment of its own: pip install transformer-lens==4.3.0 pyvene==0.1.8, nnsight==0.8.1, or interp-engine==1.14.2.
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
LENS_POINTS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern")
ENGINE_POINTS = ("attn_in.1", "attn_probs.1", "z.1", "attn_out.1", "resid_mid.0", "mlp_in.1", "mlp_act.1", "mlp_out.1", "resid_post.1", "final_norm")
PATCHED, TOKENS = 3, (5, 9)
"""The position whose block output pyvene interchanges, and the tokens whose logits nnsight compares."""


def round_all(value: torch.Tensor) -> Any:
    """Return numbers with the digits that float32 has."""
    return [round(number, 7) for number in value.detach().flatten().tolist()]


def ask_transformer_lens() -> dict[str, Any]:
    """Return activations at some of its hooks, of models in local folders."""
    from transformer_lens.model_bridge import TransformerBridge

    found = {}
    for kind in ("gpt2", "llama"):
        folder = save_model(Path(tempfile.mkdtemp()) / kind, kind)
        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
        logits, cache = bridge.run_with_cache(torch.tensor(IDS))
        found[kind] = {"logits": round_all(logits[0, -1]), **{name: round_all(cache[name]) for name in LENS_POINTS}}
    return found


def ask_pyvene() -> dict[str, list[float]]:
    """Return the last logits when one position of a block's output comes from another text."""
    import pyvene

    found = {}
    for layer in (0, 1):
        net = make_net("gpt2")
        made = {"layer": layer, "component": "block_output", "intervention_type": pyvene.VanillaIntervention}
        model = pyvene.IntervenableModel(pyvene.IntervenableConfig([made], model_type=type(net)), model=net)
        _, output = model(
            base={"input_ids": torch.tensor(IDS)}, sources=[{"input_ids": torch.tensor(OTHER)}], unit_locations={"sources->base": (PATCHED, PATCHED)}
        )
        found[str(layer)] = round_all(output.logits[0, -1])
    return found


def ask_nnsight() -> dict[str, Any]:
    """Return derivatives of a logit difference at every block and head, and the last logits without one head."""
    from nnsight import NNsight

    found = {}
    for kind, path in (("gpt2", "transformer.h.{}.attn.c_proj"), ("llama", "model.layers.{}.self_attn.o_proj")):
        model: Any = NNsight(make_net(kind))
        first, second = (model.get(path.format(layer).rsplit(".", 2)[0]) for layer in (0, 1))
        heads = [model.get(path.format(layer)) for layer in (0, 1)]
        with model.trace(torch.tensor(IDS)):
            z0, resid0 = heads[0].input, first.output
            z1, resid1 = heads[1].input, second.output
            logits = model.output.logits[0, -1]
            with (logits[TOKENS[0]] - logits[TOKENS[1]]).backward():
                d_resid1 = resid1.grad.clone().save()
                d_z1 = z1.grad.clone().save()
                d_resid0 = resid0.grad.clone().save()
                d_z0 = z0.grad.clone().save()
        with model.trace(torch.tensor(IDS)):
            heads[1].input[..., : z1_width(kind)] = 0
            ablated = model.output.logits[0, -1].save()
        grads = {"resid_post.0": d_resid0, "resid_post.1": d_resid1, "z.0": d_z0, "z.1": d_z1}
        found[kind] = {"grads": {name: round_all(value) for name, value in grads.items()}, "without head 0 of z.1": round_all(ablated)}
    return found


def z1_width(kind: str) -> int:
    """Return the width of one head."""
    config = make_net(kind).config
    return config.hidden_size // config.num_attention_heads


def ask_interp_engine() -> dict[str, Any]:
    """Return activations at some of its points, by its names, of models in local folders."""
    from interp_engine import load_model, run_with_cache

    found = {}
    for kind in ("gpt2", "llama", "gemma2", "qwen3"):
        folder = save_model(Path(tempfile.mkdtemp()) / kind, kind)
        model = load_model(str(folder), backend="eager", device="cpu", dtype="float32")
        points = [*ENGINE_POINTS, *(("attn_out_post.1", "mlp_out_post.1") if kind == "gemma2" else ())]
        cache = run_with_cache(model, torch.tensor(IDS), points)
        found[kind] = {name: round_all(cache[name]) for name in points}
    return found


ASK = {"transformer_lens": ask_transformer_lens, "pyvene": ask_pyvene, "nnsight": ask_nnsight, "interp_engine": ask_interp_engine}


def main() -> None:
    """Write the golden values of the peers that are named."""
    found = json.loads(GOLDEN.read_text(encoding="utf-8")) | {peer: ASK[peer]() for peer in sys.argv[1:]}
    GOLDEN.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
