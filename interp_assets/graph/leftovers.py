"""What lies in a pipeline's folder and nothing refers to becomes a list with sizes, and goes when somebody says so: `interp gc`.

    kept      what any named configuration, planned as `interp run` would now, or any plan in the folder leads to, older generations too
              every bundle, and the SAE that it shows; labels and comparisons; checkpoints of trainings that are not done
              what is younger than the age that is asked for: somebody may be writing it
    left over the other artifacts of kinds that assets make, or keep the digests of; checkpoints of finished trainings; files of no artifact

Configurations may share a folder. An SAE or a hook point in it that none of the named ones has is another's, so nothing is listed before its
configuration is named too, or it is said that it may go. Only what the store itself tells is believed: nothing is deleted by its age alone.
"""

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from interp_assets.errors import ArtifactError, ArtifactMissingError, InputError
from interp_assets.graph.stages import make_road
from interp_assets.harvest.refs import hook_folder
from interp_assets.planning.asset import Asset
from interp_assets.planning.config import PipelineConfig, SaeConfig, ShuffleConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline
from interp_assets.planning.probes import ProbesConfig
from interp_assets.planning.sections import HeadPrompt, HeadsConfig, MatchesConfig, Metric
from interp_assets.planning.steering import PairConfig, PatchingConfig, SearchConfig, SteeringConfig
from interp_assets.shuffle.generations import before, has_grown, newest
from interp_assets.storage.direct import find_remains
from interp_assets.storage.manifest import ArtifactRef, Manifest, read_manifest, remove_artifact
from interp_assets.storage.store import ObjectInfo, Store
from interp_assets.storage.verify import list_tree
from interp_assets.web.opened import OpenBundle, list_bundles, open_bundle

CHECKPOINT: Final = "sae_checkpoint"
TRY: Final = "try"
ENDED: Final = "sae_ended"
CODE: Final = "code"
TRUTH: Final = "planted_truth"
_PLANS: Final = ("plan.", ".json")
_OF_SAES: Final = ("sae", "sae_evaluation")


class Leftover(NamedTuple):
    """An artifact, or a file that belongs to none."""

    path: str
    kind: str
    """Of an artifact; empty for a file."""
    n_bytes: int


class Leftovers(NamedTuple):
    """What may go, and what was left out because it is young."""

    items: list[Leftover]
    n_young: int
    remains: list[Path]
    """Files of writers that were killed, which no listing shows."""

    @property
    def n_bytes(self) -> int:
        """Size of all that may go."""
        return sum(item.n_bytes for item in self.items) + sum(path.stat().st_size for path in self.remains)


def find_leftovers(
    store: Store, pipelines: Sequence[Pipeline], *, min_age: timedelta, forget: Sequence[str] = (), now: datetime | None = None
) -> Leftovers:
    """List what nothing refers to. `pipelines`: every configuration that uses the folder, planned; `forget`: SAEs and hook points that may go.

    Raises `InputError` that names SAEs and hook points of configurations that are not named, and when a plan or manifest cannot be read.
    """
    now = now or datetime.now(UTC)
    refs = {ref.path: ref for pipeline in _all_plans(store, pipelines) for ref in _reachable(pipeline, store)}
    tree = list_tree(store)
    manifests = {path: _read(store, path) for path in tree.artifacts}
    kept = {*refs, *_shown(store, manifests)}
    _refuse_unknown(manifests, [pipeline.config for pipeline in pipelines], forget, kept)
    kinds = {ref.kind for ref in refs.values()} | {kind for pipeline in pipelines for kind in known_kinds(pipeline, store)}
    published = {manifest.artifact_id for manifest in manifests.values() if manifest}
    wanted = {ref.artifact_id for ref in refs.values()} - published
    found = [
        Leftover(path, manifest.kind if manifest else "damaged", sum(item.n_bytes for item in tree.artifacts[path]))
        for path, manifest in sorted(manifests.items())
        if path not in kept and _may_go(manifest, kinds, wanted)
    ]
    found += [Leftover(item.path, "", item.n_bytes) for item in tree.strays if not _is_plan(item) and not _is_inside(item.path, kept)]
    times = store.list_times()
    old = [item for item in found if all(now - at >= min_age for path, at in times.items() if path == item.path or path.startswith(f"{item.path}/"))]
    local = store.local_path()
    return Leftovers(old, len(found) - len(old), find_remains(local) if local else [])


def known_kinds(pipeline: Pipeline, store: Store) -> set[str]:
    """Return the kinds of artifacts that assets make and keep the digests of, checkpoints, tries, failures, code and truth, switched off or not."""
    sae = SaeConfig(name="any", hook_point=pipeline.config.harvest.hook_points[0])
    features = pipeline.config.features.model_copy(update={"saes": [sae.name]})
    changes: dict[str, Any] = {"saes": [sae], "features": features, "shuffle": ShuffleConfig(passes=3, fan_out=2)}
    changes |= {"heads": HeadsConfig(prompts={"any": HeadPrompt(text="text", logits=["a"])}), "metrics": [Metric(function="any.py:any")]}
    changes |= {"matches": MatchesConfig(saes=[sae.name, sae.name]), "probes": ProbesConfig()}
    recipes: dict[str, list[dict[str, Any]]] = {"any": [{"sae": sae.name, "latent": 0, "clamp": "1 max"}]}
    changes["steering"] = SteeringConfig(recipes=recipes, search=SearchConfig(), prompts=["text"])
    changes["patching"] = [PatchingConfig(name="any", pairs=[PairConfig(clean="a", corrupted="b", answer="c")])]
    full, found = Pipeline(pipeline.config.model_copy(update=changes), pipeline.plan), {CHECKPOINT, TRY, ENDED, CODE, TRUTH}
    road = make_road(full.config)
    for asset in road.rest:
        kinds = ({ref.kind for ref in _refs_of(asset, full, store, key)} for key in asset.partition_keys(full))
        found |= next((some for some in kinds if some), set())
    return found


