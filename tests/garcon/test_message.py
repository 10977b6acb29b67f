"""Messages: what was packed is read again bit for bit, the library agrees about every byte, and nothing that lies is believed."""

import json
import re
import struct
from contextlib import suppress
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Answer, Continuation, Effect, Generated, Kept, Token
from interp_assets.garcon.plan import Add, Plan, Read, TensorName, name_tensor
from interp_assets.garcon.remote.message import (
    FILE,
    JSON,
    MAX_HEADER,
    MAX_TEXT,
    dump_generated,
    load_generated,
    pack,
    pack_answer,
    pack_plan,
    read_answer,
    read_controls,
    read_plan,
    unpack,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
VECTOR = torch.arange(3.0)
PLAN = Plan(rows=((1, 2),), operations=(Read(name="a", point="z.1"), Add(point="z.1", value=name_tensor(VECTOR))))
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _join(pieces: list[Any]) -> bytearray:
    return bytearray(b"".join(pieces))


def _file(header: object, rest: bytes = bytes(8), *, n_bytes: int | None = None) -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text) if n_bytes is None else n_bytes) + text + rest)


def _no_fetch(name: TensorName) -> torch.Tensor:
    raise AssertionError(name)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)), max_size=6), st.dictionaries(st.text(), st.text()))
def test_a_file_is_read_as_it_was_written_and_as_the_library_reads_it(kinds: list[tuple[torch.dtype, list[int]]], texts: dict[str, str]) -> None:
    """A saved message must be everybody's safetensors file."""
    tensors = {str(i): (torch.arange(81)[: int(torch.tensor(shape).prod())].reshape(shape) % 2).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    body = _join(pack(texts, tensors))
    message = unpack(body)
    assert message.texts == texts
    theirs = safetensors.torch.load(bytes(body))
    assert set(message.tensors) == set(tensors) == set(theirs)
    for name, tensor in tensors.items():
        for found in (message.tensors[name], theirs[name]):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)


