"""What a log file of a run says: plain lines, how far it is and how long it will take."""

import io
import math
import time
from itertools import pairwise

import pytest
from rich.console import Console

from interp_assets.compute.compiled import Compiling
from interp_assets.planning.progress import Doing, describe_workers
from interp_assets.terminal.console import Bars
from interp_assets.terminal.left import Remaining
from interp_assets.terminal.lines import Lines, format_duration, watch


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def test_lines_say_how_far_an_asset_is() -> None:
    """After a third of the work in 60 s, 120 s are left; units inside a partition count, and the last partition tells how many there are."""
    file, clock = io.StringIO(), Clock()
    lines = Lines(Console(file=file), now=clock)
    assert lines.describe() == ""
    lines.expect("activations", 3)
    lines.begin("activations", "shard-000000")
    clock.now = 30.0
    lines.advance(500)
    assert lines.describe() == "activations: 0 of 3 done, shard-000000 with 500 rows done; 30 s so far"
    lines.advance(500)
    lines.end()
    clock.now = 60.0
    assert lines.describe() == "activations: 1 of 3 done; 1 min so far, about 2 min left"
    lines.begin("activations", "shard-000001")
    lines.advance(500)
    clock.now = 90.0
    assert lines.describe() == "activations: 1 of 3 done, shard-000001 at 50 %; 1 min 30 s so far, about 1 min 30 s left"
    lines.end()
    assert lines.describe() == "activations: 2 of 3 done; 1 min 30 s so far, about 45 s left"
    lines.end()
    assert lines.describe() == "activations: 3 of 3 done, checking what was made; 1 min 30 s so far"
    lines.tell("2 empty files skipped: a, b")
    assert file.getvalue() == "  activations: 3 partitions to make\n  2 empty files skipped: a, b\n"


def test_an_asset_without_partitions_is_at_work() -> None:
    """`0 of 1 done` would say nothing; and of what is there already, nothing is to be said."""
    clock = Clock()
    lines = Lines(Console(file=io.StringIO()), now=clock)
    lines.expect("sweep", 1)
    lines.begin("sweep", "")
    clock.now = 20.0
    assert lines.describe() == "sweep: at work; 20 s so far"
    lines.begin("sae", "demo", 1000)
    lines.advance(250)
    assert lines.describe() == "sae: demo at 25 %; 20 s so far, about 1 min left"
    lines.advance(750)
    assert lines.describe() == "sae: demo at 100 %, writing and checking it; 20 s so far"
    lines.expect("sweep", 0)
    assert lines.describe() == ""


def test_a_joint_training_says_how_much_of_all_of_it_is_done() -> None:
    """At 62 % of twelve SAEs in one pass it said `2 h 10 min left`, and it was 4 min: a share of one of twelve was taken for that of all."""
    clock = Clock()
    lines = Lines(Console(file=io.StringIO()), now=clock)
    names = [f"arm-{i}" for i in range(12)]
    lines.expect("sae", 12)
    lines.begin_together("sae", names, 12_000)
    lines.measure("FVU 0.210 (arm-3, L0 32.0) to 0.340 (arm-1, L0 32.0)")
    lines.advance(7440)
    clock.now = 372.0
    assert lines.describe() == (
        "sae: 0 of 12 done, arm-0, arm-1, arm-2 and 9 more at 62 %, FVU 0.210 (arm-3, L0 32.0) to 0.340 (arm-1, L0 32.0); "
        "6 min 12 s so far, about 3 min 48 s left"
    )
    lines.advance(4560)
    clock.now = 600.0
    for name in names[:6]:
        lines.begin("sae", name)
        lines.end()
    assert lines.describe() == "sae: 6 of 12 done, at 100 %, writing and checking it; 10 min so far"
    lines.begin("sae", names[6])
    assert lines.describe() == "sae: 6 of 12 done, arm-6 at 100 %, writing and checking it; 10 min so far"
    for _ in names[6:]:
        lines.end()
    assert lines.describe() == "sae: 12 of 12 done, checking what was made; 10 min so far"


def test_partitions_that_hold_nothing_are_not_counted() -> None:
    """A held-out shard has no share in the shuffle: `3 of 2 done` would come of it, and a rate that is too high."""
    clock = Clock()
    lines = Lines(Console(file=io.StringIO()), now=clock)
    lines.expect("shuffle_pass_1", 2)
    lines.begin("shuffle_pass_1", "shard-000000")
    lines.leave()
    clock.now = 10.0
    assert lines.describe() == "shuffle_pass_1: 0 of 2 done; 10 s so far"
    lines.begin("shuffle_pass_1", "shard-000001")
    lines.end()
    assert lines.describe() == "shuffle_pass_1: 1 of 2 done; 10 s so far, about 10 s left"


