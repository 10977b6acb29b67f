"""The format pages of the stage, executed; patterns on disk, there and back; and what damaged ones are answered with."""

import base64
import gzip
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_assets.compute.head_loops import FIELDS, count_chance, sweep_rows
from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError, InputError
from interp_assets.garcon.patterns.codec import (
    TILE,
    check_pattern,
    halve,
    n_levels,
    pack_tiles,
    pack_triangle,
    quantize,
    restore,
    shrink,
    tile_places,
    unpack_tile,
    unpack_triangle,
)
from interp_assets.harvest.heads.candidates import CANDIDATE_SCHEMA, find_head_candidates
from interp_assets.harvest.heads.examples import EXAMPLE_SCHEMA, select_head_examples
from interp_assets.harvest.heads.patterns import PATTERN_SCHEMA, keep_patterns
from interp_assets.harvest.heads.records import HEADS, INDEX, RECORDS, unpack_head_record, write_head_records
from interp_assets.harvest.heads.statistics import CHANCES, MEANS, empty_statistics, statistics_arrays
from interp_assets.storage.manifest import read_file

PAGES = Path(__file__).parents[3] / "docs" / "formats"


def _page(name: str) -> tuple[str, list[Any]]:
    text = (PAGES / name).read_text(encoding="utf-8")
    return text, [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


def _columns(text: str, heading: str) -> list[tuple[str, str]]:
    section = text.split(f"\n## {heading}")[1].split("\n## ", maxsplit=1)[0]
    return re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", section, re.MULTILINE)


def _schema(schema: pa.Schema) -> list[tuple[str, str]]:
    return [(field.name, re.sub(r"list<(?:item|element): (\w+)>", r"list<\1>", str(field.type))) for field in schema]


def test_pages_tell_the_tables_columns() -> None:
    """A format page lives only if a test executes it."""
    assert _columns(_page("head_candidates.md")[0], "`layer-*.parquet`") == _schema(CANDIDATE_SCHEMA)
    assert _columns(_page("head_examples.md")[0], "`examples.parquet`") == _schema(EXAMPLE_SCHEMA)
    assert _columns(_page("example_patterns.md")[0], "`patterns.parquet`") == _schema(PATTERN_SCHEMA)


def test_the_page_of_the_sums_tells_every_tensor_and_field() -> None:
    """Units are in no other place: a reader of the file needs the page."""
    text, (example,) = _page("head_candidates.md")
    tensors, fields = text.split("\n## `layer-*.safetensors`")[1].split("\n## ")[0].split("| field |")
    assert tuple(re.findall(r"^\| `(\w+)` \|", fields, re.MULTILINE)) == FIELDS
    told = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", tensors, re.MULTILINE)
    sizes = {"heads": 2, "28": len(FIELDS), "20": 20, "256": 256, "d_value": 5, "tokens + 1": 4, "1": 1, "2": 2}
    shapes = {name: tuple(sizes[word] for word in shape.split(", ")) for name, shape in told}
    assert shapes == {name: value.shape for name, value in statistics_arrays(empty_statistics(2, 5, 4)).items()}
    found = empty_statistics(1, 1, 2)
    ends = np.arange(3)
    context = (
        np.zeros(3, np.int64),
        ends + 1,
        np.ones(3, bool),
        np.full(3, -1, np.int32),
        np.zeros(3, np.int32),
        np.full(3, 3, np.int32),
        np.zeros(3, np.int32),
    )
    block = (np.zeros((1, 3, 3), np.float32), np.full(1, -np.inf, np.float32), np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32), 0)
    sums = (found.fields, found.distance_mass, np.zeros((1, 3), np.int64), found.query_mass, found.score)
    sweep_rows(block, context, (np.zeros(3, np.int32), np.zeros(3, np.int32)), sums, np.zeros((1, 3), np.float32))
    count_chance(context, found.fields[0], found.uniform_distance_mass[0], np.zeros(4, np.int64), found.uniform_query_mass[0])
    assert {name: int(found.sum_of(name)[0]) for name in example} == example


