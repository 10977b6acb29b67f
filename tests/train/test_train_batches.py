"""Batches are a pure function of (manifests, seed, number)."""

import threading
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError, InputError
from interp_assets.shuffle.mixed import open_mixed
from interp_assets.shuffle.refs import mixed_shard_ref
from interp_assets.train.batches import RowOrder, describe_batch, iter_batches, make_row_order

HOOK = "resid_post.0"


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0),
    chunk_rows=st.integers(1, 15),
    position=st.integers(0, 150),
    seed=st.integers(0, 99),
)
def test_every_epoch_holds_every_row_once_from_any_position(sizes: list[int], chunk_rows: int, position: int, seed: int) -> None:
    """Rows dropped at the borders of chunks, shards or epochs are data nobody trains on."""
    order = RowOrder(tuple(sizes), chunk_rows, seed)
    line: list[tuple[int, int, int]] = []
    for first, chunk in islice(order.chunks(0), 200):
        assert first == len(line)
        permutation = order.permutation(chunk)
        rows = list(range(chunk.n_rows)) if permutation is None else permutation.tolist()
        line += [(chunk.epoch, chunk.shard, chunk.start + row) for row in rows]
    n_epochs = len(line) // sum(sizes)
    for epoch in range(min(n_epochs, 3)):
        rows = line[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        assert sorted(rows) == [(epoch, shard, row) for shard in range(len(sizes)) for row in range(sizes[shard])]
    if position < n_epochs * sum(sizes):
        first, chunk = next(order.chunks(position))
        assert first <= position < first + chunk.n_rows
        assert line[first][:2] == (chunk.epoch, chunk.shard)


def test_any_batch_can_be_read_alone(make_planted) -> None:
    """Resume needs nothing but the batch's number."""
    planted = make_planted([{"name": "a"}], n_rows=500)
    shards = open_mixed(planted.pipeline, planted.store, HOOK)
    order = RowOrder(tuple(shard.n_rows for shard in shards), 60, 7)
    whole = [batch.rows for batch in iter_batches(planted.store, shards, order, 64, range(20))]
    for step in (0, 3, 7, 12, 19):
        (batch,) = iter_batches(planted.store, shards, order, 64, range(step, step + 1))
        assert batch.step == step
        assert torch.equal(batch.rows, whole[step])
    assert list(iter_batches(planted.store, shards, order, 64, range(0))) == []


def test_the_first_epoch_is_the_mixed_shards_in_order(make_planted) -> None:
    """They are mixed already: permuting them again would cost and give nothing."""
    planted = make_planted([{"name": "a"}], n_rows=500)
    shards = open_mixed(planted.pipeline, planted.store, HOOK)
    order = make_row_order(shards, 0, 16, HOOK)
    batches = [batch.rows for batch in iter_batches(planted.store, shards, order, 100, range(10))]
    assert torch.equal(torch.cat(batches[:5]), planted.rows)
    assert not torch.equal(torch.cat(batches[5:]), planted.rows)
    assert torch.cat(batches[5:]).double().sum() == pytest.approx(float(planted.rows.double().sum()))


def test_batches_name_the_rows_they_are_made_of(make_planted) -> None:
    """A loss that is not finite must lead back to the data."""
    planted = make_planted([{"name": "a"}], n_rows=500)
    shards = open_mixed(planted.pipeline, planted.store, HOOK)
    order = make_row_order(shards, 0, 16, HOOK)
    text = describe_batch(shards, order, 100, 1)
    assert "rows 100 to 166 of" in text
    assert "rows 0 to 34 of" in text
    assert "bucket-00001" in text


def test_damaged_rows_stop_the_reader(make_planted) -> None:
    """The background thread's errors must reach the trainer, not leave it waiting."""
    planted = make_planted([{"name": "a"}], n_rows=500)
    shards = open_mixed(planted.pipeline, planted.store, HOOK)
    path = mixed_shard_ref(planted.pipeline, HOOK, 1).path + "/rows.safetensors"
    data = bytearray(planted.store.get(path))
    data[5000] ^= 1
    planted.store.put(path, bytes(data))
    order = make_row_order(shards, 0, 16, HOOK)
    with pytest.raises(ArtifactCorruptError, match="bucket-00001"):
        list(iter_batches(planted.store, shards, order, 100, range(5)))


def test_a_reader_that_is_left_early_stops_its_thread(make_planted) -> None:
    """A failed training must not leave threads behind."""
    planted = make_planted([{"name": "a"}], n_rows=500)
    shards = open_mixed(planted.pipeline, planted.store, HOOK)
    reader = iter_batches(planted.store, shards, make_row_order(shards, 0, 16, HOOK), 10, range(10_000))
    next(reader)
    reader.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_rows_of_another_width_are_refused(make_planted) -> None:
    """The message names the shards and both widths."""
    planted = make_planted([{"name": "a"}], n_rows=500)
    shards = open_mixed(planted.pipeline, planted.store, HOOK)
    with pytest.raises(ArtifactForeignError, match=r"3 mixed shards of resid_post.0 don't have d_in = 99"):
        make_row_order(shards, 0, 99, HOOK)
    with pytest.raises(InputError, match="hold no rows"):
        make_row_order([shard._replace(n_rows=0) for shard in shards], 0, 16, HOOK)
