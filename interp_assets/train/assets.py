"""SAEs as assets: one partition per experiment of the sweep, trained together, measured on the held-out shards, and compared in one table."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from interp_assets.corpus.sizes import TOKEN_BYTES, bound_rows, count_rows
from interp_assets.errors import ArtifactMissingError, CertificateError, InterpError
from interp_assets.harvest.sizes import ROWS_PER_S, model_bytes
from interp_assets.planning.asset import EXPERIMENTS, Asset, Job, Load, Markdown, Needs, Shown, every, only, same, whole
from interp_assets.planning.config import PipelineConfig, SaeConfig, code_version
from interp_assets.planning.machine import ONE_WORKER
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.shuffle.refs import certificate_ref
from interp_assets.shuffle.rows import RowFormat
from interp_assets.storage.manifest import Produced, find_made_from, find_manifest
from interp_assets.storage.store import Store
from interp_assets.train.checks import FINITE_TRAINING, IMPORTED_FIT, OUTLIER_ROWS, QUALITY_BOUNDS
from interp_assets.train.lineage import evaluation_lineage, metric_lineage, probes_lineage, sae_lineage
from interp_assets.train.refs import (
    EVALUATION_VERSION,
    IMPORT_VERSION,
    MATCH_VERSION,
    METRIC_VERSION,
    MODEL_TOKENS,
    PICK_VERSION,
    PROBE_VERSION,
    SWEEP_VERSION,
    TRAIN_VERSION,
    evaluation_ref,
    matches_ref,
    metric_ref,
    probes_ref,
    sae_ref,
    sweep_ref,
)

T = TypeVar("T")
GROUP = "train"
_PRODUCTS = 5
"""Matrix products of a training step (benchmarks/bench_train.py)."""
_STEP_S = 0.01
"""What a step of training takes besides its products: bookkeeping, on two cores."""
_WEIGHT_S = 5e-9
"""The same for each weight, whatever the batch is: gradients, Adam's moments and norms go through memory (least of 20 cases: 4.4e-9)."""
_OF_PRODUCTS = {
    "relu": 1.5,
    "gated": 1.8,
    "topk": 0.5,
    "batch_topk": 0.55,
    "matryoshka_batch_topk": 0.6,
    "jump_relu": 1.0,
    "jump_relu_tanh": 1.0,
    "jump_relu_step": 1.3,
}
"""Seconds of a step beside those of its bare products (benchmarks/results/train_2-core-x86_202611.md, rounded up); what does not fire is left out."""
_OF_OWN_PRODUCTS = 3.0
"""The same of an architecture of one's own: autograd takes up to twice what the built-in one does."""
_ENCODING = 2.0
"""Times that the products of encoding and decoding take where an SAE is measured: its sums are in float64."""
_FITTING_S = 2.0
"""Seconds in which the probes of one `k` are fitted to 16,384 rows."""
_SPEEDS = ("step_rows_per_s", "input_wait_share", "peak_memory_bytes", "peak_device_bytes")
_WEIGHT_COPIES = 5
"""Weights, gradients, Adam's two moments, and a copy for checkpoints; of an imported SAE its file, tensors, float64, and what is written."""


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage."""
    held_out = [shard_key(index) for index in range(config.corpus.held_out_shards)]
    return [
        Asset(
            key=("sae",),
            group=GROUP,
            kinds=("pytorch",),
            description=(
                "A trained sparse autoencoder: weights and configuration in a folder that SAELens opens, and its training curve. The unit of work is "
                "an experiment; those of one run share one reader and see identical batches. Look at the loss curve, L0 and FVU, at the profile, and "
                "at the share of the time that training waited for rows. An experiment with `imported` is read from another tool's folder instead."
            ),
            axis=EXPERIMENTS,
            reads=(every("mixed_shards"), whole("activation_statistics"), whole("shuffle_certificate")),
            artifacts=lambda pipeline, _store, key: [sae_ref(pipeline, key)],
            lineage=lambda pipeline, _store, key: [sae_lineage(pipeline, key)],
            make=_train,
            shows=_show_training,
            takes=_training,
            work_kind=lambda config, key: f"sae {'imported' if config.sae(key).imported else config.sae(key).architecture}",
            needs=Needs(accelerator=True),
            is_made_together=True,
            is_one_run=True,
            is_relied_on=True,
            obstacles=_find_obstacles,
            lightens="lower d_sae or batch_rows of the largest SAE",
            checks=(FINITE_TRAINING,),
            code_version=".".join(code_version(version) for version in (TRAIN_VERSION, PICK_VERSION, IMPORT_VERSION)),
        ),
        Asset(
            key=("sae_evaluation",),
            group=GROUP,
            kinds=("pytorch", "parquet"),
            description=(
                "An SAE measured on the held-out shards, which it has never seen: L0, FVU, share of the model's loss recovered when its "
                "reconstruction is put in place, KL divergence, dead latents. The unit of work is an experiment. Look at the histogram of firing "
                "frequencies."
            ),
            axis=EXPERIMENTS,
            reads=(same("sae"), only("activations", partitions=held_out), whole("activation_statistics")),
            artifacts=lambda pipeline, _store, key: [evaluation_ref(pipeline, key)],
            lineage=lambda pipeline, _store, key: evaluation_lineage(pipeline, key),
            make=_evaluate,
            shows=_show_frequencies,
            takes=_evaluating,
            work_kind=lambda config, _key: f"sae_evaluation {config.model.name}",
            needs=Needs(accelerator=True),
            is_made_together=True,
            may_part=True,
            is_one_run=True,
            lightens="lower d_sae or batch_rows of the largest SAE, give SAEs of the same rows runs of their own, or load the model in bfloat16",
            checks=(QUALITY_BOUNDS, OUTLIER_ROWS, IMPORTED_FIT),
            code_version=code_version(EVALUATION_VERSION),
        ),
        *([_measuring(held_out)] if config.metrics else []),
        *([_probing(held_out)] if config.probes else []),
        _comparing(),
        *_matching(config, held_out),
    ]


def _comparing() -> Asset:
    return Asset(
        key=("sweep",),
        group=GROUP,
        kinds=("parquet", "polars"),
        description=(
            "All SAEs of the pipeline in one table: configuration, quality on the held-out shards, speed, and artifact ids of each; polars, "
            "DuckDB and pandas read it. Look at the Pareto plot of L0 and FVU, and at the learning curves side by side."
        ),
        reads=(every("sae").remember().if_there(), every("sae_evaluation").remember().if_there()),
        artifacts=lambda pipeline, _store, _key: [sweep_ref(pipeline)],
        make=_compare,
        shows=_show_sweep,
        takes=lambda pipeline, _store, _key: Load(n_inputs=2 * len(pipeline.config.saes)),
        code_version=code_version(SWEEP_VERSION),
    )


def _matching(config: PipelineConfig, held_out: list[str]) -> list[Asset]:
    """List the asset of matches; none without the section."""
    if config.matches is None:
        return []
    return [
        Asset(
            key=("sae_matches",),
            group=GROUP,
            kinds=("pytorch", "parquet"),
            description=(
                "Each latent of some SAEs beside the one with the nearest decoder row in each other SAE of its space: cosine, whether each is the "
                "other's nearest, and how their activations correlate on held-out rows. Look at the mean cosine, and at the share above 0.9."
            ),
            reads=(only("sae", partitions=config.matches.saes).remember(), only("activations", partitions=held_out)),
            artifacts=lambda pipeline, _store, _key: [matches_ref(pipeline)],
            make=_match,
            shows=lambda _job, _key, made: name_numbers(made[0].manifest.facts["pairs"]),
            takes=_matching_takes,
            needs=Needs(accelerator=True),
            code_version=code_version(MATCH_VERSION),
        )
    ]


def _measuring(held_out: list[str]) -> Asset:
    return Asset(
        key=("sae_metrics",),
        group=GROUP,
        kinds=("pytorch", "json"),
        description=(
            "An SAE measured by the functions that `metrics` names, on the held-out rows: an artifact a function. The unit of work is an experiment. "
            "Trainings and evaluations do not depend on it."
        ),
        axis=EXPERIMENTS,
        reads=(same("sae"), only("activations", partitions=held_out)),
        artifacts=lambda pipeline, _store, key: [metric_ref(pipeline, key, metric) for metric in pipeline.config.metrics],
        lineage=lambda pipeline, _store, key: metric_lineage(pipeline, key),
        make=_measure,
        shows=lambda _job, _key, made: {column: value for item in made for column, value in item.manifest.facts["values"].items()},
        takes=_evaluating,
        is_made_together=True,
        may_part=True,
        is_one_run=True,
        code_version=code_version(METRIC_VERSION),
    )


def _probing(held_out: list[str]) -> Asset:
    return Asset(
        key=("sae_probes",),
        group=GROUP,
        kinds=("pytorch", "parquet"),
        description=(
            "How well few latents of an SAE tell a label of held-out rows, such as whether a token is in a docstring: balanced accuracy over "
            "documents that it was not fitted on, beside probes that read the activation itself. The unit of work is an experiment. Look at how "
            "near one latent comes to the whole activation."
        ),
        axis=EXPERIMENTS,
        reads=(same("sae"), only("activations", partitions=held_out)),
        artifacts=lambda pipeline, _store, key: [probes_ref(pipeline, key)],
        lineage=lambda pipeline, _store, key: probes_lineage(pipeline, key),
        make=_probe,
        shows=lambda _job, _key, made: dict(made[0].manifest.facts["values"]),
        takes=_probing_takes,
        is_made_together=True,
        may_part=True,
        is_one_run=True,
        code_version=code_version(PROBE_VERSION),
    )


def _probe(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.train.probes.probe import probe_saes

    assert job.config.probes
    n_rows = min(job.config.probes.rows, count_rows(job.pipeline, job.store, job.pipeline.held_out_indices))
    job.progress.begin_together("sae_probes", job.keys, n_rows * len(job.keys))
    made = probe_saes(job.pipeline, job.store, job.keys, job.progress.advance)

    def take(key: str) -> list[Produced]:
        found = made[key]
        if isinstance(found, InterpError):
            raise found
        return [found]

    return take


def _probing_takes(pipeline: Pipeline, store: Store, key: str) -> Load:
    probes, sae = pipeline.config.probes, pipeline.config.sae(key)
    assert probes
    n_rows, weights = min(probes.rows, count_rows(pipeline, store, pipeline.held_out_indices)), _held_bytes(pipeline, sae)[0]
    busy_s = 2 * 2.0 * n_rows * (weights / 8) / ONE_WORKER.flops + _FITTING_S * n_rows / 16_384 * len(probes.k)
    return Load(n_rows, weights, 0, 4, 1, busy_s=busy_s, memory_bytes=weights + _held_bytes(pipeline, sae)[1] + 600.0 * n_rows * probes.seeds)


def _measure(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.train.own.measure import measure_own

    n_rows = count_rows(job.pipeline, job.store, job.pipeline.held_out_indices)
    job.progress.begin_together("sae_metrics", job.keys, n_rows * len(job.keys) * len(job.config.metrics))
    made = {key: measure_own(job.pipeline, job.store, key, job.progress.advance) for key in job.keys}
    return lambda key: _sound(made[key])


def _sound(found: T | InterpError) -> T:
    """Return what was made. Raises what kept it from being made."""
    if isinstance(found, InterpError):
        raise found
    return found


def _train(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.train.launch import run_training
    from interp_assets.train.loop import training_rows
    from interp_assets.train.reports import make_listener
    from interp_assets.train.resume import has_checkpoint
    from interp_assets.train.trackers.track import tracked

    names = list(job.keys)
    _require_certificates(job.pipeline, job.store, names)
    job.progress.begin_together("sae", names, training_rows(job.pipeline, names))
    begun_before = {name for name in names if has_checkpoint(job.store, sae_ref(job.pipeline, name))}
    with tracked(job.pipeline, names, make_listener(job.log, job.progress), job.progress.tell) as listener:
        trained = run_training(job.pipeline, job.store, names, job.progress.advance, listener.hear)
        listener.end(trained.made)
    return lambda key: [trained.take(key)._replace(is_whole=key not in begun_before)]


def _find_obstacles(pipeline: Pipeline, store: Store) -> list[str]:
    """Say of the SAEs that are not there yet why they cannot be trained or taken in, as far as configuration and rows tell."""
    missing = [sae for sae in pipeline.config.saes if not _is_there(pipeline, store, sae.name)]
    n_rows = sum(found.most.n_valid for found in bound_rows(pipeline, store, pipeline.train_indices)) if missing else 0
    found = []
    for sae in missing:
        try:
            _look_at(pipeline, sae)
        except InterpError as error:
            found.append(str(error) if sae.imported else f"SAE {sae.name!r}: {error}")
        if not sae.imported and n_rows < sae.batch_rows:
            found.append(
                f"SAE {sae.name!r} takes {sae.batch_rows:,} rows a batch (batch_rows), and the training shards have at most {n_rows:,}: a batch "
                "would hold rows twice. Lower batch_rows, or give `corpus` more text."
            )
    return found


def _look_at(pipeline: Pipeline, sae: SaeConfig) -> None:
    """Raise what an SAE's import or training would, as far as it is known; only those need PyTorch, which takes seconds."""
    if sae.imported:
        from interp_assets.train.exchange.imported import read_import

        read_import(pipeline, sae.name)
    elif max(pipeline.config.execution.processes, pipeline.config.execution.latent_processes) > 1:
        from interp_assets.train.launch import check_processes

        check_processes(pipeline, [sae.name])