def replay(trace: list[tuple[float, float]], compiled_s: float = 0.0) -> list[tuple[float, float, str]]:
    """Return time, seconds left and reason at each point (seconds, share done) of a trace, whose first `compiled_s` seconds went into compiling."""
    clock, said = Clock(), []
    remaining = Remaining(clock, lambda: Compiling(is_busy=False, took_s=min(clock.now, compiled_s)))
    for clock.now, done in trace:
        if found := remaining.estimate(done):
            said.append((clock.now, *found))
    return said


STEADY = [(float(t), t / 600) for t in range(0, 601, 15)]
COMPILED = [(float(t), max(0.0, (t - 60) / 600)) for t in range(0, 661, 15)]
"""A minute of compiling, then steady work: as a training goes on a fresh machine. Made by hand."""
SLOWING = [(float(t), t / 400 if t <= 150 else 0.375 + (t - 150) / 1200) for t in range(0, 901, 15)]
"""A run beside which another one began: a third of the speed from 150 s on."""
JITTER = [(float(t), min(1.0, (t + 4 * math.sin(t)) / 600)) for t in range(0, 601, 15)]


@pytest.mark.parametrize(("trace", "compiled_s", "end_s"), [(STEADY, 0.0, 600), (COMPILED, 60.0, 660), (JITTER, 0.0, 600)])
def test_what_is_left_falls_with_the_clock(trace: list[tuple[float, float]], compiled_s: float, end_s: float) -> None:
    """Steady work, whatever was compiled before it, and its small unevenness: no estimate climbs, and none is far from what there was."""
    said = replay(trace, compiled_s)
    assert len(said) > 25
    assert [why for _, _, why in said if why] == []
    for at, left, _ in said:
        assert left == pytest.approx(end_s - at, rel=0.25, abs=20)


def test_an_estimate_that_climbs_says_why() -> None:
    """From five minutes to eleven without a word looks broken; and the slower speed is believed after a minute of it, not after half of the work."""
    said = replay(SLOWING)
    assert {at for at, _, why in said if why} <= {at for at, _, _ in said if 150 < at <= 240}
    assert any(why.startswith("slower now: ") for _, _, why in said)
    for (at, left, _), (later, next_left, why) in pairwise(said):
        assert why or next_left <= max(1.25 * (left - (later - at)), left - (later - at) + 20)
    assert next(left for at, left, _ in said if at >= 240) == pytest.approx(660, rel=0.1)


def test_compiling_is_said() -> None:
    """The first training on a machine compiles for a minute: that is no slow training."""
    clock = Clock()
    lines = Lines(Console(file=io.StringIO()), now=clock, compiling=lambda: Compiling(is_busy=True, took_s=0.0))
    lines.expect("sae", 1)
    lines.begin("sae", "demo", 1000)
    clock.now = 40.0
    assert lines.describe() == "sae: demo at work, compiling loops (once on this machine); 40 s so far"


def test_a_silent_stage_is_reported_all_the_same() -> None:
    """An hour of one matrix product calls nobody: the line comes from a thread, and ends with the run."""
    file = io.StringIO()
    with Lines(Console(file=file), every_s=0.01, now=Clock()) as lines:
        lines.expect("sae", 1)
        lines.begin("sae", "demo")
        while file.getvalue().count("\n") < 3:
            time.sleep(0.005)
    text = file.getvalue()
    assert "sae: demo at work; < 1 s so far" in text
    assert "\x1b" not in text
    time.sleep(0.05)
    assert file.getvalue() == text


def test_bars_are_for_terminals_only() -> None:
    """A log file with escape codes cannot be read."""
    assert isinstance(watch(Console(file=io.StringIO())), Lines)
    assert isinstance(watch(Console(file=io.StringIO(), force_terminal=True)), Bars)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.2, "< 1 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3599.7, "1 h"), (12_010, "3 h 20 min")),
        *((86_399, "1 d"), (367_000, "4 d 6 h"), (86_400 * 3, "3 d"), (3_660, "1 h 1 min"), (86_460, "1 d")),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    """`367000 s` makes people count; rounding carries over."""
    assert format_duration(float(seconds)) == text


def test_workers_are_told_side_by_side_with_their_rate_together() -> None:
    """One picture of all, and of many only a few by name."""
    doing = [Doing(f"shard-{index}", 1000 * index, 2.0) for index in range(1, 7)]
    said = describe_workers(doing, "rows")
    assert said == "6 at work: shard-1 1,000, shard-2 2,000, shard-3 3,000, shard-4 4,000 and 2 more rows; 10,500/s together"
    console = Console(file=io.StringIO(), width=200)
    with Lines(console, every_s=3600.0) as lines:
        lines.expect("activations", 8)
        lines.begin("activations", "shard-1")
        lines.watch(doing[:1])
        assert "0 of 8 done, 1 at work: shard-1 1,000 rows; 500/s together" in lines.describe()
        lines.expect("mixed_shards", 2)
        assert "together" not in lines.describe()
