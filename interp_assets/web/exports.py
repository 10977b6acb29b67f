"""A bundle becomes files that other tools read: attribution-graph viewers, Neuronpedia, SAEDashboard.

    attribution-graph   features/<bundle>/<latent>.json             one JSON per feature (circuit-tracer and the graph viewers)
    neuronpedia         exports/<model>/<source>/...                JSONL: release, model, source set, source; features, activations
    saedashboard        batch-N.json, run_settings.json, ...        one JSON per batch of features

What such a format asks for and we do not measure (neuron alignment, correlated neurons) is left empty, never invented. Neighbours are decoder
cosines. Windows carry token strings there; a token that is half a character becomes U+FFFD. Dead features are skipped and counted.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any, Final, NamedTuple

from interp_assets.errors import InputError
from interp_assets.storage.store import Store
from interp_assets.web.opened import OpenBundle

BATCH: Final = 1024
"""Features per file of the batched formats; Neuronpedia's own number."""
CREATOR: Final = "interp-assets"


class Exported(NamedTuple):
    """What an export wrote."""

    n_features: int
    n_dead: int
    n_files: int
    n_bytes: int


class _File(NamedTuple):
    path: str
    data: bytes
    n_features: int


def export_bundle(bundle: OpenBundle, format_name: str, out: Store) -> Exported:
    """Write all live features of a bundle into `out` in another tool's format.

    Raises `InputError` with the names of the formats for an unknown one.
    """
    if format_name not in FORMATS:
        raise InputError(f"No export format is called {format_name!r}; there are {', '.join(sorted(FORMATS))}.")
    n_features, n_files, n_bytes = 0, 0, 0
    for file in FORMATS[format_name](bundle):
        out.put(file.path, file.data)
        n_features, n_files, n_bytes = n_features + file.n_features, n_files + 1, n_bytes + len(file.data)
    return Exported(n_features, int(bundle.description["d_sae"]) - n_features, n_files, n_bytes)


def attribution_graph_feature(bundle: OpenBundle, record: dict[str, Any]) -> dict[str, Any]:
    """Return one feature as attribution-graph viewers read it."""
    statistics, logits = record["statistics"], record["logits"] or {"top": [], "bottom": []}
    quantiles = [{"quantile_name": "Top activations", "examples": record["examples"]["top"]}]
    for low_to_high, part in enumerate(record["examples"]["intervals"]):
        quantiles.insert(1, {"quantile_name": f"Interval {low_to_high + 1}: {part['low']:g} to {part['high']:g}", "examples": part["examples"]})
    quantiles.append({"quantile_name": "Random activations", "examples": record["examples"]["random"]})
    return {
        "transcoder_id": _source(bundle),
        "index": record["latent"],
        "examples_quantiles": [{**part, "examples": [_graph_example(bundle, window) for window in part["examples"]]} for part in quantiles],
        "top_logits": [bundle.vocabulary.text(token) for token, _ in logits["top"]],
        "bottom_logits": [bundle.vocabulary.text(token) for token, _ in logits["bottom"]],
        "act_min": (statistics["quantiles"] or [0])[0],
        "act_max": statistics["max"],
        "quantile_values": statistics["quantiles"],
        "histogram": statistics["histogram"]["counts"],
        "activation_frequency": statistics["frequency"],
    }


def neuronpedia_feature(bundle: OpenBundle, record: dict[str, Any]) -> dict[str, Any]:
    """Return one line of Neuronpedia's `features/batch-N.jsonl`."""
    neighbours = record["neighbours"]
    return {
        "modelId": _model(bundle),
        "layer": _source(bundle),
        "index": str(record["latent"]),
        "creatorId": CREATOR,
        "createdAt": bundle.manifest.created,
        "maxActApprox": record["statistics"]["max"],
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": bundle.description["hook_point"],
        "topkCosSimIndices": [latent for latent, _ in neighbours],
        "topkCosSimValues": [cosine for _, cosine in neighbours],
        **_shared_lists(bundle, record),
        "umap_x": None,
        "umap_y": None,
        "umap_cluster": None,
        "umap_log_feature_sparsity": None,
    }


