"""Rotary frequencies that follow the length: a row is that of its context run alone, whatever is padded, runs beside it or ran before."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Answer
from interp_assets.garcon.plan import GeneratePlan, Grad, LogProb, Plan, Read
from interp_assets.garcon.rope import follows_length
from interp_assets.garcon.run import Run, run_plan, run_together
from interp_assets.garcon.steering.decode import generate
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.activations import make_batches

ORIGINAL, LONGEST, VOCABULARY = 20, 64, 50
LENGTHS = (18, 20, 21, 33, 5, 40)
"""Around the length at which the frequencies change, which is inside what pads to 32."""
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": LONGEST}


def make_config(kind: str) -> PreTrainedConfig:
    """Make a configuration with one of the kinds of rotary embeddings."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 6.0, 12.0]}
        return Phi3Config(**_SIZES, **_IDS, original_max_position_embeddings=ORIGINAL, rope_parameters=rope)
    if kind == "dynamic":  # it stretches beyond max_position_embeddings, which SubjectModel does not allow, unless told the original
        return LlamaConfig(**_SIZES, **{**_IDS, "max_position_embeddings": ORIGINAL}, rope_parameters=rope)
    return LlamaConfig(**_SIZES, **_IDS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def make_subject(kind: str) -> SubjectModel:
    """Build a random network; one that stretches may be as long as it stretches."""
    generator = torch.Generator().manual_seed(3)
    subject = SubjectModel(AutoModelForCausalLM.from_config(make_config(kind)), kind)
    for parameter in subject.net.parameters():  # strong enough attention that frequencies matter
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + (1.0 if parameter.ndim == 1 else 0.0))
    subject.max_context = LONGEST
    return subject