def test_what_is_not_known_of_a_text_is_json_too() -> None:
    """Where an edit reached no place its means are NaN, which a browser's JSON does not have; a notebook gets it back as it was."""
    effect = Effect(torch.tensor([0, 2]), torch.tensor([torch.nan, 0.5]), torch.tensor([[torch.nan], [1.0]]), torch.tensor([[torch.nan], [2.0]]))
    generated = Generated([Continuation([Token(0, False, 0, 7, -0.5, None, None)], is_stopped=False)], [], [effect], {"demo": float("nan")})
    text = json.dumps(dump_generated(generated), allow_nan=False)
    again = load_generated(json.loads(text))
    assert again.texts == generated.texts
    assert str(again.fvu) == "{'demo': nan}"
    for found, expected in zip(again.effects[0], effect, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_file_of_the_library_is_read() -> None:
    """Also where its header leaves tensors at odd places."""
    tensors = {"a": torch.rand(2, 3), "b": torch.ones(3, dtype=torch.bool), "c": torch.arange(4)}
    for text in ("", "x", "xyz"):
        message = unpack(bytearray(safetensors.torch.save(tensors, {"plan": text})))
        assert message.texts == {"plan": text}
        assert all(torch.equal(message.tensors[name], tensors[name]) for name in tensors)
    header = json.dumps({"a": ENTRY}).encode()
    odd = _file(header + b" " * (1 - len(header) % 2), VECTOR[:2].numpy().tobytes())
    assert torch.equal(unpack(odd).tensors["a"], VECTOR[:2])


def test_a_request_is_its_plan_and_the_tensors_it_names() -> None:
    """Without tensors it is the plan's JSON, that anybody can read and write."""
    kind, pieces = pack_plan(PLAN, {name_tensor(VECTOR).tensor: VECTOR})
    assert kind == FILE
    plan, tensors = read_plan(kind, _join(pieces), Plan)
    assert plan == PLAN
    assert torch.equal(tensors[name_tensor(VECTOR).tensor], VECTOR)
    kind, pieces = pack_plan(PLAN, {})
    assert (kind, b"".join(pieces)) == (JSON, PLAN.json().encode())
    assert read_plan(kind, _join(pieces), Plan) == (PLAN, {})


def test_an_answer_is_read_as_it_was_given() -> None:
    """Its tensors lie in the one buffer that was read; what is kept is fetched when somebody looks."""
    kept = Kept(name_tensor(VECTOR), None, lambda _: VECTOR)
    given_answer = Answer({"read0": torch.rand(2, 3), "d": VECTOR, "k": kept}, {"g": {"z.1": torch.rand(1, 2).half()}}, (4, 16))
    body = _join(pack_answer(given_answer))
    found = read_answer(body, None, kept.fetch)
    assert torch.equal(found.tensors["read0"], given_answer.tensors["read0"])
    assert torch.equal(found.derivatives["g"]["z.1"], given_answer.derivatives["g"]["z.1"])
    assert found.batch == (4, 16)
    assert found.tensors["k"] == kept
    start = torch.frombuffer(body, dtype=torch.uint8).data_ptr()
    assert start < found.tensors["read0"].data_ptr() < start + len(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bytearray(b"\x80\x05K\x01."), "its header shall have"),
        (bytearray(), "its header shall have 0 bytes, and 0 follow"),
        (_file(b"{}", b"", n_bytes=1 << 63), "its header shall have 9,223,372,036,854,775,808 bytes, and 2 follow"),
        (_file(b" " * (MAX_HEADER + 8), b""), "at most 4,194,304 are read"),
        (_file(b"[" * 100_000, b""), "its header is no JSON"),
        (_file(b'{"a":1,"a":1}', b""), "one name stands twice"),
        (_file(b'{"a":NaN}', b""), "NaN is no JSON"),
        (_file(b"[]", b""), "no JSON object"),
        (_file({"__metadata__": {"plan": 1}}, b""), "its metadata must be texts"),
        (_file({"__metadata__": []}, b""), "its metadata must be texts"),
        (_file({"a": 5}), "must have dtype, shape and data_offsets"),
        (_file({"a": {**ENTRY, "path": "/etc/passwd"}}), "must have dtype, shape and data_offsets"),
        (_file({"a": {**ENTRY, "dtype": "F64"}}), "has the dtype 'F64'; F32, F16, BF16, I64, BOOL are read"),
        (_file({"a": {**ENTRY, "dtype": ["F32"]}}), "has the dtype ['F32']"),
        (_file({"a": {**ENTRY, "shape": [-2]}}), "has the shape [-2]"),
        (_file({"a": {**ENTRY, "shape": [2.0]}}), "has the shape [2.0]"),
        (_file({"a": {**ENTRY, "shape": [True, 2]}}), "has the shape [True, 2]"),
        (_file({"a": {**ENTRY, "shape": [1] * 9}}), "has the shape"),
        (_file({"a": {"dtype": "F32", "shape": [0, 1 << 39, 1 << 39], "data_offsets": [0, 0]}}, b""), "has the shape"),
        (_file({"a": {**ENTRY, "shape": [1 << 38]}}), "lies in 8 bytes"),
        (_file({"a": {**ENTRY, "data_offsets": [8, 0]}}), "lies in -8 bytes"),
        (_file({"a": {**ENTRY, "data_offsets": [0, 8, 16]}}), "has the offsets"),
        (_file({"a": {**ENTRY, "data_offsets": [8, 16]}}), "begins at byte 8, but the one before it ends at 0"),
        (_file({"a": ENTRY, "b": ENTRY}), "begins at byte 0, but the one before it ends at 8"),
        (_file({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "begins at byte 4, but the one before it ends at 8"),
        (_file({"a": ENTRY}, bytes(4)), "take 8 bytes, and 4 follow"),
        (_file({"a": ENTRY}, bytes(12)), "take 8 bytes, and 12 follow"),
        (_file({"a": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, b"\x02" * 8), "neither 0 nor 1"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(body: bytearray, message: str) -> None:
    """Each before memory is taken for what it claims."""
    with pytest.raises(InputError, match=re.escape(message)):
        unpack(body)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_are_anything_but_a_file_or_a_refusal(noise: bytes, place: int) -> None:
    """Anything may be sent: bytes at random, and a right file with some of them in it."""
    _, pieces = pack_plan(PLAN, {name_tensor(VECTOR).tensor: VECTOR})
    damaged = _join(pieces)
    damaged[place : place + len(noise)] = noise
    for kind, body in ((FILE, bytearray(noise)), (JSON, bytearray(noise)), (FILE, damaged)):
        with suppress(InputError):
            assert read_plan(kind, body, Plan)[0].rows


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries(
            {"dtype": st.sampled_from(["F32", "BOOL", "F64"]) | ANYTHING, "shape": st.lists(st.integers(0, 4)) | ANYTHING},
            optional={"data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | ANYTHING},
        )
        | ANYTHING,
    ),
    st.binary(max_size=16),
)
def test_no_header_is_anything_but_right_or_refused(header: dict[str, Any], rest: bytes) -> None:
    """A header that is accepted describes exactly the bytes that follow it."""
    with suppress(InputError):
        assert sum(tensor.nbytes for tensor in unpack(_file(header, rest)).tensors.values()) == len(rest)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({name_tensor(VECTOR).tensor: VECTOR + 1}, "is not what the plan says: found digest"),
        ({name_tensor(VECTOR).tensor: torch.tensor([0.0, torch.nan, 1.0])}, "holds nan at [1]. Give finite numbers"),
        ({name_tensor(VECTOR).tensor: VECTOR, "0" * 32: VECTOR}, "which its plan does not name"),
        ({}, "has no 'plan'"),
    ],
)
def test_tensors_that_a_plan_does_not_name_are_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    """A digest is an identity: what lies under it must be it."""
    texts = {"plan": PLAN.json()} if tensors else {}
    with pytest.raises(InputError, match=re.escape(message)):
        read_plan(FILE, _join(pack(texts, tensors)), Plan)


def test_a_plan_that_is_too_long_is_refused_before_it_is_parsed() -> None:
    """A megabyte of JSON takes a second of a processor, and no honest plan is as long."""
    long = "x" * (MAX_TEXT + 1)
    for kind, body in ((JSON, bytearray(long.encode())), (FILE, _join(pack({"plan": long}, {})))):
        with pytest.raises(InputError, match=r"1,048,577 bytes; at most 1,048,576 are read"):
            read_plan(kind, body, Plan)


def test_what_is_no_answer_is_refused() -> None:
    """A client may talk to anything."""
    for text in ("", "[]", '{"tensors":{"a":"7"},"derivatives":{},"batch":[1,1]}', '{"tensors":{},"derivatives":{},"batch":[1]}', "[" * 90_000):
        with pytest.raises(InputError, match="it is no answer"):
            read_answer(_join(pack({"answer": text}, {})), None, _no_fetch)
    for other, direction in (("1e999", torch.zeros(2)), ('"7"', torch.zeros(2)), ("[", torch.zeros(2)), ("7", torch.zeros(()))):
        with pytest.raises(InputError, match="they are no controls of a latent"):
            read_controls(_join(pack({"other": other}, {"direction": direction})))
    with pytest.raises(InputError, match="dtype float64 does not travel"):
        pack({}, {"a": torch.zeros(1, dtype=torch.float64)})
