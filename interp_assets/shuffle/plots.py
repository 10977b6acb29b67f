"""Certificates of the shuffle become pictures."""

import json

from interp_assets.planning.plots import COLOUR, as_markdown, make_figure, use_log
from interp_assets.storage.manifest import Produced, read_file
from interp_assets.storage.store import Store


def plot_certificate(store: Store, certificate: Produced) -> str:
    """Draw how often rows at a distance are of one document, against chance."""
    content = json.loads(read_file(store, certificate.ref.path, certificate.manifest, "certificate.json"))
    figure, axes = make_figure("distance in rows", "same document, z score")
    lags = content["lags"]
    axes.plot([item["lag"] for item in lags], [item["z"] for item in lags], "o-", color=COLOUR, markersize=4)
    axes.axhspan(-3, 3, color=COLOUR, alpha=0.12)
    use_log(axes, "x", base=2)
    return as_markdown(figure, "Autocorrelation of documents in the mixed rows")