def draw_contexts() -> list[Tensor]:
    """Draw contexts of `LENGTHS`."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def run_alone(kind: str, contexts: list[Tensor]) -> list[Tensor]:
    """Run each context in a network of its own, which has seen nothing before, for what leaves its first block: the oracle."""
    return [make_subject(kind).net.base_model(input_ids=ids[None], output_hidden_states=True).hidden_states[1][0] for ids in contexts]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_row_in_a_padded_batch_is_that_of_its_context_alone(kind: str) -> None:
    """Padding beyond the original length changed the frequencies of every row of the batch, by up to half of its norm."""
    contexts = draw_contexts()
    expected = run_alone(kind, contexts)
    subject = make_subject(kind)
    name = "module:model.layers.0"
    token_ids = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    mask = torch.arange(token_ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    rows = subject.capture(token_ids, mask, [name])[name]
    for row, length, alone in zip(rows, LENGTHS, expected, strict=True):
        torch.testing.assert_close(row[:length], alone, rtol=1e-5, atol=1e-5)
    logits = subject.logits(token_ids, mask)
    patched = subject.logits_with_patch(token_ids, mask, name, lambda value: torch.where(mask[..., None], value, 0.0))
    for i, ids in enumerate(contexts):
        alone = make_subject(kind).net(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(logits[i, : len(ids)], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(patched[i, : len(ids)], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_row_of_a_plan_is_what_it_is_alone(kind: str) -> None:
    """Reads, patterns, metrics and derivatives of rows of unequal length, and of several people's in one forward."""
    subject, d = make_subject(kind), LogProb(name="d", token=5)
    reads = (Read(name="a", point="resid_post.0"), Read(name="p", point="pattern.1"), d, Grad(name="g", of="d", at=("resid_pre.1",)))
    rows = tuple(tuple(ids.tolist()) for ids in draw_contexts())
    plans = [Plan(rows=(row,), operations=reads) for row in rows]
    found = run_plan(subject, Plan(rows=rows, operations=reads), {})
    shared = run_together([Run(subject, plan, {}) for plan in plans])
    for i, (plan, length) in enumerate(zip(plans, LENGTHS, strict=True)):
        alone, beside = run_plan(make_subject(kind), plan, {}), shared[i]
        assert isinstance(beside, Answer)
        torch.testing.assert_close(beside.tensors, alone.tensors, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.tensors["a"][i, :length], alone.tensors["a"][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.tensors["p"][i, :, :length, :length], alone.tensors["p"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.tensors["d"][i], alone.tensors["d"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.derivatives["g"]["resid_pre.1"][i, :length], alone.derivatives["g"]["resid_pre.1"][0], rtol=1e-3, atol=1e-4)
    assert not any(module._forward_hooks for module in subject.net.modules())


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_what_ran_before_leaves_no_trace(kind: str) -> None:
    """`dynamic` kept the frequencies of the longest context that it had seen; bits are equal, the shapes being the same."""
    contexts = draw_contexts()
    subject = make_subject(kind)
    for ids in (contexts[5], contexts[3], contexts[2], contexts[1], contexts[0]):
        alone = make_subject(kind).capture(ids[None], None, ["module:model.layers.1"])
        assert torch.equal(subject.capture(ids[None], None, ["module:model.layers.1"])["module:model.layers.1"], alone["module:model.layers.1"])


def test_the_frequencies_do_change_at_the_original_length() -> None:
    """Else the tests above would show nothing: the last context's first rows are others when it is cut to the original length."""
    for kind in ("longrope", "dynamic"):
        ids, name = draw_contexts()[5], "module:model.layers.0"
        whole, cut = (make_subject(kind).capture(part[None], None, [name])[name][0, 1:ORIGINAL] for part in (ids, ids[:ORIGINAL]))
        assert (whole - cut).norm() > 0.05 * whole.norm()


def test_harvest_runs_contexts_of_one_length_together_without_padding() -> None:
    """So that the number of contexts in a forward, which decides the last bits, is a function of the length alone."""
    offsets = np.array([0, 18, 38, 56, 61])
    batches = list(make_batches(np.arange(61, dtype=np.uint32), offsets, 100, max_context=64, must_see_mask=False, step=1))
    assert [tuple(batch.token_ids.shape) for batch in batches] == [(1, 5), (2, 18), (1, 20)]
    assert all(bool(batch.attention_mask.all()) for batch in batches)
    assert sorted(int(row) for batch in batches for row in batch.rows) == list(range(61))
    assert [stop - start for start, stop in pairwise(offsets)] == [18, 20, 18, 5]


def test_only_such_models_are_run_so() -> None:
    """All others keep their batches, and their bits."""
    assert [follows_length(make_config(kind)) for kind in ("longrope", "dynamic", "default")] == [True, True, False]
    per_layer = LlamaConfig(**_SIZES)
    per_layer.rope_parameters = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}  # type: ignore[assignment]
    assert follows_length(per_layer)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_are_continued_as_far_as_kept_keys_stay_true(kind: str) -> None:
    """Up to the original length, in a padded batch and after longer forwards, the tokens are those of running all again; beyond it is refused."""
    contexts = draw_contexts()
    subject = make_subject(kind)
    subject.logits(contexts[5][None], None)  # stretches what it keeps
    rows = tuple(tuple(contexts[4][:length].tolist()) for length in (5, 3))
    found = generate(subject, GeneratePlan(rows=rows, new_tokens=ORIGINAL - 5), {})
    for row, text in zip(rows, found.texts, strict=True):
        whole = list(row)
        while len(whole) < len(row) + ORIGINAL - 5:
            whole.append(int(make_subject(kind).logits(torch.tensor([whole]), None)[0, -1].argmax()))
        assert [token.token for token in text.tokens] == whole[len(row) :]
    with pytest.raises(InputError, match=r"The rotary frequencies of .* change beyond 20 tokens, and a cache keeps keys with the earlier ones"):
        generate(subject, GeneratePlan(rows=rows, new_tokens=ORIGINAL - 4), {})
