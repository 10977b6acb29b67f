"""A configured model becomes a network whose activations can be read and replaced at named hook points.

Plain PyTorch hooks, nothing else: they are set for one forward and removed after it. What is read is cloned, so later in-place work in
the network cannot change it; a hook that did not fire is an error; a forward that only reads stops after its last hook point.

    subject = load_subject_model(config.model, config.execution)
    rows = subject.capture(token_ids, attention_mask, ["resid_post.2"])["resid_post.2"]     # [batch, context, d_in]
    logits = subject.logits_with_patch(token_ids, attention_mask, "resid_post.2", torch.zeros_like)

Contexts are padded on the right. In a decoder nothing looks at what follows, so no mask is passed and a row's bits do not depend on how
much padding follows it; an encoder gets the mask. Batching, dtypes of stored rows and checks of finiteness belong to `harvest`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from interp_assets.errors import InputError
from interp_assets.garcon.adapters import DECODERS, ENCODERS
from interp_assets.garcon.device import choose_device
from interp_assets.garcon.locate import first_line, load_model_config, locate_model, next_step
from interp_assets.garcon.points import HookPoint, find_point, list_points, module_of, tensor_in, with_tensor
from interp_assets.planning.config import ExecutionConfig, ModelConfig

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
        self.name = name
        self.is_causal = not is_encoder(net.config)
        self.vocabulary_size = len(_weight(net.get_input_embeddings()))
        self.max_context = max_context(net.config)
        self._widths: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.net.device

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.net.config.get_text_config().hidden_size)

    def points(self) -> list[HookPoint]:
        """List the canonical hook points: name, module path, side and TransformerLens alias. `module:<path>` is allowed besides."""
        return list_points(self.net)

    def d_in(self, hook_point: str) -> int:
        """Return the width of the rows at a hook point. Raises `InputError` for an unknown one, with the near names."""
        if hook_point not in self._widths:
            point = find_point(self.net, hook_point)
            self._widths[hook_point] = self.d_model if point.alias else self._probe_width(hook_point)
        return self._widths[hook_point]

    def capture(
        self, token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None, hook_points: Sequence[str]
    ) -> dict[str, Tensor]:
        """Run the network and return the activations at every hook point, each `[batch, context, d_in]` in the model's dtype.

        `attention_mask` is False on padding, which stands on the right; None means that there is none. Raises `InputError` for token ids
        outside the vocabulary, contexts longer than the model's, unknown hook points, and a hook point that the forward did not reach.
        """
        captured = self._run_captured(hook_points, self._arguments(token_ids, attention_mask))
        points = [find_point(self.net, name) for name in hook_points]
        for point in points:
            if point.name not in captured:
                raise InputError(f"Hook point {point.name!r} did not fire: module {point.module_path!r} took no part in the forward of {self.name}.")
            shape = captured[point.name].shape
            if len(shape) != 3 or shape[:2] != token_ids.shape:
                raise InputError(f"Hook point {point.name!r} gives {list(shape)}; rows need [batch, context, d_in] = {[*token_ids.shape, 'd_in']}.")
        return captured

    def logits(
        self, token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None
    ) -> Float[Tensor, "batch context vocabulary"]:
        """Return the language model's logits in the model's dtype. Raises `InputError` for a model without a language-model head."""
        if self.net.get_output_embeddings() is None:
            raise InputError(f"{self.name} ({self.net.config.model_type}) has no language-model head: there are no logits and no loss.")
        with torch.no_grad():
            return self.net(**self._arguments(token_ids, attention_mask)).logits

    def logits_with_patch(
        self, token_ids: Int[Tensor, "batch context"], attention_mask: Bool[Tensor, "batch context"] | None, hook_point: str, replace: Patch
    ) -> Float[Tensor, "batch context vocabulary"]:
        """Return the logits when the activations at `hook_point` are replaced by `replace(activations)`; `torch.zeros_like` is zero ablation."""
        point = find_point(self.net, hook_point)
        with _replaced(module_of(self.net, point), point, replace) as fired:
            logits = self.logits(token_ids, attention_mask)
        if not fired:
            raise InputError(f"Hook point {hook_point!r} did not fire: module {point.module_path!r} took no part in the forward of {self.name}.")
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
        adapter = DECODERS.get(self.net.config.model_type)
        if head is None or not self.is_causal:
            return Unembedding(None, f"{self.net.config.model_type} has no language-model head")
        if adapter is None:
            return Unembedding(None, f"the final norm of a {self.net.config.model_type} model is not known here")
        norm = self.net.base_model.get_submodule(adapter.final_norm)
        gamma = _weight(norm).float().cpu()
        scale = 1.0 + gamma if adapter.norm_kind == "rms_plus_one" else gamma
        matrix = scale[:, None] * _weight(head).float().cpu().T
        if adapter.norm_kind == "layer":
            matrix = matrix - matrix.mean(dim=0, keepdim=True)
        on_stream = frozenset(point.module_path for point in list_points(self.net) if point.side == "output")
        return Unembedding(matrix - matrix.mean(dim=1, keepdim=True), "", on_stream)

    def check_tokens(self, token_ids: Int[Tensor, "*shape"]) -> None:
        """Raise `InputError` for token ids outside the embedding: then the tokenizer is another model's."""
        highest = int(token_ids.max()) if token_ids.numel() else 0
        if highest >= self.vocabulary_size or (token_ids.numel() and int(token_ids.min()) < 0):
            raise InputError(
                f"Token id {highest:,} is outside the {self.vocabulary_size:,} embeddings of {self.name}: the tokenizer belongs to another model."
            )

    def _arguments(self, token_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Check a batch and return what the network is called with."""
        self.check_tokens(token_ids)
        if token_ids.shape[1] > self.max_context:
            raise InputError(
                f"A context of {token_ids.shape[1]:,} tokens is longer than the {self.max_context:,} of {self.name}. Lower corpus.context_length."
            )
        arguments: dict[str, Any] = {"input_ids": token_ids.to(self.device)}
        if self.is_causal:
            arguments["use_cache"] = False
        elif attention_mask is not None:
            arguments["attention_mask"] = attention_mask.to(self.device, torch.int64)
        return arguments

    def _run_captured(self, hook_points: Sequence[str], arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Run the network up to the last of the hook points."""
        captured: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in hook_points:
                point = find_point(self.net, name)
                stack.callback(_read(module_of(self.net, point), point, captured, n_wanted=len(set(hook_points))).remove)
            with suppress(_AllCapturedError), torch.no_grad():
                self.net.base_model(**arguments)
        return captured

    def _probe_width(self, hook_point: str) -> int:
        """Find the width of a module's output by a forward, which a ready-made mask makes possible without weights."""
        n_tokens = min(4, self.max_context)
        token_ids = torch.zeros((1, n_tokens), dtype=torch.int64, device=self.device)
        mask = torch.zeros((1, 1, n_tokens, n_tokens), dtype=self.net.dtype, device=self.device)
        captured = self._run_captured([hook_point], {"input_ids": token_ids, "attention_mask": mask})
        if hook_point not in captured:
            raise InputError(f"Hook point {hook_point!r} did not fire: it takes no part in the forward of {self.name}.")
        return int(captured[hook_point].shape[-1])


def load_subject_model(model: ModelConfig, execution: ExecutionConfig) -> SubjectModel:
    """Load a language model or an encoder with its weights onto the configured device.

    Only safetensors weights are read, and every weight must be there. Raises `InputError` for what cannot be found or loaded.
    """
    config = load_model_config(model)
    place = locate_model(model)
    factory = AutoModel if is_encoder(config) else AutoModelForCausalLM
    options = {**place.options, "dtype": getattr(torch, model.dtype), "use_safetensors": True, "output_loading_info": True}
    try:
        with _quiet_loading():
            loaded: Any = factory.from_pretrained(place.name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"Cannot load the weights of {model.name!r}: {first_line(error)}. {next_step(model)}") from error
    net, info = loaded
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        raise InputError(
            f"{model.name!r} lacks {len(missing)} weight(s) of a {config.model_type} model, the first is {missing[0]!r}. {next_step(model)}"
        )
    return SubjectModel(net.to(choose_device(execution.device)), model.name)


def make_meta_model(model: ModelConfig) -> SubjectModel:
    """Build a model's structure without weights or memory, on PyTorch's `meta` device: enough to name hook points and find widths."""
    config = load_model_config(model)
    factory = AutoModel if is_encoder(config) else AutoModelForCausalLM
    with torch.device("meta"):
        net = factory.from_config(config, trust_remote_code=model.trust_remote_code)
    return SubjectModel(net, model.name)


def is_encoder(config: Any) -> bool:
    """Tell whether a configuration is of a model that sees the whole context at once and predicts no next token."""
    architectures = config.architectures or []
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures) and config.model_type not in ENCODERS:
        return False
    return config.model_type in ENCODERS or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def max_context(config: Any) -> int:
    """Return the longest context a model takes: its position table, less what RoBERTa keeps for padding."""
    text = config.get_text_config()
    length = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
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
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


