"""What a training or an import is expected to take, and what the next one learns from it."""

from collections.abc import Callable
from typing import Any

from interp_assets.graph.stages import make_road
from interp_assets.planning.costs import make_estimator, price
from interp_assets.planning.pipeline import Pipeline, save_plan
from interp_assets.planning.progress import Progress
from interp_assets.planning.rates import Rate, load_rates, note_rate, rates_path
from interp_assets.planning.schedule import Line, make_schedule
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store
from interp_assets.storage.traffic import Traffic
from interp_assets.train.refs import sae_ref
from interp_assets.visualize.assets import expected_l0, workload

TRAINED = {"name": "own", "d_sae": 24, "k": 3, "n_rows": 1000, "batch_rows": 100}
IMPORTED = {"name": "foreign", "d_sae": 48, "k": 3, "imported": "folder", "imported_digest": "12", "batch_rows": 100_000}


def forecast(pipeline: Pipeline, store: Store, rates: dict[str, Rate]) -> Line:
    """Return the line of the asset `sae`."""
    return next(line for line in make_schedule(make_road(pipeline.config), pipeline, store, rates, 1) if line.name == "sae")


def test_an_import_teaches_nothing_about_trainings(make_planted: Callable[..., Any]) -> None:
    """It is bound by a disk or a network: five times its estimate would make every training look five times as long."""
    planted = make_planted([TRAINED, IMPORTED])
    stop = next(stop for stop in make_road(planted.pipeline.config) if stop.name == "sae")
    kinds = [stop.kind_of_work(planted.pipeline.config, name) for name in ("own", "foreign")]
    assert kinds == ["sae batch_topk", "sae imported"]
    plain, slow, slower = (
        forecast(planted.pipeline, planted.store, rates) for rates in ({}, {"sae imported": Rate(1e6, 3)}, {kinds[0]: Rate(1e6, 3)})
    )
    own, foreign = (price(planted.pipeline.config, stop.takes(planted.pipeline, planted.store, name)).seconds for name in ("own", "foreign"))
    assert abs(slow.wall_s - plain.wall_s - foreign * (1e6 - 1)) < 1e-6 * slow.wall_s
    assert abs(slower.wall_s - plain.wall_s - own * (1e6 - 1)) < 1e-6 * slower.wall_s


def test_a_part_of_the_work_is_no_rate(make_planted: Callable[..., Any], tmp_path: Any) -> None:
    """A training that went on from a checkpoint did less than the estimate counts."""
    planted = make_planted([TRAINED], root=str(tmp_path))
    save_plan(planted.store, planted.pipeline.plan)
    compare = make_estimator(planted.pipeline.config, make_road(planted.pipeline.config)).compare
    before = load_rates(rates_path()).get("sae batch_topk")
    assert compare(["sae"], "own", Traffic(), 60.0, is_whole=False) is not None
    assert load_rates(rates_path()).get("sae batch_topk") == before
    assert compare(["sae"], "own", Traffic(), 60.0, is_whole=True) is not None
    assert load_rates(rates_path()).get("sae batch_topk") != before


def test_memory_is_that_of_the_missing_saes_at_all_their_hook_points(make_planted: Callable[..., Any]) -> None:
    """An imported SAE is not trained, a crosscoder reads more hook points, a transcoder writes another one (16 and 8 values here)."""

    def job_bytes(**fields: Any) -> int:
        planted = make_planted([{**TRAINED, **fields}])
        return forecast(planted.pipeline, planted.store, {}).job_bytes

    def expected(d_in: int, d_out: int, skip: int = 0) -> int:
        return 5 * ((d_in + d_out) * 24 + skip) * 4 + 100 * (d_in + 3 * d_out + 2 * 24) * 4

    assert job_bytes() == expected(16, 16)
    assert job_bytes(task="crosscoder", more_hook_points=["mlp_out.0"]) == expected(24, 24)
    assert job_bytes(task="transcoder", target_hook_point="mlp_out.0") == expected(16, 8)
    assert job_bytes(task="skip_transcoder", target_hook_point="mlp_out.0") == expected(16, 8, 16 * 8)
    both = make_planted([TRAINED, IMPORTED])
    assert forecast(both.pipeline, both.store, {}).job_bytes == max(expected(16, 16), 5 * 32 * 48 * 4)


