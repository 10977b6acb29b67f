"""A configured model becomes a network whose activations can be read and replaced at named hook points.

Plain PyTorch hooks, nothing else: they are set for one forward and removed after it. What is read is cloned, so later in-place work in
the network cannot change it; a hook that did not fire is an error; a forward that only reads stops after its last hook point.

    subject = load_subject_model(config.model, config.execution)
    rows = subject.capture(token_ids, attention_mask, ["resid_post.2"])["resid_post.2"]     # [batch, context, d_in]
    logits = subject.logits_with_patch(token_ids, attention_mask, "resid_post.2", torch.zeros_like)

Contexts are padded on the right. In a decoder nothing looks at what follows, so no mask is passed and a row's bits do not depend on how
much padding follows it; an encoder gets the mask. Where rotary frequencies follow the length, each context has those of its own (`rope.py`).
On a CPU operators are divided by their sizes alone (`compute/any_threads.py`): no bit depends on the number of threads. Batching, dtypes of stored
rows and checks of finiteness belong to `harvest`.
"""

import inspect
import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from interp_assets.compute.any_threads import AnyThreads
from interp_assets.errors import InputError
from interp_assets.garcon.adapters import ADAPTERS, ENCODERS, find_adapter
from interp_assets.garcon.attention import observe_attention
from interp_assets.garcon.blank import answer_without_values
from interp_assets.garcon.device import choose_device
from interp_assets.garcon.locate import first_line, load_model_config, locate_model, looks_both_ways, next_step
from interp_assets.garcon.points import BY_HEAD, HookPoint, find_point, list_points, point_shape, tensor_in
from interp_assets.garcon.rope import follows_length, forget_lengths, own_lengths
from interp_assets.garcon.spread import DeviceMap, check_map, check_memory, count_weights, device_of, free_bytes_of, read_parameter, spread_options
from interp_assets.garcon.taps import Tap, tapped
from interp_assets.planning.config import ExecutionConfig, ModelConfig
from interp_assets.planning.hook_names import STREAM_KINDS
from interp_assets.planning.progress import format_count

_RUNNING: Final = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError)
"""What a model's own code raises when it is run on nothing but token ids and needs more, or when its configuration does not hold together."""
Patch = Callable[[Tensor], Tensor]
"""Takes the activations `[batch, context, d_in]` at a hook point and returns what the network goes on with."""


class Unembedding(NamedTuple):
    """The direct path from the residual stream to the logits, up to a positive scale per token."""

    matrix: Tensor | None
    """`[d_model, vocabulary]` float32 on the CPU: a direction d of the residual stream moves the logits by d @ matrix. None without one."""
    reason: str
    """Why there is no matrix; empty when there is one."""
    residual_modules: frozenset[str] = frozenset()
    """Modules whose output is the residual stream or is added to it: only there does a direction move the logits so."""


