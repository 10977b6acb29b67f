"""Files of architectures as people write them, sound and broken, and pipelines that name them."""

from pathlib import Path
from typing import Any

from interp_assets.planning.config import PipelineConfig, find_code
from interp_assets.planning.pipeline import Pipeline

HEAD = "import torch\nfrom interp_assets.lab import Terms, architecture\n\n"
P_ANNEAL = """@architecture(kind="relu")
def p_anneal(w, x, y, step, *, p_end: float = 0.5):
    p = 1 + (p_end - 1) * max(0.0, (step.progress - 0.3) / 0.7)
    f = torch.relu(x @ w["W_enc_T"].T + w["b_enc"])
    penalty = (f * step.norms(w)).clamp(min=1e-6).pow(p).mul(f > 0).sum(1).mean()
    return Terms(f @ w["W_dec"] + w["b_dec"], latents=f, penalty=step.coefficient * penalty)
"""
SOUND = HEAD + P_ANNEAL
RELU = """@architecture(kind="relu")
def mine(w, x, y, step, *, extra: float = 0.0, n: int = 1):
    f = torch.relu(x @ w["W_enc_T"].T + w["b_enc"])
    penalty = step.coefficient * (f * step.norms(w)).sum(1).mean()
    return Terms(f @ w["W_dec"] + w["b_dec"], latents=f, penalty=penalty)
"""
"""What the built-in `relu` is, in five lines: tests change one of them."""


def write_file(folder: Path, text: str = SOUND, name: str = "my_sae.py") -> Path:
    """Write a file of architectures."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def change(before: str, after: str, text: str = HEAD + RELU) -> bytes:
    """Return a file with one thing changed."""
    assert before in text
    return text.replace(before, after).encode()


def reading(planted: Any, folder: Path) -> Any:
    """Return a planted pipeline whose configuration knows the files in a folder."""
    config: PipelineConfig = find_code(planted.pipeline.config, folder)
    return planted._replace(pipeline=Pipeline(config, planted.pipeline.plan))
