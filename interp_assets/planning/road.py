"""The graph as data: all assets in order, which partitions each partition reads, and whether it was made from what is there now.

A road is made of the stages' records and knows none of them by name. It serves whoever asks "what is missing?" (the run loop), "what has to
wait for this?" (a backfill), "how much will there be?" (`interp plan`) and Dagster's definitions.

An artifact's id promises equal bytes on one kind of device only: a shard made again elsewhere may keep its id and change its digest. So artifacts
keep the digests of what they were made from (`Reads.remember`, `Asset.lineage`), and what was made from other bytes counts as missing.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from interp_assets.errors import ArtifactError, ConfigError, PlanError
from interp_assets.planning.asset import NONE, Asset, Key, Reads
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.storage.lineage import Digests, Lineage, is_kept, trace
from interp_assets.storage.manifest import ArtifactRef, Manifest, data_version, find_manifest
from interp_assets.storage.store import Store

Partition = tuple[str, str]
"""Name of an asset, and a partition of it (`""` without partitions)."""


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
        """Return the named assets, all when none is named; `+name` is one and all before it. Raises `ConfigError` for a name that there is not."""
        known = {asset.name: asset for asset in self._assets}
        if unknown := sorted({name.removeprefix("+") for name in names} - set(known)):
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"There is no asset {', '.join(map(repr, unknown))}; this pipeline has {', '.join(sorted(known))}.{hint}")
        chosen: set[str] = set()
        for name in names:
            chosen |= {item.name for item in self._up_to(known[name[1:]])} if name.startswith("+") else {name}
        return [asset for asset in self._assets if not names or asset.name in chosen]

    def _up_to(self, asset: Asset) -> list[Asset]:
        """Return an asset and all that it reads, directly or not."""
        found, due = [asset], [asset]
        while due:
            read = [self._by_key[item.key] for item in due.pop().reads]
            new = [item for item in read if not item.is_external and item not in found]
            found, due = found + new, due + new
        return found

    def check(self, pipeline: Pipeline, store: Store) -> None:
        """Raise `PlanError` with all that is known to stop an asset, before any work."""
        found = [sentence for asset in self._assets for sentence in asset.obstacles(pipeline, store)]
        if found:
            lead = "" if len(found) == 1 else f"{len(found)} things stand in the way, and nothing was begun:\n"
            raise PlanError(lead + "\n".join(found))

    def parents(self, asset: Asset, pipeline: Pipeline, key: str) -> set[Partition]:
        """Return the partitions that a partition reads."""
        return {(self._by_key[item.key].name, parent) for item in asset.reads for parent in self.parent_keys(asset, item, pipeline, key)}

    def awaited(self, asset: Asset, pipeline: Pipeline, key: str) -> set[Partition]:
        """Return the partitions without which a partition cannot be made."""
        needed = [item for item in asset.reads if item.is_needed]
        return {(self._by_key[item.key].name, parent) for item in needed for parent in self.parent_keys(asset, item, pipeline, key)}

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
                return [every[own[key] * len(every) // len(own)]] if every else []
            case _:
                return every

    def holds_anything(self, asset: Asset, pipeline: Pipeline, store: Store, key: str) -> bool:
        """Tell whether a partition has artifacts, there or not: a held-out shard has no share in the shuffle. What has no records of them counts."""
        try:
            return asset.plan is not None or bool(asset.artifacts(pipeline, store, key))
        except ArtifactError:
            return True

    def find_version(self, asset: Asset, pipeline: Pipeline, store: Store, key: str, known: Digests | None = None) -> str | None:
        """Return the data version of a partition when all its artifacts exist and were made from what is there now, else None.

        `known` keeps the digests of sources between partitions. Who asks for all assets in order with one `known` is also told None of what
        will be out of date as soon as something before it is made: an artifact made from other digests has another digest itself.
        """
        known = known or Digests(store)
        if (asset.key, key) not in known.versions:
            known.versions[asset.key, key] = self._find_version(asset, pipeline, store, key, known)
        return known.versions[asset.key, key]

    def _find_version(self, asset: Asset, pipeline: Pipeline, store: Store, key: str, known: Digests) -> str | None:
        try:
            refs = asset.artifacts(pipeline, store, key)
            manifests = [find_manifest(store, ref) for ref in refs]
            is_current = all(manifests)
            own = {ref.path: manifest for ref, manifest in zip(refs, manifests, strict=True)}
            for path, manifest in own.items():
                if manifest:
                    known.note(path, manifest.digest)
            for lineage in self.lineages(asset, pipeline, store, key, refs):
                is_current &= _is_current(lineage, own, known)
        except ArtifactError:
            return None
        return data_version([manifest for manifest in manifests if manifest]) if is_current else None

    def lineages(self, asset: Asset, pipeline: Pipeline, store: Store, key: str, refs: Sequence[ArtifactRef]) -> list[Lineage]:
        """List whose digests the artifacts `refs` of a partition keep, and any that lie between these and what the road lists."""
        if asset.lineage:
            return asset.lineage(pipeline, store, key)
        read = [item for item in asset.reads if item.is_remembered]
        may_be_gone = all(item.may_be_gone for item in read)
        return [Lineage(ref, self._sources(asset, read, ref, (pipeline, store, key)), may_be_gone=may_be_gone) for ref in refs] if read else []

    def _sources(self, asset: Asset, read: Sequence[Reads], ref: ArtifactRef, where: tuple[Pipeline, Store, str]) -> list[ArtifactRef]:
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
            return pipeline.remember(("sources", asset.key, ref.hook_point), collect)
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


def _is_current(lineage: Lineage, own: Mapping[str, Manifest | None], known: Digests) -> bool:
    """Say whether an artifact was made from the bytes that its sources have now, and keep; one that is not there has no say, and may change."""
    is_hidden = lineage.ref.path not in own
    manifest = find_manifest(known.store, lineage.ref) if is_hidden else own[lineage.ref.path]
    is_changing = any(source.path in known.changing for source in lineage.sources)
    if not is_changing and manifest:
        is_changing = not is_kept(manifest, trace(known, [lineage]))
    if is_changing:
        known.changing.add(lineage.ref.path)
    return not is_changing
