"""Constants of a recipe that people vary, by name: which architectures have them, and which values they take.

Without an entry in `options` an SAE has the constant of its architecture (`train/recipes.py`), and the id that it always had.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

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


OPTIONS: Final[dict[str, Option]] = {
    "warmup_steps": Option(),
    "warmup_share": Option(most=1),
    "decay_share": Option(most=1),
    "betas": Option(most=1, length=2),
    "epsilon": Option(is_open=True),
    "gradient_clip": Option(is_open=True),
    "decoder_norm": Option(architectures=("relu", *_LEARNED), is_open=True),
    "coefficient_warmup": Option(most=1, architectures=_PENALIZED),
    "p": Option(most=2, architectures=("relu",), is_open=True),
    "auxk_weight": Option(architectures=_TOPK),
    "groups": Option(architectures=_TOPK[2:], length=None, total=1.0, is_open=True),
    "bandwidth": Option(architectures=_JUMP, is_open=True),
    "initial_threshold": Option(architectures=_LEARNED, is_open=True),
    "tanh_scale": Option(architectures=_JUMP[1:2], is_open=True),
    "pre_activation_weight": Option(architectures=_LEARNED),
}

FIELDS: Final[dict[str, tuple[str, ...]]] = {"k": (*_TOPK, *_LEARNED), "sparsity_coefficient": _PENALIZED}
"""Fields of an SAE that only some architectures read."""

Options = Mapping[str, float | Sequence[float]]


def find_faults(architecture: str, options: Options) -> list[str]:
    """Say what is wrong with the options of an SAE: names that there are not, or not for this architecture, and values out of range."""
    faults = []
    for name, value in options.items():
        option = OPTIONS.get(name)
        own = [known for known, item in OPTIONS.items() if not item.architectures or architecture in item.architectures]
        if option is None:
            near = difflib.get_close_matches(name, own, n=1)
            faults.append(f"there is no option {name!r}{f'; did you mean {near[0]!r}?' if near else ''} ({architecture} has {', '.join(own)})")
        elif name not in own:
            faults.append(f"the option {name!r} decides nothing for {architecture}: it is one of {', '.join(option.architectures)}")
        elif said := _judge(option, value):
            faults.append(f"the option {name!r} is {said} (got {value!r:.80})")
    return faults


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
    """List those of an SAE's fields that its architecture does not read."""
    return [name for name in fields if name in FIELDS and architecture not in FIELDS[name]]
