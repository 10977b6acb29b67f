"""Packed records: every number comes back, and a damaged column is an error, never another text."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_bundle import make_synthetic_records, make_text

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError
from interp_assets.visualize.digits import ALPHABET, decode_decimals, decode_numbers, encode_decimals, encode_number, encode_numbers
from interp_assets.visualize.packing import TokenOrder, order_tokens, pack_record, unpack_record

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "packed_record.json").read_text(encoding="utf-8"))
"""One record as it is and packed; the browser's tests read the same file."""
BORDERS = [0, 47, 48, 3323, 3324, 44728, 44729, 798299, 798300, 1 << 40]


@given(st.lists(st.one_of(st.integers(0, 60), st.integers(3300, 3400), st.integers(0, 1 << 42), st.sampled_from(BORDERS))))
def test_whole_numbers_survive_a_column(numbers):
    """Rows go up to 2^40; places are below 65."""
    assert decode_numbers(encode_numbers(numbers)) == numbers


def test_numbers_take_as_many_characters_as_the_page_says():
    """The first character alone tells where the next number begins."""
    assert [len(encode_number(number)) for number in BORDERS] == [1, 1, 2, 2, 3, 3, 4, 4, 8, 8]
    assert json.dumps(ALPHABET) == f'"{ALPHABET}"'
    assert len(ALPHABET) == len(set(ALPHABET)) == 91


@given(st.lists(st.floats(1e-30, 1e30), min_size=1), st.sampled_from([3, 4]))
def test_decimals_keep_their_significant_digits(values, digits):
    """The obvious formula: the value printed with so many digits."""
    rounded = [float(f"{value:.{digits - 1}e}") for value in values]
    exponent = max(int(f"{value:.{digits - 1}e}".partition("e")[2]) for value in values)
    assert decode_decimals(encode_decimals(values, exponent, digits), exponent, digits) == rounded


@pytest.mark.parametrize("text", ["T", "{#", "}##", "~######", "a\\", "\u00e9", "T\u00e9", " #", "\x7f"])
def test_a_column_that_is_cut_or_foreign_is_refused(text):
    """Half a number must not become another number."""
    with pytest.raises(ValueError, match="column of numbers"):
        decode_numbers(text)


def test_tokens_are_ordered_by_how_often_they_occur_in_all_shards():
    """The order must not depend on how the data set was cut, and name every id."""
    shards = [np.array([3, 3, 1], np.uint32), np.array([7, 1, 3], np.uint32)]
    assert order_tokens(shards, 5).tolist() == [3, 1, 7, 0, 2, 4, 5, 6]
    assert order_tokens(shards[::-1], 5).tolist() == order_tokens([np.concatenate(shards)], 5).tolist()


def test_the_golden_record_is_packed_and_unpacked_as_ever():
    """Bundles of this version that lie somewhere must stay readable."""
    member = pack_record(GOLDEN["record"], TokenOrder(GOLDEN["order"]))
    assert json.loads(gzip.decompress(member)) == GOLDEN["packed"]
    assert unpack_record(member, GOLDEN["order"], "here") == GOLDEN["record"]


def _with_roles(record):
    """Return the golden record as one of messages."""
    found = json.loads(json.dumps(record))
    runs = {tuple(row): spoken for row, spoken in GOLDEN["roles"]["record"]}
    examples = found["examples"]
    for window in [*examples["top"], *examples["random"], *(w for interval in examples["intervals"] for w in interval["examples"])]:
        window["roles"] = runs[tuple(window["row"])]
    return found


def test_the_golden_roles_are_packed_and_unpacked_as_ever():
    """Beside everything else, which is packed as without them."""
    record = _with_roles(GOLDEN["record"])
    member = pack_record(record, TokenOrder(GOLDEN["order"]))
    packed = json.loads(gzip.decompress(member))
    assert packed["windows"].pop("roles") == GOLDEN["roles"]["packed"]
    assert packed == GOLDEN["packed"]
    assert unpack_record(member, GOLDEN["order"], "here") == record