class _AllCapturedError(Exception):
    """Ends a forward whose activations have all been read."""


def _read(module: nn.Module, point: HookPoint, captured: dict[str, Tensor], n_wanted: int) -> torch.utils.hooks.RemovableHandle:
    def keep(value: Tensor) -> None:
        captured.setdefault(point.name, value.detach().clone())
        if len(captured) == n_wanted:
            raise _AllCapturedError

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(_hidden_states(args, kwargs, point))

    def on_output(_module: nn.Module, _args: Any, output: Any) -> None:
        keep(tensor_in(output, f"Module {point.module_path!r}"))

    if point.side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@contextmanager
def _replaced(module: nn.Module, point: HookPoint, replace: Patch) -> Iterator[list[bool]]:
    fired: list[bool] = []

    def changed(value: Tensor) -> Tensor:
        fired.append(True)
        result = replace(value)
        if result.shape != value.shape:
            raise InputError(f"The replacement at {point.name!r} has shape {list(result.shape)}, the activations {list(value.shape)}.")
        return result.to(value)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value = changed(_hidden_states(args, kwargs, point))
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    def on_output(_module: nn.Module, _args: Any, output: Any) -> object:
        return with_tensor(output, changed(tensor_in(output, f"Module {point.module_path!r}")))

    handle = module.register_forward_pre_hook(on_input, with_kwargs=True) if point.side == "input" else module.register_forward_hook(on_output)
    try:
        yield fired
    finally:
        handle.remove()


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], point: HookPoint) -> Tensor:
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise InputError(f"Module {point.module_path!r} gets no hidden states as input: {point.name!r} cannot be read.")
    return value


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
