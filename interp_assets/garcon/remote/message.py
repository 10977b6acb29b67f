"""What travels between a notebook and a server becomes one safetensors file: text in its metadata, arrays as its tensors. Saved, it is a replay.

    8 bytes       length of the header, little-endian
    header        JSON: {"__metadata__": {"plan": text}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest      the tensors' bytes, each where its offsets say, with no byte between them

A request holds the plan's text and the tensors that it names, by digest; an answer what its operations gave, in the order that `answer` lists.
What comes from outside is believed in nothing: lengths, names, dtypes, shapes and offsets are checked against the bytes that are there before
anything is allocated, and tensors are views of these bytes. The library's own reader would do for the layout, but takes dtypes that no plan has,
and copies. A request without tensors is its plan's JSON alone.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import polars as pl
import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Answer, Continuation, Controls, Effect, Generated, Kept, Token
from interp_assets.garcon.plan import Asked, TensorName, bytes_of, name_tensor, parse_plan
from interp_assets.planning.progress import format_count

FILE: Final = "application/safetensors"
JSON: Final = "application/json"
LINES: Final = "application/x-ndjson"
MAX_TEXT: Final = 1 << 20
"""Bytes of a plan's text."""
MAX_HEADER: Final = 4 << 20
"""Bytes of a header: the text with its quotes escaped, and the tensors' places."""
_MAX_DIMENSIONS: Final = 8
_MAX_NUMBERS: Final = 1 << 40
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}
_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}

P = TypeVar("P", bound=Asked)


class Message(NamedTuple):
    """A file's metadata and its tensors."""

    texts: dict[str, str]
    tensors: dict[str, Tensor]