def test_the_page_of_the_record_tells_every_key(make_world: Callable[..., Any]) -> None:
    """A record as the passes write it: its examples point at rows of its contexts, top lists fall, chance stands beside."""
    world = make_world("gpt2", heads={"layers": [1]})
    for index in world.pipeline.shard_indices:
        find_head_candidates(world.pipeline, world.store, world.subject, index)
    select_head_examples(world.pipeline, world.store, 1)
    for index in world.pipeline.shard_indices:
        keep_patterns(world.pipeline, world.store, world.subject, index)
    made = write_head_records(world.pipeline, world.store, 1)
    offsets = np.frombuffer(read_file(world.store, made.ref.path, made.manifest, INDEX), "<u8").tolist()
    data = read_file(world.store, made.ref.path, made.manifest, RECORDS)
    text, _ = _page("head_record.md")
    members = [data[start:stop] for start, stop in pairwise(offsets)]
    for head, member in enumerate(members):
        record = unpack_head_record(member, "here")
        assert list(record) == re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
        assert (record["layer"], record["head"]) == (1, head)
        assert set(record["statistics"]) == set(MEANS)
        assert {f"uniform_{name}" for name in record["chance"]} == set(CHANCES)
        scores = [record["examples"][place]["score"] for place in record["top"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 4
        for interval in record["intervals"]:
            assert len(interval["examples"]) == min(2, interval["rows"])
            for place in interval["examples"]:
                assert interval["low"] <= record["examples"][place]["score"] < interval["high"] * 1.00001
        for example in record["examples"]:
            row = example["query"] - example["first_query"]
            keys, masses = example["keys"][row], example["masses"][row]
            assert max(key for key, mass in zip(keys, masses, strict=True) if mass) <= example["query"]
            assert masses == sorted(masses, reverse=True)
            assert restore(np.array(masses, np.uint8)).sum() < 1.02
    assert _refused(members[0], lambda record: record.update(version=2)) is ArtifactForeignError
    far = base64.b64encode(np.full(8, 10**6, "<u4").tobytes()).decode()
    assert (
        _refused(members[0], lambda record: record["examples"][0].update(keys=far, masses=base64.b64encode(bytes(8)).decode()))
        is ArtifactCorruptError
    )
    assert _refused(members[0], lambda record: record.pop("contexts")) is ArtifactCorruptError
    assert read_file(world.store, made.ref.path, made.manifest, HEADS)[:4] == b"PAR1"


def _refused(member: bytes, change: Callable[[dict[str, Any]], Any]) -> type[Exception]:
    record = json.loads(gzip.decompress(member))
    change(record)
    with pytest.raises((ArtifactForeignError, ArtifactCorruptError), match="there") as raised:
        unpack_head_record(gzip.compress(json.dumps(record).encode()), "there")
    return raised.type


def test_the_page_of_the_patterns_is_what_the_codec_does() -> None:
    """The golden bytes stand on the page: files that are kept are read by later releases."""
    _, (example,) = _page("attention_pattern.md")
    values = quantize(np.array(example["pattern"]))
    assert values.tolist() == example["bytes"]
    assert gzip.decompress(pack_triangle(values)).hex() == example["triangle"]
    assert halve(values).tolist() == example["halved"]
    assert {str(n): n_levels(n) for n in (1024, 1025, 8192, 256)} == example["levels"]


def _random_pattern(seed: int, n: int, *, both_ways: bool) -> np.ndarray:
    scores = np.random.Generator(np.random.Philox(seed)).normal(0, 3, (n, n))
    exponentials = np.exp(scores) if both_ways else np.tril(np.exp(scores))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 70), st.booleans())
def test_a_triangle_comes_back_and_its_error_is_bounded(seed: int, n: int, both_ways: bool) -> None:
    """What a person reads off a cell is right to 0.004, and rows still sum to nearly one."""
    pattern = _random_pattern(seed, n, both_ways=both_ways)
    values = quantize(pattern)
    assert (unpack_triangle(pack_triangle(values, both_ways=both_ways), n, "x", both_ways=both_ways) == values).all()
    assert np.abs(restore(values) - pattern).max() <= 1 / 255  # half a step of a root, times both roots
    assert np.abs(restore(values).sum(axis=1) - 1).max() < 0.02


@pytest.mark.parametrize("both_ways", [False, True])
def test_tiles_are_maxima_at_every_level(both_ways: bool) -> None:
    """A strong edge is seen from afar: no level hides what a finer one has."""
    n = 2 * TILE + 37
    values = quantize(_random_pattern(1, n, both_ways=both_ways))
    members = dict(zip(tile_places(n, both_ways=both_ways), pack_tiles(values, both_ways=both_ways), strict=True))
    assert n_levels(n) == 3
    for (level, row, column), member in members.items():
        tile, side = unpack_tile(member, "x"), TILE << level
        part = values[row * side : (row + 1) * side, column * side : (column + 1) * side]
        for i, j in ((0, 0), (TILE // 2, 3), (TILE - 1, TILE - 1)):
            cell = part[i << level : i + 1 << level, j << level : j + 1 << level]
            assert tile[i, j] == cell.max(initial=0)
        assert tile.max() == part.max()
    finest = [place for place in members if place.level == 0]
    assert len(finest) == (9 if both_ways else 6)
    assert next(iter(members)).level == 2


def test_a_thumbnail_holds_maxima() -> None:
    """Sixty-four pixels stand for hundreds of tokens."""
    values = quantize(_random_pattern(4, 200, both_ways=False))
    small = shrink(values, 64)
    assert small.shape == (64, 64)
    assert small.max() == values.max()
    assert shrink(values, 256) is values


def test_damaged_patterns_are_named() -> None:
    """A flipped byte or a file of another length must not become a picture."""
    member = pack_triangle(np.zeros((5, 5), np.uint8))
    with pytest.raises(ArtifactCorruptError, match="layer 3 has 15 edges, 6 tokens have 21"):
        unpack_triangle(member, 6, "layer 3")
    with pytest.raises(ArtifactCorruptError, match="layer 3 is no pattern of 4 tokens"):
        unpack_triangle(member, 4, "layer 3")
    with pytest.raises(ArtifactCorruptError, match="is no pattern"):
        unpack_triangle(b"nothing", 5, "layer 3")
    with pytest.raises(ArtifactCorruptError, match="tile 7 is no tile"):
        unpack_tile(member[:-3], "tile 7")
    with pytest.raises(ArtifactCorruptError, match="tile 7 has 15 bytes"):
        unpack_tile(member, "tile 7")


def test_an_array_that_is_no_pattern_is_refused_with_its_row() -> None:
    """People hand in arrays of their own: a transposed one or raw scores would be drawn as if they were attention."""
    pattern = _random_pattern(3, 6, both_ways=False)
    check_pattern(pattern, 6)
    with pytest.raises(InputError, match=re.escape("A pattern of 7 tokens is [..., 7, 7]; found [6, 6]")):
        check_pattern(pattern, 7)
    wrong = np.stack([pattern, pattern])
    wrong[1, 4] *= 0.5
    with pytest.raises(InputError, match=re.escape("Row 4 of head [1] of a pattern sums to 0.5000, not 1")):
        check_pattern(wrong, 6)
    check_pattern(wrong, 6, weights=True)
    for value in (-1.0, np.nan):
        wrong[0, 0, 0] = value
        with pytest.raises(InputError, match="found a negative one, or one that is not finite"):
            check_pattern(wrong, 6, weights=True)