@pytest.mark.parametrize(
    "change",
    [{"runs": "%$"}, {"runs": "%$'"}, {"gap": "#$##%"}, {"gap": "#$##%$#"}, {"name": "#$%$#"}, {"name": "#$%$#&"}, {"names": []}, {"gap": None}],
)
def test_damaged_roles_are_refused(change):
    """Half of a column would put words into another's mouth."""
    member = _damage(lambda packed: packed["windows"].update(roles={**GOLDEN["roles"]["packed"], **change}))
    with pytest.raises(ArtifactCorruptError, match="is no feature record"):
        unpack_record(member, GOLDEN["order"], "here")


def test_records_survive_packing_up_to_the_digits_beside_the_peak():
    """All that a page shows comes back; activations beside the peak keep three digits, half a percent."""
    order = make_text(0, 6).vocabulary.order
    tokens = TokenOrder(order)
    for record in make_synthetic_records(n_features=30, n_documents=6):
        found = unpack_record(pack_record(record, tokens), np.array(order), "here")
        for part in (record, found):
            examples = part["examples"]
            for window in [*examples["top"], *examples["random"], *(w for interval in examples["intervals"] for w in interval["examples"])]:
                window["activations"] = [
                    [place, value if place == window["peak"] else float(f"{value:.2e}")] for place, value in window["activations"]
                ]
            part["statistics"]["histogram"]["edges"] = [float(f"{edge:.4g}") for edge in part["statistics"]["histogram"]["edges"]]
        assert found == record


def _damage(change):
    packed = json.loads(json.dumps(GOLDEN["packed"]))
    change(packed)
    return gzip.compress(json.dumps(packed).encode(), mtime=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed["windows"].update(tokens="|" * 40),
        lambda packed: packed["windows"].update(document="$$%"),
        lambda packed: packed["windows"].update(gap=""),
        lambda packed: packed["windows"].update(activation=packed["windows"]["activation"] * 2),
        lambda packed: packed["lists"].update(top="z"),
        lambda packed: packed["neighbours"][1].pop(),
        lambda packed: packed["coactivations"][2].append(1),
        lambda packed: packed["windows"].update(masked=[[0]]),
        lambda packed: packed["statistics"]["histogram"].update(first=1 << 40),
        lambda packed: packed.pop("windows"),
    ],
)
def test_columns_that_disagree_are_refused(change):
    """Text shifted by one token would look like evidence."""
    with pytest.raises(ArtifactCorruptError, match=r"feature 7 is no feature record.*Materialize it again"):
        unpack_record(_damage(change), GOLDEN["order"], "feature 7")


COLUMNS = [name for name, column in GOLDEN["packed"]["windows"].items() if isinstance(column, str)]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("change", [lambda column: column[:-1], lambda column: column + "#"])
def test_a_column_that_is_too_short_or_too_long_is_refused(name, change):
    """One number more in any column, and nobody could say to which window the others belong."""
    assert len(COLUMNS) == 11
    with pytest.raises(ArtifactCorruptError, match="feature 7 is no feature record"):
        unpack_record(_damage(lambda packed: packed["windows"].update({name: change(packed["windows"][name])})), GOLDEN["order"], "feature 7")


def test_no_flipped_or_missing_byte_of_a_member_gets_past():
    """A disk that errs in the middle of a member is damage like any other. What the header says of time and system, nobody reads."""
    member = _damage(lambda packed: None)
    damaged = [member[:place] + bytes([member[place] ^ 0x10]) + member[place + 1 :] for place in range(len(member))]
    n_refused = 0
    for cut_or_changed in [*damaged, *(member[:place] for place in range(len(member)))]:
        try:
            assert unpack_record(cut_or_changed, GOLDEN["order"], "feature 7") == GOLDEN["record"]
        except ArtifactCorruptError:
            n_refused += 1
    assert n_refused > 2 * len(member) - 16


@pytest.mark.parametrize(("version", "step"), [(2, "Materialize `feature_records` and `feature_browser` again"), (4, "Upgrade interp-assets")])
def test_another_version_says_what_to_do(version, step):
    """The record tells its version, so that no other layout is ever guessed at."""
    with pytest.raises(ArtifactForeignError, match=rf"has version {version}; this release reads version 3. {step}"):
        unpack_record(_damage(lambda packed: packed.update(version=version)), GOLDEN["order"], "It")