def pack(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the pieces of a file one after the other; a tensor's bytes are not copied where it lies in one piece on the CPU."""
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    pieces: list[bytes | memoryview] = []
    offset = 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # so that each begins at a multiple of its own size
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise InputError(f"A tensor of dtype {str(tensor.dtype).removeprefix('torch.')} does not travel; {', '.join(_DTYPES)} do.")
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        if tensor.nbytes:
            pieces.append(bytes_of(tensor))
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def unpack(body: bytearray) -> Message:
    """Read a file; its tensors are views of `body`. Raises `InputError` for a file that is not what its header says."""
    header, start = _read_header(body)
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise _refuse("its metadata must be texts")
    places = {name: _check_entry(name, entry) for name, entry in header.items()}
    reached = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise _refuse(f"tensor {name!r:.80} begins at byte {begin}, but the one before it ends at {reached}")
        reached = end
    if reached != len(body) - start:
        raise _refuse(f"its tensors take {reached:,} bytes, and {len(body) - start:,} follow the header")
    return Message(texts, {name: _view(body, name, dtype, shape, start + begin) for name, (dtype, shape, begin, _) in places.items()})


def pack_plan(plan: Asked, tensors: Mapping[str, Tensor]) -> tuple[str, list[bytes | memoryview]]:
    """Return the content type and the pieces of a request with those of a plan's tensors that `tensors` has; the others are kept by the server."""
    beside = {name.tensor: tensors[name.tensor] for name in plan.tensors() if name.tensor in tensors}
    return (FILE, pack({"plan": plan.json()}, beside)) if beside else (JSON, [plan.json().encode()])


def read_plan(content_type: str, body: bytearray, kind: type[P]) -> tuple[P, dict[str, Tensor]]:
    """Return a request's plan of some kind, and the tensors that lie beside it by digest.

    Raises `InputError` for what is no plan, and for tensors that are not what it names, or hold a NaN or an infinity.
    """
    if content_type == JSON:
        return parse_plan(kind, decode_text(body)), {}
    message = unpack(body)
    plan = parse_plan(kind, take_text(message, "plan"))
    check_tensors(plan.tensors(), message.tensors)
    return plan, message.tensors


def decode_text(body: bytes | bytearray) -> str:
    """Return a request's JSON. Raises `InputError` for one that is too long or no UTF-8."""
    if len(body) > MAX_TEXT:
        raise InputError(f"The plan's text has {len(body):,} bytes; at most {MAX_TEXT:,} are read. Split it.")
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise _refuse(f"it is no UTF-8 text ({error.reason} at byte {error.start})") from error


def take_text(message: Message, name: str) -> str:
    """Return a text of a file's metadata. Raises `InputError` without it, or for one that is too long."""
    if name not in message.texts:
        raise _refuse(f"its metadata has no {name!r}; it has {sorted(message.texts)!r:.200}")
    return decode_text(message.texts[name].encode(errors="surrogatepass"))


def check_tensors(named: Iterable[TensorName], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not named, and those whose content is not what their name says."""
    names = {name.tensor: name for name in named}
    if unknown := sorted(set(tensors) - set(names)):
        raise _refuse(f"it has the tensor {unknown[0]!r:.80}, which its plan does not name")
    for digest, tensor in tensors.items():
        if (found := name_tensor(tensor)) != names[digest]:
            raise InputError(
                f"The tensor {digest} is not what the plan says: found digest {found.tensor}, {found.dtype} {list(found.shape)}; "
                f"expected {names[digest].dtype} {list(names[digest].shape)}. Name tensors by `name_tensor`."
            )


def pack_answer(answer: Answer) -> list[bytes | memoryview]:
    """Return the pieces of an answer; of what is kept only the names."""
    tensors: dict[str, Tensor] = {}

    def place(value: Tensor | Kept) -> object:
        if isinstance(value, Kept):
            return value.name.model_dump(mode="json")
        number = str(len(tensors))
        tensors[number] = value
        return number

    content = {
        "tensors": {name: place(value) for name, value in answer.tensors.items()},
        "derivatives": {name: {point: place(value) for point, value in found.items()} for name, found in answer.derivatives.items()},
        "batch": answer.batch,
    }
    return pack({"answer": json.dumps(content, separators=(",", ":"))}, tensors)


def read_answer(body: bytearray, owner: Any, fetch: Callable[[TensorName], Tensor]) -> Answer:
    """Read an answer; `fetch` gets what `owner` keeps when it is looked at. Raises `InputError` for what is no answer."""
    message = unpack(body)

    def find(place: Any) -> Tensor | Kept:
        return message.tensors[place] if isinstance(place, str) else Kept(TensorName(**place), owner, fetch)

    try:
        content = json.loads(take_text(message, "answer"))
        tensors = {name: find(place) for name, place in content["tensors"].items()}
        derivatives = {name: {point: find(place) for point, place in found.items()} for name, found in content["derivatives"].items()}
        n_rows, n_tokens = content["batch"]
        return Answer(tensors, derivatives, (int(n_rows), int(n_tokens)))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise _refuse(f"it is no answer ({type(error).__name__}: {error})") from error


def pack_cells(base: float, cells: Tensor) -> list[bytes | memoryview]:
    """Return the pieces of a sweep's answer."""
    return pack({"base": json.dumps(base)}, {"cells": cells})


def read_cells(body: bytearray) -> tuple[float, Tensor]:
    """Read a sweep's answer: the metric without a patch, and with each. Raises `InputError` for what is none."""
    message = unpack(body)
    try:
        return float(json.loads(take_text(message, "base"))), message.tensors["cells"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise _refuse(f"it is no sweep's answer ({type(error).__name__}: {error})") from error


def pack_controls(controls: Controls) -> list[bytes | memoryview]:
    """Return the pieces of a latent's controls."""
    return pack({"other": json.dumps(controls.other)}, {"direction": controls.direction})


def read_controls(body: bytearray) -> Controls:
    """Read a latent's controls. Raises `InputError` for what are none."""
    message = unpack(body)
    try:
        other, direction = json.loads(take_text(message, "other")), message.tensors["direction"]
    except (ValueError, LookupError, RecursionError) as error:
        raise _refuse(f"they are no controls of a latent ({type(error).__name__}: {error})") from error
    if direction.ndim != 1 or not (other is None or type(other) is int):
        raise _refuse(f"they are no controls of a latent (a direction of shape {list(direction.shape)}, another latent {other!r:.20})")
    return Controls(direction, other)


def dump_generated(generated: Generated) -> dict[str, Any]:
    """Return what a plan that generates gave, as JSON has it."""
    return {
        "texts": generated.texts,
        "defaults": generated.defaults,
        "effects": [{name: _dump(tensor) for name, tensor in effect._asdict().items()} for effect in generated.effects],
        "fvu": {name: _finite(fvu) for name, fvu in generated.fvu.items()},
    }


def load_generated(content: Any) -> Generated:
    """Return what `dump_generated` wrote. Raises `InputError` for something else."""
    try:
        texts, defaults = (
            [Continuation([load_token(token) for token in tokens], is_stopped) for tokens, is_stopped in content[name]]
            for name in ("texts", "defaults")
        )
        effects = [Effect(**{name: _load(dumped) for name, dumped in effect.items()}) for effect in content["effects"]]
        return Generated(texts, defaults, effects, {name: math.nan if fvu is None else fvu for name, fvu in content["fvu"].items()})
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise _refuse(f"it is no text that was generated ({type(error).__name__}: {error})") from error


def load_token(content: Sequence[Any]) -> Token:
    """Return a token as it was written into a line."""
    token = Token(*content)
    return token._replace(watched=tuple(token.watched), latents=tuple(token.latents))


def pack_reduced(reduced: Mapping[str, Mapping[str, Any]]) -> list[bytes | memoryview]:
    """Return the pieces of what a plan that reduces gave: tensors, and tables as one tensor a column; float64 travels as the integers of its bits."""
    tensors: dict[str, Tensor] = {}

    def place(tensor: Tensor) -> dict[str, Any]:
        name, is_double = str(len(tensors)), tensor.dtype == torch.float64
        tensors[name] = tensor.contiguous().view(torch.int64) if is_double else tensor
        return {"tensor": name, "float64": is_double}

    def write(value: Tensor | pl.DataFrame) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return place(value)
        return {"columns": [[column.name, str(column.dtype), *_write_column(column, place)] for column in value]}

    content = {point: {what: write(value) for what, value in found.items()} for point, found in reduced.items()}
    return pack({"reduced": json.dumps(content, separators=(",", ":"))}, tensors)


def read_reduced(body: bytearray) -> dict[str, dict[str, Any]]:
    """Read what `pack_reduced` wrote. Raises `InputError` for something else."""
    message = unpack(body)

    def find(place: dict[str, Any]) -> Tensor:
        tensor = message.tensors[place["tensor"]]
        return tensor.view(torch.float64) if place["float64"] else tensor

    def load(value: dict[str, Any]) -> Tensor | pl.DataFrame:
        if "tensor" in value:
            return find(value)
        columns = [
            pl.Series(name, find(given).numpy() if kind == "numbers" else given, getattr(pl, dtype)) for name, dtype, kind, given in value["columns"]
        ]
        return pl.DataFrame(columns)

    try:
        content = json.loads(take_text(message, "reduced"))
        return {point: {what: load(value) for what, value in found.items()} for point, found in content.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _refuse(f"it is nothing that was reduced ({type(error).__name__}: {error})") from error


def _write_column(column: pl.Series, place: Callable[[Tensor], dict[str, Any]]) -> tuple[str, Any]:
    if column.dtype.is_numeric() and not column.null_count():
        wide = column.cast(pl.Float64 if column.dtype.is_float() else pl.Int64)
        return "numbers", place(torch.from_numpy(wide.to_numpy().copy()))
    return "values", column.to_list()


def _dump(tensor: Tensor) -> dict[str, Any]:
    values = [_finite(value) for value in tensor.flatten().tolist()]
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "values": values}


def _finite(value: float | int) -> float | int | None:  # noqa: PYI041 - counts are integers, and checked as such
    """Return a number, or None in the place of a NaN: JSON has none, and only Python would read it."""
    return value if math.isfinite(value) else None


def _load(dumped: dict[str, Any]) -> Tensor:
    dtype = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}[dumped["dtype"]]
    return torch.tensor([math.nan if value is None else value for value in dumped["values"]], dtype=dtype).reshape(dumped["shape"])


def read_tensor(body: bytearray) -> Tensor:
    """Read a file of one tensor. Raises `InputError` for another."""
    message = unpack(body)
    if len(message.tensors) != 1:
        raise _refuse(f"it has {format_count(len(message.tensors), 'tensor')} instead of one")
    return next(iter(message.tensors.values()))


def _read_header(body: bytearray) -> tuple[dict[str, Any], int]:
    """Return a file's header and where its tensors begin."""
    n_bytes = int.from_bytes(body[:8], "little")
    if len(body) < 8 or n_bytes > len(body) - 8:
        raise _refuse(f"its header shall have {n_bytes:,} bytes, and {max(0, len(body) - 8):,} follow")
    if n_bytes > MAX_HEADER:
        raise _refuse(f"its header has {n_bytes:,} bytes, at most {MAX_HEADER:,} are read")
    try:
        header = json.loads(bytes(body[8 : 8 + n_bytes]).decode(), object_pairs_hook=_without_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refuse(f"its header is no JSON ({error!s:.200})") from error
    if not isinstance(header, dict):
        raise _refuse("its header is no JSON object")
    return header, 8 + n_bytes


def _check_entry(name: str, entry: object) -> tuple[torch.dtype, list[int], int, int]:
    """Return dtype, shape, begin and end of a tensor that could be where its entry says."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(f"the entry of {name!r:.80} must have dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise _refuse(f"tensor {name!r:.80} has the dtype {code!r:.80}; {', '.join(_DTYPES)} are read")
    if not _are_sizes(shape, _MAX_DIMENSIONS) or math.prod(max(size, 1) for size in shape) > _MAX_NUMBERS:
        raise _refuse(f"tensor {name!r:.80} has the shape {shape!r:.80}")
    if not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise _refuse(f"tensor {name!r:.80} has the offsets {offsets!r:.80}")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[code].itemsize:
        raise _refuse(f"tensor {name!r:.80} of {code} {shape} lies in {end - begin:,} bytes")
    return _DTYPES[code], shape, begin, end


def _are_sizes(value: object, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(item) is int and 0 <= item <= _MAX_NUMBERS for item in value)


def _view(body: bytearray, name: str, dtype: torch.dtype, shape: Sequence[int], start: int) -> Tensor:
    n_numbers = math.prod(shape)
    if not n_numbers:
        return torch.empty(tuple(shape), dtype=dtype)
    if dtype is torch.bool:
        stored = torch.frombuffer(body, dtype=torch.uint8, count=n_numbers, offset=start)
        if int(stored.max()) > 1:
            raise _refuse(f"tensor {name!r:.80} is BOOL and holds a byte that is neither 0 nor 1")
        return stored.view(torch.bool).reshape(tuple(shape))
    if start % dtype.itemsize:  # another writer's: what is not aligned is copied
        body, start = body[start : start + n_numbers * dtype.itemsize], 0
    return torch.frombuffer(body, dtype=dtype, count=n_numbers, offset=start).reshape(tuple(shape))


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("one name stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _refuse(reason: str) -> InputError:
    return InputError(f"This is no message that is read here: {reason}. Send what `lab.connect` sends: a plan's JSON, or a safetensors file with it.")
