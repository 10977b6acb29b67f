"""Hook points become taps: while a forward runs, functions see the activation at each of them and may put another in its place.

Plain PyTorch hooks, set in the order of the forward and removed when the forward is over. What an act is shown has the point's own shape:
[batch, context, d_in], by head [batch, context, heads, d_head], a pattern [batch, heads, queries, keys]; whatever the module calls it.

The residual stream in the middle of a block enters a norm and is added to later. A replacement of the norm's input alone would change one
way of two, so there the tensor itself is overwritten.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from interp_assets.errors import InputError
from interp_assets.garcon.attention import Act, attention_tapped
from interp_assets.garcon.points import HookPoint, list_points, module_of, n_heads, norm_divisor, tensor_in, with_tensor
from interp_assets.planning.hook_names import FIRST_KINDS, LAST_KINDS, LAYER_KINDS

_MODULES_LAST = 1 << 30


class Tap(NamedTuple):
    """What is done at one hook point."""

    point: HookPoint
    act: Act


@contextmanager
def tapped(net: PreTrainedModel, taps: Sequence[Tap], n_tokens: int) -> Iterator[None]:
    """Run the acts at their points in every forward while this is open; contexts are `n_tokens` long. No hook is left when it closes."""
    attention: dict[str, dict[str, Act]] = {}
    with ExitStack() as stack:
        for tap in sorted(taps, key=_turn):
            if tap.point.side == "attention":
                attention.setdefault(tap.point.module_path, {})[tap.point.kind] = tap.act
            else:
                stack.callback(_hook(net, tap, n_tokens).remove)
        for path, acts in attention.items():
            stack.enter_context(attention_tapped(net.get_submodule(path), acts))
        yield


@contextmanager
def watched_blocks(net: PreTrainedModel, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before every block of every forward and its backward while this is open: what it raises ends either there."""

    def on_input(point: HookPoint, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check()
        stream = _hidden_states(args, kwargs, point)
        if stream.requires_grad:
            stream.register_hook(lambda _: check())

    with ExitStack() as stack:
        for point in list_points(net):
            if point.kind == LAYER_KINDS[0]:
                stack.callback(module_of(net, point).register_forward_pre_hook(partial(on_input, point), with_kwargs=True).remove)
        yield


def _turn(tap: Tap) -> tuple[bool, tuple[int, int]]:
    """Sort taps as a forward reaches them, but what a norm divides by before what it returns."""
    return tap.point.side != "norm", order_of(tap.point.name)


@lru_cache(maxsize=4096)
def order_of(name: str) -> tuple[int, int]:
    """Return a key that sorts canonical names as a forward reaches them; where a module's path stands is not known, so these come last."""
    kind, _, layer = name.partition(".")
    if kind in FIRST_KINDS:
        return (-1, 0)
    if kind in LAYER_KINDS:
        return (int(layer), LAYER_KINDS.index(kind))
    return (_MODULES_LAST, LAST_KINDS.index(kind) if kind in LAST_KINDS else len(LAST_KINDS))


def _hook(net: PreTrainedModel, tap: Tap, n_tokens: int) -> Any:
    module, point = module_of(net, tap.point), tap.point
    if point.side == "norm":
        return module.register_forward_hook(partial(_on_norm, tap), with_kwargs=True)
    act = tap.act if point.kind == "module" else partial(_act, tap.act, n_tokens, n_heads(net, "z") if point.kind == "z" else 0)
    if point.side == "output":
        return module.register_forward_hook(partial(_on_output, act, point))
    return module.register_forward_pre_hook(partial(_on_input, act, point), with_kwargs=True)


def _act(own: Act, n_tokens: int, heads: int, found: Tensor) -> Tensor:
    """Show an act the point's own shape."""
    shown = found.unflatten(0, (-1, n_tokens)) if found.ndim == 2 else found  # OPT's MLP sees all rows in one list
    if heads:
        shown = shown.unflatten(-1, (heads, -1))
    changed = own(shown)
    return found if changed is shown else changed.reshape(-1, *found.shape[1:])


def _on_input(
    act: Act, point: HookPoint, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    found = _hidden_states(args, kwargs, point)
    changed = act(found)
    if changed is found:
        return None
    if point.side == "stream":
        found.copy_(changed)
        return None
    return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


def _on_output(act: Act, point: HookPoint, _module: nn.Module, _args: Any, output: Any) -> object:
    found = tensor_in(output, f"Module {point.module_path!r}")
    changed = act(found)
    return None if changed is found else with_tensor(output, changed)


def _on_norm(tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    found = norm_divisor(module, _hidden_states(args, kwargs, tap.point))
    changed = tap.act(found)
    bias: Any = getattr(module, "bias", None)
    shift = 0.0 if bias is None else bias
    return None if changed is found else ((output - shift) * (found / changed) + shift).to(output.dtype)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], point: HookPoint) -> Tensor:
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise InputError(f"Module {point.module_path!r} gets no hidden states as input: {point.name!r} cannot be read.")
    return value
