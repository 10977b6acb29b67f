"""Models larger than one device: two that are not there (memory and disk) stand for many, and every number is the plain load's."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_config, save_model, write_texts
from torch import Tensor

from interp_assets import lab
from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import make_token_shard
from interp_assets.errors import InputError
from interp_assets.garcon.session import Model
from interp_assets.garcon.spread import check_memory, count_weights, free_bytes_of
from interp_assets.garcon.subject import load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.harvest.activations import harvest_shard
from interp_assets.planning.config import ExecutionConfig
from interp_assets.storage.store import open_store

CPU = torch.device("cpu")
MAPS: dict[str, dict[str, int | str]] = {
    "gpt2": {
        **dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0", "transformer.ln_f", "lm_head"), "cpu"),
        "transformer.h.1": "disk",
    },
    "llama": {
        **dict.fromkeys(("model.layers.0", "model.norm", "model.rotary_emb"), "cpu"),
        **dict.fromkeys(("model.embed_tokens", "model.layers.1", "lm_head"), "disk"),
    },
}


@pytest.fixture(scope="module", params=list(MAPS))
def loads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """Load a model plainly, and again with a part of it on the disk."""
    folder = save_model(tmp_path_factory.mktemp("spread") / request.param, request.param)
    plain, spread = lab.load(str(folder), device="cpu"), lab.load(str(folder), device="cpu", device_map=MAPS[request.param])
    assert {parameter.device.type for parameter in spread.subject.net.parameters()} == {"cpu", "meta"}
    return plain, spread


def _trace(llm: Model) -> dict[str, Tensor]:
    with llm.trace("hello there") as t:
        reads = {name: t.read(name) for name in ("resid_pre.0", "resid_post.1", "z.1", "pattern.1", "mlp_act.1")}
        t.patch("resid_post.0", "zero", pos=2)
        t.scale("mlp_out.1", 2.0)
        metric = t.logit_diff("a", "b")
        gradients = t.grad(metric, at=["resid_post.*", "z.1"])
    return {name: read.tensor for name, read in {**reads, **gradients, "metric": metric}.items()}


def test_reads_writes_and_gradients_are_those_of_the_plain_load(loads: tuple[Model, Model]) -> None:
    """On blocks that are in memory and on those that are read from the disk when they are run; sweeps and generation too."""
    plain, spread = map(_trace, loads)
    assert plain.keys() == spread.keys()
    for name, value in plain.items():
        assert torch.equal(value, spread[name]), name
    grids = [llm.sweep("resid_post.*", "hello", "zero", llm.logit_diff("a", "b")).tensor for llm in loads]
    assert torch.equal(*grids)
    assert str(loads[0].generate("hello", new_tokens=3)) == str(loads[1].generate("hello", new_tokens=3))


def test_weights_on_the_disk_are_read(loads: tuple[Model, Model]) -> None:
    """By name, and as the way from a direction to the logits; afterwards they lie where they lay."""
    plain, spread = loads
    for name in ("W_E", "W_U", "W_O.1", "W_Q.1", "W_in.0", "W_out.1"):
        assert torch.equal(plain.weights(name), spread.weights(name)), name
    matrices = [llm.subject.unembedding().matrix for llm in loads]
    assert matrices[0] is not None
    assert matrices[1] is not None
    assert torch.equal(*matrices)
    assert any(parameter.is_meta for parameter in spread.subject.net.parameters())


def test_harvested_shards_are_those_of_the_plain_load(tmp_path: Path) -> None:
    """Byte for byte: how a model is held is no part of any id."""
    config = make_tiny_config(
        save_model(tmp_path / "model", "gpt2"), write_texts(tmp_path / "texts"), harvest={"hook_points": ["resid_post.0", "z.1"]}
    )
    digests = []
    for device_map in (None, MAPS["gpt2"]):
        store = open_store(f"memory://spread-{device_map is None}")
        pipeline = plan_corpus(config, store)
        make_token_shard(pipeline, store, load_tokenizer(config.model), 0)
        subject = load_subject_model(config.model, ExecutionConfig(device="cpu"), device_map)
        digests.append([made.manifest.digest for made in harvest_shard(pipeline, store, subject, 0).values()])
    assert digests[0] == digests[1]


def test_auto_is_one_word_in_a_notebook_and_in_a_configuration(tmp_path: Path) -> None:
    """On a machine that has room for it, it is a plain load."""
    folder = save_model(tmp_path / "model", "gpt2")
    config = make_tiny_config(folder, tmp_path, execution={"device_map": "auto"})
    subject = load_subject_model(config.model, config.execution)
    spread = lab.load(str(folder), device_map="auto", dtype="bfloat16")
    assert subject.net.dtype == torch.float32
    assert spread.subject.net.dtype == torch.bfloat16
    assert spread.run("hello", read="resid_post.1")["resid_post.1"].tensor.dtype == torch.bfloat16


def test_a_map_that_fits_no_model_is_refused(tmp_path: Path) -> None:
    """A misspelt module would lie where nobody put it; what accelerate finds is passed on."""
    folder = str(save_model(tmp_path / "model", "gpt2"))
    with pytest.raises(InputError, match=r"device_map names 'transformer.h.9', which is no module of the model. Near: transformer.h.\d"):
        lab.load(folder, device_map={"": "cpu", "transformer.h.9": "disk"})
    with pytest.raises(InputError, match=r"does not give any device for the following parameters: transformer\.wte\.weight"):
        lab.load(folder, device_map={"transformer.h.0": "disk"})


def test_what_a_load_takes_is_known_from_the_headers(tmp_path: Path) -> None:
    """And said before it begins; what does not fit is refused with what to do, and never half loaded."""
    llm = lab.load(str(save_model(tmp_path / "model", "gpt2")), device="cpu")
    n_weights = count_weights(tmp_path / "model")
    assert n_weights == sum(parameter.numel() for parameter in llm.subject.net.parameters())
    said = check_memory("big", 1_000_000_000, "float32", CPU, 16 * 10**9)
    assert said == "big: 1,000,000,000 weights in float32 take 4.00 GB; cpu has 16.00 GB free."
    with pytest.raises(InputError, match=r"take 4.00 GB; cpu has 3.00 GB free. It does not fit: load it in bfloat16 \(2.00 GB\), spread it with"):
        check_memory("big", 1_000_000_000, "float32", CPU, 3 * 10**9)
    with pytest.raises(InputError, match="It does not fit: spread it with device_map 'auto', or take a machine with more"):
        check_memory("big", 1_000_000_000, "bfloat16", CPU, 10**9)
    assert "free" not in check_memory("big", 1_000_000_000, "float32", torch.device("mps"), None)
    free = free_bytes_of(CPU)
    assert free is None or 0 < free < 1 << 50