def neuronpedia_activation(bundle: OpenBundle, latent: int, window: dict[str, Any], group: "Group") -> dict[str, Any]:
    """Return one line of Neuronpedia's `activations/batch-N.jsonl`."""
    values = _dense(window)
    shard, row = window["row"]
    return {
        "id": f"{_source(bundle)}-{latent}-{group.kind}-{shard}-{row}",
        "tokens": _texts(bundle, window),
        "modelId": _model(bundle),
        "layer": _source(bundle),
        "index": str(latent),
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "values": values,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "binMin": group.low,
        "binMax": group.high,
        "binContains": group.share,
        "qualifyingTokenIndex": window["peak"],
        "dataIndex": f"{shard}-{row}",
        "dataSource": window["document"],
        "creatorId": CREATOR,
        "createdAt": bundle.manifest.created,
    }


def saedashboard_feature(bundle: OpenBundle, record: dict[str, Any]) -> dict[str, Any]:
    """Return one element of `features` in SAEDashboard's `batch-N.json`."""
    window_tokens = 2 * int(bundle.description["features"]["window"]) + 1
    return {
        "feature_index": record["latent"],
        **_shared_lists(bundle, record),
        "n_prompts_total": len(record["examples"]["random"]),
        "n_tokens_in_prompt": window_tokens,
        "dataset": bundle.description["corpus"]["source"],
        "activations": [
            {
                "bin_min": group.low,
                "bin_max": group.high,
                "bin_contains": group.share,
                "tokens": _texts(bundle, window),
                "values": _dense(window),
                "qualifying_token_index": window["peak"],
            }
            for group, window in _groups(bundle, record)
        ],
        "vector": [],
    }


class Group(NamedTuple):
    """Which list an example comes from, as binned formats tell it: -1 for the share of the top examples, by convention."""

    kind: str
    low: float
    high: float
    share: float


def _graph_example(bundle: OpenBundle, window: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens_acts_list": _dense(window),
        "train_token_ind": window["peak"],
        "is_repeated_datapoint": False,
        "tokens": _texts(bundle, window),
    }


def _shared_lists(bundle: OpenBundle, record: dict[str, Any]) -> dict[str, Any]:
    """Return the lists that Neuronpedia and SAEDashboard have in common. Histogram values are the middles of the bins."""
    logits = record["logits"] or {"top": [], "bottom": [], "histogram": {"low": 0.0, "high": 0.0, "counts": []}}
    histogram, spread = record["statistics"]["histogram"], logits["histogram"]
    step = (spread["high"] - spread["low"]) / max(1, len(spread["counts"]))
    empty = [f"{kind}_{part}" for kind in ("correlated_neurons", "correlated_features") for part in ("indices", "l1", "pearson")]
    return {
        **{f"neuron_alignment_{part}": [] for part in ("indices", "values", "l1")},
        **{key: [] for key in empty},
        "neg_str": [bundle.vocabulary.text(token) for token, _ in logits["bottom"]],
        "neg_values": [effect for _, effect in logits["bottom"]],
        "pos_str": [bundle.vocabulary.text(token) for token, _ in logits["top"]],
        "pos_values": [effect for _, effect in logits["top"]],
        "frac_nonzero": record["statistics"]["frequency"],
        "freq_hist_data_bar_values": [(low + high) / 2 for low, high in pairwise(histogram["edges"])],
        "freq_hist_data_bar_heights": histogram["counts"],
        "logits_hist_data_bar_values": [spread["low"] + (i + 0.5) * step for i in range(len(spread["counts"]))],
        "logits_hist_data_bar_heights": spread["counts"],
        "decoder_weights_dist": [],
    }


def _groups(bundle: OpenBundle, record: dict[str, Any]) -> Iterator[tuple[Group, dict[str, Any]]]:
    top = Group("top", -1, record["statistics"]["max"], -1)
    yield from ((top, window) for window in record["examples"]["top"])
    share = 1 / int(bundle.description["features"]["n_intervals"])
    for i, part in enumerate(record["examples"]["intervals"]):
        group = Group(f"interval-{i}", part["low"], part["high"], share)
        yield from ((group, window) for window in part["examples"])


def _live_records(bundle: OpenBundle) -> Iterator[dict[str, Any]]:
    return (record for record in bundle.records() if not record["is_dead"])


