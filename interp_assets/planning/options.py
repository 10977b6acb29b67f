"""Constants of a recipe that people vary, by name: which architectures have them, and which values they take.

Without an entry in `options` an SAE has the constant of its architecture (`train/recipes.py`), and the id that it always had.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

Architecture = Literal["relu", "gated", "topk", "batch_topk", "matryoshka_batch_topk", "jump_relu", "jump_relu_tanh", "jump_relu_step"]
ARCHITECTURES: Final[tuple[Architecture, ...]] = get_args(Architecture)
"""Those that are built in."""
_TOPK: Final = ("topk", "batch_topk", "matryoshka_batch_topk")
_JUMP: Final = ("jump_relu", "jump_relu_tanh", "jump_relu_step")
_LEARNED: Final = ("jump_relu", "jump_relu_tanh")
_PENALIZED: Final = ("relu", "gated", *_JUMP)


class Option(NamedTuple):
    """One constant; what it does is in docs/howto.md."""

    least: float = 0.0
    most: float = float("inf")
    architectures: tuple[str, ...] = ()
    """Those that have it; empty for all."""
    length: int | None = 1
    """How many numbers it is; None for any."""
    total: float | None = None
    """What its numbers add up to."""
    is_open: bool = False
    """Whether the least value is itself excluded."""
    is_of_loss: bool = False
    """Whether the built-in loss reads it, and nothing else: an architecture of one's own has another."""


OPTIONS: Final[dict[str, Option]] = {
    "warmup_steps": Option(),
    "warmup_share": Option(most=1),
    "decay_share": Option(most=1),
    "betas": Option(most=1, length=2),
    "epsilon": Option(is_open=True),
    "gradient_clip": Option(is_open=True),
    "decoder_norm": Option(architectures=("relu", *_LEARNED), is_open=True),
    "coefficient_warmup": Option(most=1, architectures=_PENALIZED),
    "p": Option(most=2, architectures=("relu",), is_open=True, is_of_loss=True),
    "auxk_weight": Option(architectures=_TOPK, is_of_loss=True),
    "groups": Option(architectures=_TOPK[2:], length=None, total=1.0, is_open=True, is_of_loss=True),
    "bandwidth": Option(architectures=_JUMP, is_open=True, is_of_loss=True),
    "initial_threshold": Option(architectures=_LEARNED, is_open=True),
    "tanh_scale": Option(architectures=_JUMP[1:2], is_open=True, is_of_loss=True),
    "pre_activation_weight": Option(architectures=_LEARNED, is_of_loss=True),
}

FIELDS: Final[dict[str, tuple[str, ...]]] = {"k": (*_TOPK, *_LEARNED), "sparsity_coefficient": _PENALIZED}
"""Fields of an SAE that only some architectures read."""

Options = Mapping[str, float | Sequence[float]]


REQUIRED: Final = object()
"""Stands for the default of an option that has to be given."""


def find_faults(architecture: str, options: Options, declared: Mapping[str, Any] | None = None, name: str = "") -> list[str]:
    """Say what is wrong with the options of an SAE: names that there are not, or not for this architecture, and values out of range.

    Of an architecture of one's own `declared` has the options of its function with their defaults; `architecture` is then its kind.
    """
    faults, own, shown = [], declared or {}, name or architecture
    has = [known for known in OPTIONS if _is_read(known, architecture, is_own=declared is not None)]
    for key, value in options.items():
        option = OPTIONS.get(key)
        if key in own:
            faults += _judge_own(key, own[key], value)
        elif option is None:
            near = difflib.get_close_matches(key, [*own, *has], n=1)
            faults.append(f"there is no option {key!r}{f'; did you mean {near[0]!r}?' if near else ''} ({shown} has {', '.join([*own, *has])})")
        elif key not in has:
            reads = "" if declared is not None else f": it is one of {', '.join(option.architectures)}"
            faults.append(f"the option {key!r} decides nothing for {shown}{reads}")
        elif said := _judge(option, value):
            faults.append(f"the option {key!r} is {said} (got {value!r:.80})")
    faults += [f"{shown} needs the option {key!r}, which has no default" for key, value in own.items() if value is REQUIRED and key not in options]
    return faults


def _is_read(name: str, architecture: str, *, is_own: bool) -> bool:
    option = OPTIONS[name]
    return (not option.architectures or architecture in option.architectures) and not (is_own and option.is_of_loss)


def judge(name: str, value: float | Sequence[float]) -> str:
    """Say what the value of an option would have to be; nothing where it is."""
    return _judge(OPTIONS[name], value)


def _judge_own(name: str, default: Any, value: float | Sequence[float]) -> list[str]:
    """Say of an option of a person's own function that it is no number, no whole one or no list, as its default is."""
    is_list = isinstance(default, tuple | list)
    if default is not REQUIRED and is_list == isinstance(value, int | float):
        return [f"the option {name!r} is {'a list of numbers' if is_list else 'a number'}, as its default {default!r} (got {value!r:.80})"]
    if isinstance(default, int) and isinstance(value, int | float) and value != int(value):
        return [f"the option {name!r} is a whole number, as its default {default!r} (got {value!r:.80})"]
    return []


def _judge(option: Option, value: float | Sequence[float]) -> str:
    """Say what a value would have to be; nothing where it is."""
    numbers = [value] if isinstance(value, int | float) else list(value)
    is_list = not isinstance(value, int | float)
    is_sound = all(option.least < number <= option.most if option.is_open else option.least <= number <= option.most for number in numbers)
    if is_list == (option.length == 1) or (option.length is not None and len(numbers) != option.length) or not numbers or not is_sound:
        what = "a number" if option.length == 1 else "a list of numbers" if option.length is None else f"{option.length} numbers"
        most = f", at most {option.most:g}" if option.most < float("inf") else ""
        return f"{what} {'above' if option.is_open else 'from'} {option.least:g}{most}"
    if option.total is not None and abs(sum(numbers) - option.total) > 1e-6:
        return f"numbers whose sum is {option.total:g}"
    return ""


def find_unread(architecture: str, fields: Iterable[str]) -> list[str]:
    """List those of an SAE's fields that its architecture does not read; what one of a person's own reads nobody knows."""
    return [name for name in fields if name in FIELDS and architecture in ARCHITECTURES and architecture not in FIELDS[name]]
