"""What planning asks of a model is measured once, and again when anything that it follows from has changed."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_net, make_tokenizer, save_model

from interp_assets.errors import InputError
from interp_assets.garcon.facts import ModelFacts, find_facts
from interp_assets.planning.config import ModelConfig
from interp_assets.storage.seen import SeenFiles

POINTS = ["resid_post.1", "module:transformer.h.0.mlp.c_fc"]


class CountingFiles(SeenFiles):
    """Notes that count how often a model was built."""

    n_built = 0

    def answer(self, path: Path, question: str, read: Callable[[], bytes]) -> bytes:
        """Count the facts that are not noted."""

        def counted() -> bytes:
            self.n_built += question.startswith("model facts")
            return read()

        return super().answer(path, question, counted)


def _find(folder: Path, notes: Path, points: list[str] = POINTS) -> tuple[ModelFacts, int]:
    with CountingFiles(notes, now_ns=lambda: time.time_ns() + 10**10) as seen:
        facts = find_facts(ModelConfig(name=str(folder)), points, seen)
        return facts, seen.n_built


def test_facts_are_those_of_the_model_and_are_measured_once(tmp_path: Path) -> None:
    """Building a network to learn its width takes seconds of importing: `interp plan` is asked again and again."""
    folder, notes = save_model(tmp_path / "model", "gpt2"), tmp_path / "notes"
    net = make_net("gpt2")
    first, second = _find(folder, notes), _find(folder, notes)
    assert (first[1], second[1]) == (1, 0)
    assert second[0] == first[0]
    facts = first[0]
    assert facts.hook_widths == {POINTS[0]: net.config.n_embd, POINTS[1]: 4 * net.config.n_embd}
    assert (facts.vocabulary_size, facts.max_context) == (net.config.vocab_size, net.config.n_positions)
    assert facts.tokenizer_size == make_tokenizer().vocab_size
    assert (facts.n_parameters, facts.model_type, facts.is_causal) == (sum(weight.numel() for weight in net.parameters()), "gpt2", True)


@pytest.mark.parametrize(("family", "aliases"), [("gpt2", {"q.0": "blocks.0.attn.hook_q"}), ("llama", {})])
def test_queries_have_another_name_where_there_is_no_rope(tmp_path: Path, family: str, aliases: dict[str, str]) -> None:
    """An SAE at `q.0` of GPT-2 was exported for `hook_rot_q`, which that model does not have."""
    facts, _ = _find(save_model(tmp_path / "model", family), tmp_path / "notes", ["q.0", "v.0", "resid_post.0"])
    assert facts.hook_aliases == aliases


def test_what_is_noted_is_found_without_pytorch(tmp_path: Path) -> None:
    """PyTorch and transformers are most of what a plan takes: nothing on the way to the notes may ask them, weights' fingerprint included."""
    folder, notes = save_model(tmp_path / "model", "gpt2"), tmp_path / "notes"
    facts, _ = _find(folder, notes)
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from interp_assets.garcon.facts import find_facts\n"
        "from interp_assets.planning.config import ModelConfig\n"
        "from interp_assets.storage.seen import SeenFiles\n"
        "with SeenFiles(Path(sys.argv[2]), now_ns=lambda: time.time_ns() + 10**10) as seen:\n"
        "    print(find_facts(ModelConfig(name=sys.argv[1]), sys.argv[3:], seen).model_dump_json())\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder), str(notes), *POINTS], capture_output=True, text=True, check=True)
    assert done.stdout == f"{facts.model_dump_json()}\n[]\n"


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors", "tokenizer_config.json", "points"])
def test_facts_are_measured_again_after_a_change(tmp_path: Path, changed: str) -> None:
    """A note of another model would plan wrong widths."""
    folder, notes = save_model(tmp_path / "model", "gpt2"), tmp_path / "notes"
    before, _ = _find(folder, notes)
    if changed != "points":
        path = folder / changed
        path.write_bytes(path.read_bytes() + (b"\0" if changed.endswith("tensors") else b"\n"))
    after, n_built = _find(folder, notes, POINTS[:1] if changed == "points" else POINTS)
    assert n_built == 1
    assert (after.model_fingerprint != before.model_fingerprint) == (changed in ("config.json", "model.safetensors"))
    assert (after.tokenizer_fingerprint != before.tokenizer_fingerprint) == (changed == "tokenizer_config.json")
    assert list(after.hook_widths) == (POINTS[:1] if changed == "points" else POINTS)


def test_an_unknown_hook_point_is_an_error_each_time(tmp_path: Path) -> None:
    """What cannot be answered is not noted."""
    folder, notes = save_model(tmp_path / "model", "gpt2"), tmp_path / "notes"
    for _ in range(2):
        with pytest.raises(InputError, match=r"no hook point 'resid_pots.1'"):
            _find(folder, notes, ["resid_pots.1"])