def _is_there(pipeline: Pipeline, store: Store, name: str) -> bool:
    """Tell whether an SAE is trained; it is not before the shuffle is planned."""
    try:
        return find_manifest(store, sae_ref(pipeline, name)) is not None
    except ArtifactMissingError:
        return False


def _require_certificates(pipeline: Pipeline, store: Store, names: list[str]) -> None:
    """Refuse to train on rows whose shuffle is not proven, or proven of other rows. Raises `CertificateError`."""
    from interp_assets.shuffle.mixed import open_mixed

    configs = [config for config in (pipeline.config.sae(name) for name in names) if not config.imported]
    for hook_point in sorted({hook_point for config in configs for hook_point in (*config.sources, *config.targets)}):
        mixed = [shard.manifest for shard in open_mixed(pipeline, store, hook_point)]
        certificate = find_made_from(store, certificate_ref(pipeline, hook_point), mixed)
        if not certificate or not certificate.facts["passed"]:
            raise CertificateError(
                f"The shuffle of {hook_point} has no valid certificate ({store.url}/{certificate_ref(pipeline, hook_point).path}): training would "
                "learn its order. Read its verdicts with `interp inspect`, and materialize the mixed shards again."
            )


def _show_training(job: Job, key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.train.plots import plot_training
    from interp_assets.train.reports import describe_speed
    from interp_assets.train.times import find_times

    times = find_times(job.store, made[0].ref.path, made[0].manifest) or {}
    shown: dict[str, Shown] = {name: times[name] for name in _SPEEDS if times.get(name) is not None}
    shown |= {name: Markdown(text) for name, text in describe_speed(job.store, made[0]).items()}
    if not job.config.sae(key).imported:
        shown["training"] = Markdown(plot_training(job.store, made[0]))
    return shown


def _training(pipeline: Pipeline, _store: Store, key: str) -> Load:
    sae = pipeline.config.sae(key)
    d_in, weights_bytes = pipeline.d_in(sae.hook_point), 8.0 * pipeline.d_in(sae.hook_point) * sae.d_sae
    weights, batch = _held_bytes(pipeline, sae)
    if sae.imported:
        return Load(0, weights_bytes, weights_bytes, 4, 4, memory_bytes=weights * _WEIGHT_COPIES)
    return Load(
        rows=sae.n_rows,
        read_bytes=sae.n_rows * RowFormat(d_in, pipeline.config.harvest.dtype).record_bytes,
        written_bytes=weights_bytes,
        n_inputs=4,
        n_outputs=4,
        busy_s=math.ceil(sae.n_rows / sae.batch_rows) * _step_s(sae, weights // 4),
        memory_bytes=weights * _WEIGHT_COPIES + batch,
    )


def _step_s(sae: SaeConfig, n_weights: int) -> float:
    """Return the seconds of a step of training on `ONE_WORKER`."""
    products_s = _PRODUCTS * 2.0 * sae.batch_rows * (n_weights / 2) / ONE_WORKER.flops
    return _OF_PRODUCTS.get(sae.architecture, _OF_OWN_PRODUCTS) * products_s + _WEIGHT_S * n_weights + _STEP_S


def _evaluate(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.train.evaluate import evaluate_saes

    n_units = sum(_evaluation_units(job.pipeline, job.store))
    job.progress.begin_together("sae_evaluation", job.keys, n_units * len(job.keys))
    made = evaluate_saes(job.pipeline, job.store, job.world.model(), job.keys, job.progress.advance)
    return lambda key: [_sound(made[key])]


def _show_frequencies(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.train.own.columns import RECOVERY
    from interp_assets.train.plots import plot_frequencies

    facts = made[0].manifest.facts
    found = {name: facts[name] for name in RECOVERY if name in facts}
    return {**found, "firing_frequency": Markdown(plot_frequencies(job.store, made[0]))}


def _evaluating(pipeline: Pipeline, store: Store, key: str) -> Load:
    sae = pipeline.config.sae(key)
    (n_rows, n_tokens), n_shards = _evaluation_units(pipeline, store), len(pipeline.held_out_indices)
    n_alike = sum(other.targets == sae.targets for other in pipeline.config.saes)
    busy_s = (1 + 2 / n_alike) * n_tokens / ROWS_PER_S + _ENCODING * 2.0 * n_rows * (_held_bytes(pipeline, sae)[0] / 4) / ONE_WORKER.flops
    d_in = pipeline.d_in(sae.hook_point)
    read_bytes = n_rows * (RowFormat(d_in, pipeline.config.harvest.dtype).row_bytes + TOKEN_BYTES) + 8.0 * d_in * sae.d_sae
    held_bytes = n_alike * _held_bytes(pipeline, sae)[0] + _held_bytes(pipeline, sae)[1] + model_bytes(pipeline)
    return Load(n_rows, read_bytes, 0, 4 * n_shards, 2, busy_s=busy_s, memory_bytes=held_bytes)


def _evaluation_units(pipeline: Pipeline, store: Store) -> tuple[int, int]:
    """Return the stored rows that an SAE is measured on, and the tokens that go through the model."""
    n_rows = count_rows(pipeline, store, pipeline.held_out_indices)
    return n_rows, min(n_rows, MODEL_TOKENS)


def _held_bytes(pipeline: Pipeline, sae: SaeConfig) -> tuple[int, int]:
    """Return what an SAE's weights take, and what a batch of rows, latents, reconstructions and errors does."""
    d_in, d_out = (sum(pipeline.d_in(hook_point) for hook_point in names) for names in (sae.sources, sae.targets))
    skip = d_in * d_out if sae.task == "skip_transcoder" else 0
    return ((d_in + d_out) * sae.d_sae + skip) * 4, sae.batch_rows * (d_in + 3 * d_out + 2 * sae.d_sae) * 4


def _match(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.train.results.matches import match_saes

    return lambda _key: [match_saes(job.pipeline, job.store, job.progress.advance)]


def name_numbers(pairs: list[dict[str, Any]]) -> dict[str, Shown]:
    """Return what is known of pairs of SAEs, each number under its own name: `mean_cosine.a.b`."""
    named = ("mean_cosine", "mean_paired_cosine", "share_above_0.7", "share_above_0.9", "share_mutual")
    return {f"{name}.{pair['sae']}.{pair['other_sae']}": pair[name] for pair in pairs for name in named if pair.get(name) is not None}


def _matching_takes(pipeline: Pipeline, store: Store, _key: str) -> Load:
    matches = pipeline.config.matches
    assert matches
    saes = [pipeline.config.sae(name) for name in matches.saes]
    n_rows, n_pairs = min(matches.rows, count_rows(pipeline, store, pipeline.held_out_indices)), len(saes) * (len(saes) - 1) / 2
    held = [_held_bytes(pipeline, sae)[0] for sae in saes]
    largest = max(sae.d_sae for sae in saes)
    busy_s = n_pairs * (2 * n_rows * 2 * max(held) / 4 + 2 * largest * max(held) / 8) / ONE_WORKER.flops
    return Load(n_rows, sum(held), 0, len(saes), 1, busy_s=busy_s, memory_bytes=2 * max(held) + 4096 * largest * 16 + 4 * min(largest, 16_384) ** 2)


def _compare(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.train.sweep import make_sweep

    return lambda _key: [make_sweep(job.pipeline, job.store)]


def _show_sweep(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.train.plots import plot_curves, plot_pareto
    from interp_assets.train.reports import describe_sweep

    drawn = {"pareto": plot_pareto, "learning_curves": plot_curves, "saes": describe_sweep}
    return {name: Markdown(draw(job.store, made[0])) for name, draw in drawn.items()}
