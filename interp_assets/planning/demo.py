"""What `make demo` runs, without a file: the shipped model on the standard library, its heads, an SAE, and latents that a sweep finds."""

import os
from typing import Final

from interp_assets.planning.config import ROOT_VARIABLE, PipelineConfig, SaeConfig, ShuffleConfig
from interp_assets.planning.sections import CorpusConfig, HeadPrompt, HeadsConfig
from interp_assets.planning.steering import SearchConfig, SteeringConfig

_READER = 'class Reader:\n    def __init__(self, path, mode="r"):\n        self.path = path\n        self.mode = mode\n\n'
_WRITER = 'class Writer:\n    def __init__(self, path, mode="w"):\n        self.path = path\n        self.mode = mode\n'
HEAD_PROMPTS: Final[dict[str, str | HeadPrompt]] = {
    "repeated": HeadPrompt(text=_READER + _WRITER, logits=["mode"]),
    "renamed": _READER + _WRITER.replace("mode", "flags"),
}
"""What is said twice shows heads that copy, and which edges raise what is copied; with another name in the second half, what they do without."""
PROMPTS: Final = (
    "import os\nimport sys\n",
    "def main(",
    "class Parser:\n    def __init__(self, ",
    "for line in ",
    "    if not isinstance(",
    "    try:\n        ",
    "    return self.",
    '    """Return the ',
)
"""Texts that are steered: beginnings of ordinary code."""


def demo_config() -> PipelineConfig:
    """Return the embedded default: the shipped model on a million tokens of the standard library, under `INTERP_ROOT` (default `data`)."""
    sae = SaeConfig(batch_rows=2048, learning_rate=1e-3, n_rows=1_500_000)
    shuffle = ShuffleConfig(passes=2, fan_out=8)  # its rows fit one job: stated, so that it shows what larger data need
    steering = SteeringConfig(prompts=list(PROMPTS), search=SearchConfig(candidates=32), strengths=[-5.0, 2.0, 5.0, 10.0], new_tokens=12)
    heads = HeadsConfig(max_shards=2, prompts=HEAD_PROMPTS)  # a sixth of the text: the ranking of the heads is that of all of it
    root, corpus = os.environ.get(ROOT_VARIABLE, "data"), CorpusConfig(max_shards=12)
    return PipelineConfig(root=root, corpus=corpus, heads=heads, shuffle=shuffle, saes=[sae], steering=steering)
