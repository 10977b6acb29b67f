"""What this machine took corrects the next forecast, and nothing else depends on it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from odd_names import ODD_NAME

from interp_assets.planning.rates import Rate, load_rates, note_rate


def test_a_machine_that_takes_twice_as_long_gets_a_factor_of_two(tmp_path: Path) -> None:
    """A long partition tells more than a short one, and what one of ten seconds leaves open a second one settles."""
    path = tmp_path / ODD_NAME / "rates"
    assert load_rates(path) == {}
    assert note_rate(path, "activations gpt2", 1000.0, 2000.0)
    assert note_rate(path, "sae", 4.0, 2.0)
    found = load_rates(path)
    assert found["activations gpt2"].factor == pytest.approx(2.0, abs=0.02)
    assert found["activations gpt2"].n_partitions == 1
    assert 0.5 < found["sae"].factor < 0.8
    assert note_rate(path, "sae", 400.0, 800.0)
    assert load_rates(path)["sae"].factor == pytest.approx(2.0, abs=0.05)
    assert load_rates(path)["sae"].n_partitions == 2


def test_old_partitions_fade(tmp_path: Path) -> None:
    """A machine that got another disk is believed after some dozens of partitions."""
    path = tmp_path / "rates"
    for _ in range(20):
        note_rate(path, "sae", 10.0, 100.0)
    assert load_rates(path)["sae"].correct(10.0) == pytest.approx(100.0, rel=0.05)
    for _ in range(80):
        note_rate(path, "sae", 10.0, 10.0)
    assert load_rates(path)["sae"].factor < 1.2


def test_a_tiny_partition_does_not_spoil_the_forecast_of_a_large_one(tmp_path: Path) -> None:
    """A trial of 0.15 s took five, imports and files included: as a plain ratio that made an hour's training take 33."""
    path = tmp_path / "rates"
    for _ in range(20):  # a sweep of trials is no better witness than one
        assert note_rate(path, "sae topk", 0.15, 5.0)
        assert load_rates(path)["sae topk"].correct(3600.0) == pytest.approx(3600.0, rel=0.5)
    assert load_rates(path)["sae topk"].correct(0.15) == pytest.approx(5.0, rel=0.1)
    assert note_rate(path, "sae topk", 3600.0, 7200.0)
    assert load_rates(path)["sae topk"].correct(3600.0) == pytest.approx(7200.0, rel=0.02)
    assert load_rates(path)["sae topk"].correct(0.15) == pytest.approx(5.0, rel=0.1)


def test_short_partitions_tell_nothing(tmp_path: Path) -> None:
    """Start-up, as a rate, would make a large partition thousands of times too long: what took little, and what was expected to, is none."""
    path = tmp_path / "rates"
    assert not note_rate(path, "sae", 0.0003, 0.3)
    assert not note_rate(path, "mixed_shards", 0.0003, 3.0)
    assert not note_rate(path, "sweep", 0.0, 5.0)
    assert not path.exists()


def test_damaged_or_unwritable_rates_are_none(tmp_path: Path) -> None:
    """A forecast is not worth an error, and a run even less."""
    path = tmp_path / "rates"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 10)
    assert load_rates(path) == {}
    assert not note_rate(path, "sae", 10.0, 10.0)
    assert not note_rate(tmp_path / "rates" / "below-a-file", "sae", 10.0, 10.0)


@pytest.mark.parametrize("value", ["NULL", "'x'", "1e300", "-1", "x'00'"])
def test_sums_that_are_none_are_left_out(tmp_path: Path, value: str) -> None:
    """A forecast must not end in a traceback because of a flipped bit in a cache, nor in a folder whose name a URI would misread."""
    path = tmp_path / "a#b?c%20d" / "rates.sqlite"
    assert note_rate(path, "good", 2.0, 4.0)
    assert note_rate(path, "bad", 2.0, 4.0)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"UPDATE rates SET excess_s = {value}, partitions = {value} WHERE kind = 'bad'")
    found = load_rates(path)
    assert list(found) == ["good"]
    assert isinstance(found["good"], Rate)