def _batches(bundle: OpenBundle) -> Iterator[list[dict[str, Any]]]:
    """Return the live records in batches of `BATCH`."""
    records = _live_records(bundle)
    while batch := list(islice(records, BATCH)):
        yield batch


def _export_attribution_graph(bundle: OpenBundle) -> Iterator[_File]:
    for record in _live_records(bundle):
        yield _File(f"features/{bundle.name}/{record['latent']}.json", _json(attribution_graph_feature(bundle, record)), 1)


def _export_neuronpedia(bundle: OpenBundle) -> Iterator[_File]:
    model, source, name = _model(bundle), _source(bundle), bundle.description["sae"]["name"]
    folder = f"exports/{model}/{source}"
    common = {"creatorId": CREATOR, "createdAt": bundle.manifest.created}
    yield _File(f"{folder}/release.jsonl", _lines([{"name": name, "description": f"{name}, made by interp-assets", **common}]), 0)
    yield _File(f"{folder}/model.jsonl", _lines([{"id": model, "displayName": bundle.description["model"]["name"], **common}]), 0)
    yield _File(f"{folder}/sourceset.jsonl", _lines([{"modelId": model, "name": name, "releaseName": name, **common}]), 0)
    yield _File(f"{folder}/source.jsonl", _lines([{"id": source, "modelId": model, "setName": name, **common}]), 0)
    for number, batch in enumerate(_batches(bundle)):
        examples = [neuronpedia_activation(bundle, record["latent"], window, group) for record in batch for group, window in _groups(bundle, record)]
        features = [neuronpedia_feature(bundle, record) for record in batch]
        yield _File(f"{folder}/features/batch-{number}.jsonl.gz", gzip.compress(_lines(features), mtime=0), len(features))
        yield _File(f"{folder}/activations/batch-{number}.jsonl.gz", gzip.compress(_lines(examples), mtime=0), 0)


def _export_saedashboard(bundle: OpenBundle) -> Iterator[_File]:
    layer = _layer(bundle)
    live: set[int] = set()
    for number, batch in enumerate(_batches(bundle)):
        live.update(record["latent"] for record in batch)
        features = [saedashboard_feature(bundle, record) for record in batch]
        head = {"model_id": _model(bundle), "layer": layer, "sae_set": bundle.description["sae"]["name"], "sae_id_suffix": None}
        yield _File(f"batch-{number}.json", _json({**head, "features": features}), len(features))
    settings = {"n_features_at_a_time": BATCH, "sae_set": bundle.description["sae"]["name"], **bundle.description["features"]}
    yield _File("run_settings.json", _json(settings), 0)
    dead = [latent for latent in range(int(bundle.description["d_sae"])) if latent not in live]
    yield _File("skipped_indexes.json", _json({"skipped_indexes": dead}), 0)


def _dense(window: dict[str, Any]) -> list[float]:
    values = [0.0] * len(window["tokens"])
    for place, activation in window["activations"]:
        values[place] = activation
    return values


def _texts(bundle: OpenBundle, window: dict[str, Any]) -> list[str]:
    return [bundle.vocabulary.text(token) for token in window["tokens"]]


def _model(bundle: OpenBundle) -> str:
    return bundle.description["model"]["name"].replace("/", "_").replace(":", "_")


def _layer(bundle: OpenBundle) -> int | None:
    digits = bundle.description["hook_point"].rpartition(".")[2]
    return int(digits) if digits.isdigit() else None


def _source(bundle: OpenBundle) -> str:
    """Name a source as Neuronpedia does: `<layer>-<set>`."""
    layer = _layer(bundle)
    return f"{bundle.description['hook_point'] if layer is None else layer}-{bundle.description['sae']['name']}"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _lines(values: list[dict[str, Any]]) -> bytes:
    return b"".join(_json(value) + b"\n" for value in values)


FORMATS: Final[dict[str, Callable[[OpenBundle], Iterator[_File]]]] = {
    "attribution-graph": _export_attribution_graph,
    "neuronpedia": _export_neuronpedia,
    "saedashboard": _export_saedashboard,
}
"""Every format that `interp export` writes."""
