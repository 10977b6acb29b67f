"""The graph as data: all assets in order, which partitions each partition reads, and whether it was made from what is there now.

A road is made of the stages' records and knows none of them by name. It serves whoever asks "what is missing?" (the run loop), "what has to
wait for this?" (a backfill), "how much will there be?" (`interp plan`) and Dagster's definitions.

An artifact's id promises equal bytes on one kind of device only: a shard made again elsewhere may keep its id and change its digest. So artifacts
keep the digests of what they were made from (`Reads.remember`), and what was made from other bytes counts as missing (`find_version`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from interp_assets.errors import ArtifactError, ConfigError, PlanError
from interp_assets.planning.asset import NONE, Asset, Key, Reads
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.storage.manifest import ArtifactRef, Manifest, combine_ids, data_version, find_manifest, load_manifest
from interp_assets.storage.store import Store

Partition = tuple[str, str]
"""Name of an asset, and a partition of it (`""` without partitions)."""
MADE_FROM: Final = "made_from"


class Road:
    """The assets that are made, in order, each after those it reads; `outside` are those that it only knows of."""

    def __init__(self, assets: Sequence[Asset]) -> None:
        self.outside = [asset for asset in assets if asset.is_external]
        self._assets = [asset for asset in assets if not asset.is_external]
        self._by_key = {asset.key: asset for asset in assets}

    def __iter__(self) -> Iterator[Asset]:
        """Go through the assets that are made, the plan first."""
        return iter(self._assets)

    @property
    def plan(self) -> Asset:
        """The asset that makes the plan."""
        return next(asset for asset in self._assets if asset.plan)

    @property
    def rest(self) -> list[Asset]:
        """All assets after the plan."""
        return [asset for asset in self._assets if not asset.plan]

    def get(self, key: Key) -> Asset:
        """Return the asset with a key. Raises `KeyError`."""
        return self._by_key[key]

    def find(self, name: str) -> Asset:
        """Return the asset that people call `name`. Raises `ConfigError` with the names there are."""
        self.select([name])
        return self._by_key[tuple(name.split("/"))]

    def select(self, names: Sequence[str]) -> list[Asset]:
        """Return the named assets, all when none is named. Raises `ConfigError` for a name that there is not."""
        known = {asset.name for asset in self._assets}
        if unknown := sorted(set(names) - known):
            raise ConfigError(f"There is no asset {', '.join(map(repr, unknown))}; this pipeline has {', '.join(sorted(known))}.")
        return [asset for asset in self._assets if not names or asset.name in set(names)]

    def check(self, pipeline: Pipeline, store: Store) -> None:
        """Raise `PlanError` with all that is known to stop an asset, before any work."""
        found = [sentence for asset in self._assets for sentence in asset.obstacles(pipeline, store)]
        if found:
            lead = "" if len(found) == 1 else f"{len(found)} things stand in the way, and nothing was begun:\n"
            raise PlanError(lead + "\n".join(found))

    def parents(self, asset: Asset, pipeline: Pipeline, key: str) -> set[Partition]:
        """Return the partitions that a partition reads."""
        return {(self._by_key[item.key].name, parent) for item in asset.reads for parent in self.parent_keys(asset, item, pipeline, key)}

    def parent_keys(self, asset: Asset, item: Reads, pipeline: Pipeline, key: str) -> Sequence[str]:
        """List the partitions of an earlier asset that partition `key` of `asset` reads, in order."""
        parent = self._by_key[item.key]
        every = pipeline.remember(("partitions", item.key), lambda: parent.partition_keys(pipeline))
        match item.how:
            case "same":
                return [key]
            case "training":
                return pipeline.remember("training partitions", lambda: [shard_key(index) for index in pipeline.train_indices])
            case "only":
                return [name for name in item.partitions if name in every]
            case "same_shard" | "same_slice":
                return _along(asset, parent, 1 if item.how == "same_shard" else 0, pipeline, key)
            case "parent_bucket":
                own = pipeline.remember(("places", asset.key), lambda: {name: i for i, name in enumerate(asset.partition_keys(pipeline))})
                return [every[own[key] * len(every) // len(own)]]
            case _:
                return every

    def holds_anything(self, asset: Asset, pipeline: Pipeline, store: Store, key: str) -> bool:
        """Tell whether a partition has artifacts, there or not: a held-out shard has no share in the shuffle. What has no records of them counts."""
        try:
            return asset.plan is not None or bool(asset.artifacts(pipeline, store, key))
        except ArtifactError:
            return True

    def find_version(self, asset: Asset, pipeline: Pipeline, store: Store, key: str, known: dict[str, Manifest] | None = None) -> str | None:
        """Return the data version of a partition when all its artifacts exist and were made from what is there now, else None.

        `known` keeps the manifests of inputs between the partitions of one asset.
        """
        known = {} if known is None else known
        try:
            refs = asset.artifacts(pipeline, store, key)
            manifests = [find_manifest(store, ref) for ref in refs]
            for ref, manifest in zip(refs, manifests, strict=True):
                if manifest is None or not self._is_current(asset, ref, manifest, (pipeline, store, key), known):
                    return None
        except ArtifactError:
            return None
        return data_version([manifest for manifest in manifests if manifest])

    def _is_current(self, asset: Asset, ref: ArtifactRef, manifest: Manifest, where: tuple[Pipeline, Store, str], known: dict[str, Manifest]) -> bool:
        """Say whether an artifact was made from the bytes that its inputs have now."""
        pipeline, store, _ = where
        remembering = [item for item in asset.reads if item.remembered and (item.counts is None or item.counts(pipeline))]
        for fact in dict.fromkeys(item.remembered for item in remembering):
            read = [item for item in remembering if item.remembered == fact]
            inputs = self._inputs(asset, read, ref, where)
            try:
                digests = [_load(store, item, known).digest for item in inputs]
            except ArtifactError:
                if all(item.may_be_gone for item in read):
                    continue
                raise
            if digests and manifest.facts.get(fact) != (combine_ids(digests) if fact == MADE_FROM else digests[0]):
                return False
        return True

    def _inputs(self, asset: Asset, read: Sequence[Reads], ref: ArtifactRef, where: tuple[Pipeline, Store, str]) -> list[ArtifactRef]:
        """List the artifacts that one artifact was made from: those of its own hook point, axis by axis, partition by partition."""
        pipeline, store, key = where

        def collect() -> list[ArtifactRef]:
            axes = list(dict.fromkeys(self._by_key[item.key].axis.name for item in read))
            found: list[tuple[tuple[int, int], list[ArtifactRef]]] = []
            for item in read:
                parent = self._by_key[item.key]
                group, keys = axes.index(parent.axis.name), self.parent_keys(asset, item, pipeline, key)
                found += [((group, place), parent.artifacts(pipeline, store, parent_key)) for place, parent_key in enumerate(keys)]
            ordered = [source for _, refs in sorted(found, key=lambda pair: pair[0]) for source in refs]
            return [source for source in ordered if not source.hook_point or not ref.hook_point or source.hook_point == ref.hook_point]

        if all(item.how in ("whole", "every", "training", "only") for item in read):  # the same for all partitions
            return pipeline.remember(("inputs", asset.key, read[0].remembered, ref.hook_point), collect)
        return collect()


def named(assets: Sequence[Asset], stage: str) -> list[Asset]:
    """Return a stage's assets with its name."""
    return [replace(asset, stage=stage) for asset in assets]


