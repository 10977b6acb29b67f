"""Records of features become what strengths are counted in: how high each latent fires, how often, and its quantiles."""

import io
from bisect import bisect_right
from functools import cache

import numpy as np
import polars as pl
import torch

from interp_assets.garcon.features import Firings
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import load_manifest, read_file, read_range
from interp_assets.storage.store import Store
from interp_assets.visualize.packing import ORDER, unpack_record
from interp_assets.visualize.records import FEATURES, INDEX, RECORDS
from interp_assets.visualize.refs import records_ref


def load_firings(pipeline: Pipeline, store: Store, name: str) -> Firings:
    """Read how the latents of an SAE fire. A quantile reads the one record that it is of, and is exact to a bin of a quarter octave.

    Raises `ArtifactMissingError` before the records are made.
    """
    paths = [records_ref(pipeline, name, latent_slice).path for latent_slice in range(pipeline.config.features.latent_slices)]
    manifests = [load_manifest(store, records_ref(pipeline, name, latent_slice)) for latent_slice in range(len(paths))]
    table = pl.concat([pl.read_parquet(io.BytesIO(read_file(store, *part, FEATURES))) for part in zip(paths, manifests, strict=True)]).sort("latent")
    starts = [int(manifest.facts["start"]) for manifest in manifests]

    @cache
    def order(place: int) -> np.ndarray:
        return np.frombuffer(read_file(store, paths[place], manifests[place], ORDER), "<u4")

    def quantile(latent: int, share: float) -> float:
        place = bisect_right(starts, latent) - 1
        part = (store, paths[place], manifests[place])
        first, last = np.frombuffer(read_range(*part, INDEX, 8 * (latent - starts[place]), 16), "<u8").tolist()
        member = read_range(*part, RECORDS, first, last - first)
        histogram = unpack_record(member, order(place), f"{store.url}/{paths[place]}/{RECORDS}, latent {latent},")["statistics"]["histogram"]
        counted = np.concatenate([[0], np.cumsum(histogram["counts"])])
        return float(np.interp(share * counted[-1], counted, histogram["edges"]))

    maximum, frequency = (torch.from_numpy(table[column].to_numpy().astype("float32")) for column in ("max", "frequency"))
    return Firings(maximum, frequency, quantile)