def test_feature_passes_expect_the_l0_that_a_training_measured(make_planted: Callable[..., Any]) -> None:
    """A gated SAE of k = 32 by default may fire 459 latents a row: 11 times the bytes that were forecast."""
    planted = make_planted([TRAINED])
    assert expected_l0(planted.pipeline, planted.store, "own") == 3
    with create_artifact(planted.store, sae_ref(planted.pipeline, "own")) as art:
        art.facts["l0"] = 17.5
    assert expected_l0(planted.pipeline, planted.store, "own") == 17.5
    assert workload(planted.pipeline, planted.store, "own").l0 == 17.5


def test_small_trainings_are_bound_by_their_steps_and_dense_ones_by_products(make_planted: Callable[..., Any]) -> None:
    """Products alone said a second of what took minutes: each step costs, and a dense architecture computes all that TopK leaves out."""

    def seconds(**fields: Any) -> float:
        return forecast(make_planted([{**TRAINED, **fields}]).pipeline, make_planted([TRAINED]).store, {}).wall_s

    assert seconds(n_rows=1_000_000, batch_rows=100) > 10_000 * 0.01
    assert seconds(d_sae=1 << 20, n_rows=10**7, batch_rows=10**5, architecture="relu") > 2 * seconds(d_sae=1 << 20, n_rows=10**7, batch_rows=10**5)


def test_a_training_takes_longer_with_rows_latents_steps_and_denser_architectures(make_planted: Callable[..., Any]) -> None:
    """An SAE of small batches said 1 s and took 223: Adam goes through all weights in each step, however few rows it has."""

    def seconds(**fields: Any) -> float:
        planted = make_planted([{**TRAINED, **fields}])
        stop = make_road(planted.pipeline.config).get(("sae",))
        return stop.takes(planted.pipeline, planted.store, "own").busy_s

    big = {"d_sae": 1 << 20, "n_rows": 10**6, "batch_rows": 1000}
    n_weights = 2 * 16 * (1 << 20)
    assert seconds(**{**big, "n_rows": 2 * 10**6}) == 2 * seconds(**big)
    assert 1.5 * seconds(**big) < seconds(**{**big, "d_sae": 1 << 21}) < 2 * seconds(**big)
    assert seconds(**{**big, "batch_rows": 10}) > 100_000 * 4e-9 * n_weights
    assert seconds(**{**big, "n_rows": 1, "batch_rows": 10}) == seconds(**{**big, "n_rows": 10, "batch_rows": 10})
    by_architecture = [seconds(**big, architecture=name) for name in ("topk", "jump_relu", "relu", "gated")]
    assert by_architecture == sorted(set(by_architecture))


def test_a_small_sae_beside_a_large_one_is_not_charged_for_it(make_planted: Callable[..., Any], tmp_path: Any) -> None:
    """SAEs of one run were each said to take an equal part of it: what was forecast with 1 s took 223, and taught that for the next time."""
    planted = make_planted([TRAINED, {**TRAINED, "name": "large", "d_sae": 24 << 10, "n_rows": 100_000}], root=str(tmp_path))
    save_plan(planted.store, planted.pipeline.plan)
    progress = Progress()
    assert progress.divide(["sae"], ["own", "large"]) == {"own": 0.5, "large": 0.5}
    progress.estimator = make_estimator(planted.pipeline.config, make_road(planted.pipeline.config))
    shares = progress.divide(["sae"], ["own", "large"])
    assert sum(shares.values()) == 1
    assert shares["own"] < 0.01


def test_the_history_keeps_the_forecast_of_this_machine(make_planted: Callable[..., Any], tmp_path: Any) -> None:
    """`interp plan` corrects by what was measured here; `forecast_s` beside it was that of any machine."""
    planted = make_planted([TRAINED], root=str(tmp_path))
    save_plan(planted.store, planted.pipeline.plan)
    road = make_road(planted.pipeline.config)
    assumed_s = price(planted.pipeline.config, road.get(("sae",)).takes(planted.pipeline, planted.store, "own")).seconds
    for _ in range(30):
        note_rate(rates_path(), "sae batch_topk", 1000.0, 7000.0)
    progress = Progress()
    progress.estimator = make_estimator(planted.pipeline.config, road)
    table = progress.cost(["sae"], "own", Traffic(), 60.0, is_whole=False)
    assert progress.expected_s["sae"] == load_rates(rates_path())["sae batch_topk"].correct(assumed_s)
    assert progress.expected_s["sae"] > 5 * assumed_s
    assert table is not None
    assert {row["what"]: row["estimated"] for row in table}["seconds"] == float(f"{assumed_s:.4g}")