def group_siblings(assets: Sequence[Asset]) -> list[list[Asset]]:
    """Join assets without partitions that follow each other, have the same name behind what they are of, and do not read each other.

    `features/a/feature_browser` and `features/b/feature_browser` can be made side by side; every other asset stands alone.
    """
    groups: list[list[Asset]] = []
    for asset in assets:
        before = groups[-1] if groups else []
        is_alike = all(other.axis is asset.axis is NONE and other.can_spread and other.key[-1] == asset.key[-1] for other in before)
        if before and asset.can_spread and is_alike and not {item.key for item in asset.reads} & {other.key for other in before}:
            before.append(asset)
        else:
            groups.append([asset])
    return groups


def _along(asset: Asset, parent: Asset, dimension: int, pipeline: Pipeline, key: str) -> list[str]:
    """List the partitions of `parent` that agree with `key` in a dimension (0 slice, 1 shard): of a grid all others along its other dimension."""
    own = key.split("|")[dimension] if asset.axis.dimensions else key
    if not parent.axis.dimensions:
        return [own]
    others = parent.axis.dimensions[1 - dimension].keys(pipeline)
    return [f"{own}|{other}" if dimension == 0 else f"{other}|{own}" for other in others]


def _load(store: Store, ref: ArtifactRef, known: dict[str, Manifest]) -> Manifest:
    if ref.path not in known:
        known[ref.path] = load_manifest(store, ref)
    return known[ref.path]