class SubjectModel:
    """A loaded network with named hook points. Make it with `load_subject_model`, or around a network that is already in memory."""

    def __init__(self, net: PreTrainedModel, name: str = "model") -> None:
        """Take a network in evaluation mode; `name` is for messages."""
        self.net = net.eval().requires_grad_(requires_grad=False)
        observe_attention(net)
        self.name = name
        self.is_causal = not is_encoder(net.config)
        self.follows_length = follows_length(net.config)
        self._embedding: Any = net.get_input_embeddings()
        self.vocabulary_size = len(self._embedding.weight)
        self.max_context = max_context(net.config)
        self.can_choose_logits = "logits_to_keep" in inspect.signature(net.forward).parameters
        self._widths: dict[str, int] = {}
        self._fixed_arguments: dict[str, Any] = {"use_cache": False} if self.is_causal else {}

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return device_of(self._embedding)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.net.config.get_text_config().hidden_size)

    def points(self) -> list[HookPoint]:
        """List the canonical hook points: name, module path, side and TransformerLens alias. `module:<path>` is allowed besides."""
        return list_points(self.net)

    def d_in(self, hook_point: str) -> int:
        """Return the width of the rows at a hook point; heads stand side by side in a row.

        Raises `InputError` for an unknown one, with the near names, and for one that has no rows.
        """
        if hook_point not in self._widths:
            point = find_point(self.net, hook_point)
            shape = point_shape(self.net, point)
            if point.kind == "pattern":
                raise InputError(f"Hook point {hook_point!r} has no rows: a pattern is as wide as its context is long. Read z.L, q.L or k.L instead.")
            self._widths[hook_point] = math.prod(int(size) for size in shape[2:]) if shape else self._probe_width(hook_point)
        return self._widths[hook_point]

    def capture(
        self, token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None, hook_points: Sequence[str]
    ) -> dict[str, Tensor]:
        """Run the network and return the activations at every hook point, each `[batch, context, d_in]` in the model's dtype.

        `attention_mask` is False on padding, which stands on the right; None means that there is none. Raises `InputError` for token ids
        outside the vocabulary, contexts longer than the model's, unknown hook points, and a hook point that the forward did not reach.
        """
        with own_lengths(self.net, attention_mask):
            captured = self._run_captured(hook_points, self.arguments(token_ids, attention_mask))
        for name in hook_points:
            if name not in captured:
                raise _did_not_fire(find_point(self.net, name), self.name)
            if find_point(self.net, name).kind in BY_HEAD:
                captured[name] = captured[name].flatten(2)
            shape = captured[name].shape
            if len(shape) != 3 or shape[:2] != token_ids.shape:
                raise InputError(f"Hook point {name!r} gives {list(shape)}; rows need [batch, context, d_in] = {[*token_ids.shape, 'd_in']}.")
        return captured

    def logits(
        self, token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None
    ) -> Float[Tensor, "batch context vocabulary"]:
        """Return the language model's logits in the model's dtype. Raises `InputError` for a model without a language-model head."""
        if self.net.get_output_embeddings() is None:
            raise InputError(f"{self.name} ({self.net.config.model_type}) has no language-model head: there are no logits and no loss.")
        arguments = self.arguments(token_ids, attention_mask)
        with own_lengths(self.net, attention_mask), torch.no_grad(), AnyThreads():
            return self.net(**arguments).logits

    def logits_with_patch(
        self, token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None, hook_point: str, replace: Patch
    ) -> Float[Tensor, "batch context vocabulary"]:
        """Return the logits when the activations at `hook_point` are replaced by `replace(activations)`; `torch.zeros_like` is zero ablation."""
        point = find_point(self.net, hook_point)
        fired: list[bool] = []

        def act(value: Tensor) -> Tensor:
            fired.append(True)
            rows = value.flatten(2) if point.kind in BY_HEAD else value
            result = replace(rows)
            if result.shape != rows.shape:
                raise InputError(f"The replacement at {point.name!r} has shape {list(result.shape)}, the activations {list(rows.shape)}.")
            return result.to(value).reshape(value.shape)

        with tapped(self.net, [Tap(point, act)], token_ids.shape[1]):
            logits = self.logits(token_ids, attention_mask)
        if not fired:
            raise _did_not_fire(point, self.name)
        return logits

    def loss(self, token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None) -> Float[Tensor, "batch targets"]:
        """Return the cross entropy in nats of every next token: `[batch, context - 1]` float32, zero where the next token is padding."""
        return token_losses(self.logits(token_ids, attention_mask), token_ids, attention_mask)

    def unembedding(self) -> Unembedding:
        """Fold the final norm into the unembedding and take out what no softmax sees.

        LayerNorm: (I - 11'/d) diag(gamma) W_U; RMSNorm: diag(gamma) W_U; then each row is centred over the vocabulary. The norm's 1/sigma
        is a positive scale, its bias is the same for all directions, and later blocks are ignored (the direct path).
        """
        head = self.net.get_output_embeddings()
        adapter = find_adapter(self.net.config)
        if head is None or not self.is_causal:
            return Unembedding(None, f"{self.net.config.model_type} has no language-model head")
        if adapter is None or not adapter.final_norm:
            return Unembedding(None, f"the final norm of a {self.net.config.model_type} model is not known here")
        norm = self.net.base_model.get_submodule(adapter.final_norm)
        gamma = _weight(norm).float().cpu()
        scale = 1.0 + gamma if adapter.norm_kind == "rms_plus_one" else gamma
        matrix = scale[:, None] * _weight(head).float().cpu().T
        if adapter.norm_kind == "layer":
            matrix = matrix - matrix.mean(dim=0, keepdim=True)
        on_stream = frozenset(point.module_path for point in list_points(self.net) if point.kind in STREAM_KINDS and point.side == "output")
        return Unembedding(matrix - matrix.mean(dim=1, keepdim=True), "", on_stream)

    def check_tokens(self, token_ids: Int[Tensor, "*shape"]) -> None:
        """Raise `InputError` for token ids outside the embedding: then the tokenizer is another model's."""
        lowest, highest = (int(token_id) for token_id in torch.aminmax(token_ids)) if token_ids.numel() else (0, 0)
        if highest >= self.vocabulary_size or lowest < 0:
            raise InputError(
                f"Token id {highest if lowest >= 0 else lowest:,} is outside the {self.vocabulary_size:,} embeddings of {self.name}: "
                "the tokenizer belongs to another model."
            )

    def arguments(self, token_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Check a batch of right-padded contexts and return what the network is called with."""
        if self.follows_length:
            forget_lengths(self.net)
        self.check_tokens(token_ids)
        if token_ids.shape[1] > self.max_context:
            raise InputError(
                f"A context of {token_ids.shape[1]:,} tokens is longer than the {self.max_context:,} of {self.name}. Lower corpus.context_length."
            )
        arguments: dict[str, Any] = {"input_ids": token_ids.to(self.device), **self._fixed_arguments}
        if not self.is_causal and attention_mask is not None:
            arguments["attention_mask"] = attention_mask.to(self.device, torch.int64)
        return arguments

    def _run_captured(self, hook_points: Sequence[str], arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Run the network up to the last of the hook points and return what was there, by the names they were asked for."""
        names: dict[HookPoint, list[str]] = {}
        for name in dict.fromkeys(hook_points):
            names.setdefault(find_point(self.net, name), []).append(name)
        captured: dict[str, Tensor] = {}

        def keep(point: HookPoint, value: Tensor) -> Tensor:
            if names[point][0] not in captured:
                captured.update(dict.fromkeys(names[point], value.detach().clone()))
                if len(captured) == len(set(hook_points)):
                    raise _AllCapturedError
            return value

        network = self.net if any(point.kind == "logits" for point in names) else self.net.base_model
        taps = [Tap(point, partial(keep, point)) for point in names]
        with tapped(self.net, taps, arguments["input_ids"].shape[1]), suppress(_AllCapturedError), torch.no_grad(), AnyThreads():
            network(**arguments)
        return captured

    def _probe_width(self, hook_point: str) -> int:
        """Find the width of a module's output by the forward that harvests, of a few tokens; without weights it answers what it asks of values."""
        token_ids = torch.zeros((1, min(4, self.max_context)), dtype=torch.int64, device=self.device)
        try:
            with answer_without_values() if self.device.type == "meta" else nullcontext():
                captured = self._run_captured([hook_point], {"input_ids": token_ids, **self._fixed_arguments})
        except _RUNNING as error:
            raise InputError(
                f"Hook point {hook_point!r}: {self.name}, a {self.net.config.model_type} model, cannot be run on token ids alone "
                f"({type(error).__name__}: {first_line(error)}), so the width of its rows is not known. It cannot be harvested."
            ) from error
        if hook_point not in captured:
            raise InputError(f"Hook point {hook_point!r} did not fire: it takes no part in the forward of {self.name}.")
        return int(captured[hook_point].shape[-1])


def load_subject_model(model: ModelConfig, execution: ExecutionConfig, device_map: DeviceMap | None = None) -> SubjectModel:
    """Load a language model or an encoder with its weights onto the configured device, or spread over several (`spread.py`).

    Only safetensors weights are read, and every weight must be there. `device_map` takes the place of the configured one. Raises `InputError` for
    what cannot be found, loaded, or held.
    """
    config = load_model_config(model)
    place = locate_model(model)
    device, device_map = choose_device(execution.device), device_map or execution.device_map
    if device_map is None:
        n_weights = count_weights(place.folder) if place.folder else sum(weight.numel() for weight in make_meta_model(model).net.parameters())
        check_memory(model.name, n_weights, model.dtype, device, free_bytes_of(device))
    factory = AutoModel if is_encoder(config) else AutoModelForCausalLM
    folder = tempfile.mkdtemp(prefix="interp-weights-") if device_map else ""
    spread = spread_options(device_map, folder) if device_map else {}
    options = {**place.options, **spread, "dtype": getattr(torch, model.dtype), "use_safetensors": True, "output_loading_info": True}
    try:
        with _quiet_loading(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys")  # `check_map` refuses them
            loaded: Any = factory.from_pretrained(place.name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"Cannot load the weights of {model.name!r}: {first_line(error)}. {next_step(model)}") from error
    net, info = loaded
    if folder:
        weakref.finalize(net, shutil.rmtree, folder, ignore_errors=True)
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        raise InputError(
            f"{model.name!r} lacks {format_count(len(missing), 'weight')} of a {config.model_type} model, the first is {missing[0]!r}. "
            f"{next_step(model)}"
        )
    if device_map:
        check_map(net, device_map)
    subject = SubjectModel(net if device_map else net.to(device), model.name)
    if subject.is_causal and config.model_type not in ADAPTERS:
        require_causal(subject)
    return subject


def require_causal(subject: SubjectModel) -> None:
    """Raise `InputError` for a model that lets a token see what follows: its rows would depend on padding, and mean something else."""
    token_ids = torch.zeros((2, min(6, subject.max_context)), dtype=torch.int64, device=subject.device)
    token_ids[1, -1] = subject.vocabulary_size - 1
    try:
        with torch.no_grad():
            rows = tensor_in(subject.net.base_model(input_ids=token_ids, use_cache=False), f"The base model of {subject.name}")
    except _RUNNING as error:
        raise InputError(
            f"{subject.name}, a {subject.net.config.model_type} model, cannot be run on token ids alone: {first_line(error)}."
        ) from error
    first, second = rows[:, : token_ids.shape[1] - 1].float()
    if (first - second).abs().max() > torch.finfo(subject.net.dtype).eps ** 0.5 * first.abs().max():
        raise InputError(
            f"{subject.name}, a {subject.net.config.model_type} model, is no causal language model as it is configured: what follows a token changes "
            "its activations. If it is a decoder, say is_decoder true in its config.json; else it cannot be harvested."
        )


def make_meta_model(model: ModelConfig) -> SubjectModel:
    """Build a model's structure without weights or memory, on PyTorch's `meta` device: enough to name hook points and find widths."""
    config = load_model_config(model)
    factory = AutoModel if is_encoder(config) else AutoModelForCausalLM
    with torch.device("meta"):
        net = factory.from_config(config, trust_remote_code=model.trust_remote_code)
    return SubjectModel(net, model.name)


def is_encoder(config: Any) -> bool:
    """Tell whether a configuration is of a model that sees the whole context at once and predicts no next token."""
    if config.model_type in ENCODERS or looks_both_ways(config):
        return True
    architectures = config.architectures or []
    return (
        not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


_OFFSET_POSITIONS: Final = frozenset(
    {"roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl", "xmod", "ibert", "mpnet", "longformer", "luke"}
)


def max_context(config: Any) -> int:
    """Return the longest context a model takes: its position table, less what RoBERTa keeps for padding."""
    text = config.get_text_config()
    told = int(getattr(text, "max_position_embeddings", None) or 0)
    length = told if told > 0 else 1 << 30  # XLNet says -1
    if config.model_type in _OFFSET_POSITIONS:
        length -= int(config.pad_token_id or 0) + 1
    return length


def token_losses(
    logits: Float[Tensor, "batch context vocabulary"], token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None
) -> Float[Tensor, "batch targets"]:
    """Return the cross entropy in nats of every next token, `[batch, context - 1]` float32, zero where the next token is padding."""
    targets = token_ids[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return losses if attention_mask is None else losses * attention_mask[:, 1:].to(losses.device)


def _weight(module: nn.Module) -> Tensor:
    weight = read_parameter(module, "weight")
    assert weight is not None
    return weight.detach()


class _AllCapturedError(Exception):
    """Ends a forward whose activations have all been read."""


def _did_not_fire(point: HookPoint, model: str) -> InputError:
    return InputError(f"Hook point {point.name!r} did not fire: module {point.module_path!r} took no part in the forward of {model}.")


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Load without transformers' own progress bar: whoever calls shows one."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