def delete_leftovers(store: Store, found: Leftovers) -> None:
    """Delete what was listed, of an artifact its manifest first, and folders that are empty then."""
    for item in found.items:
        if item.kind:
            remove_artifact(store, item.path)
        else:
            store.delete([item.path])
    for path in found.remains:
        path.unlink(missing_ok=True)
    if root := store.local_path():
        for path in [*(root / item.path for item in found.items), *found.remains]:
            _remove_empty(root, path)


def _remove_empty(root: Path, path: Path) -> None:
    """Remove the folders at and above a path that are empty, up to the store's own, which stays."""
    inner = sorted((folder for folder in path.rglob("*") if folder.is_dir()), reverse=True) if path.is_dir() else []
    for folder in [*inner, path, *path.parents]:
        if root not in folder.parents:
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            try:
                folder.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return


def _all_plans(store: Store, pipelines: Sequence[Pipeline]) -> Iterator[Pipeline]:
    """Yield the pipelines as they are planned now, and as the plans in the folder have them: candidates, and what is not planned anew yet."""
    names = [item.path for item in store.list() if _is_plan(item)]
    for pipeline in pipelines:
        yield pipeline
        for name in names:
            config = pipeline.config
            yield load_pipeline(config.model_copy(update={"execution": config.execution.model_copy(update={"plan": name})}), store)


def _reachable(pipeline: Pipeline, store: Store) -> Iterator[ArtifactRef]:
    """Yield all artifacts of a pipeline, of its generations and of each generation alone: the newer are merged into the older."""
    road = make_road(pipeline.config)
    parts = [pipeline]
    while has_grown(parts[-1]):
        parts.append(before(parts[-1]))
    for part in [*parts, *(newest(part) for part in parts if has_grown(part))]:
        for asset in road.rest:
            for key in asset.partition_keys(part):
                yield from _refs_of(asset, part, store, key)


def _refs_of(asset: Asset, pipeline: Pipeline, store: Store, key: str) -> list[ArtifactRef]:
    """List the artifacts of a partition, and those whose digests they keep: some lie between assets, and no asset lists them."""
    try:
        lineages = asset.lineage(pipeline, store, key) if asset.lineage else []
        return [*asset.artifacts(pipeline, store, key), *(ref for lineage in lineages for ref in (lineage.ref, *lineage.sources))]
    except ArtifactMissingError:
        return []  # its inputs are not there, so what lies there was made of others


def _shown(store: Store, manifests: dict[str, Manifest | None]) -> Iterator[str]:
    """Yield the bundles that there are, and the SAEs that they show."""
    by_id = {manifest.artifact_id: path for path, manifest in manifests.items() if manifest}
    for place in list_bundles(store):
        yield place.path
        bundle = open_bundle(place)
        if isinstance(bundle, OpenBundle) and (path := by_id.get(bundle.description["sae"]["artifact_id"])):
            yield path


def _refuse_unknown(manifests: dict[str, Manifest | None], configs: Sequence[PipelineConfig], forget: Sequence[str], kept: Iterable[str]) -> None:
    """Raise `InputError` when SAEs or hook points lie there that no configuration has: they are another configuration's."""
    kept = set(kept)
    known = {sae.name for config in configs for sae in config.saes} | set(forget)
    points = {hook_folder(name) for config in configs for name in config.harvest.hook_points} | set(map(hook_folder, forget))
    unknown: set[str] = set()
    for path, manifest in manifests.items():
        folders, label = path.split("/"), path.rpartition("/")[2].rpartition("-")[0].removesuffix(".evaluation")
        if manifest is None or path in kept:
            continue
        if manifest.kind in _OF_SAES and label not in known:
            unknown.add(label)
        if manifest.kind in ("activation_shard", "mixed_shard", "split_shard") and folders[1] not in points:
            unknown.add(folders[1])
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InputError(
            f"There are artifacts of {names}, which no named configuration has: they may be another one's, and nothing was listed. Name "
            "every configuration that uses this folder (--config, once for each), or say what may go: "
            f"{' '.join(f'--forget {name}' for name in sorted(unknown))}"
        )


def _may_go(manifest: Manifest | None, kinds: set[str], wanted: set[str]) -> bool:
    """Tell whether an artifact that nothing refers to is of a kind that is made again from others, and no training's that is not done."""
    return manifest is not None and manifest.kind in kinds and not (manifest.kind == CHECKPOINT and wanted & set(manifest.inputs.values()))


def _read(store: Store, path: str) -> Manifest | None:
    try:
        return read_manifest(store, path)
    except ArtifactError:
        return None  # damaged: `interp verify` says so, and a run makes it again


def _is_plan(item: ObjectInfo) -> bool:
    return "/" not in item.path and item.path.startswith(_PLANS[0]) and item.path.endswith(_PLANS[1])


def _is_inside(path: str, kept: set[str]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in kept)
