"""Statistics of activations become pictures."""

import numpy as np
from safetensors.numpy import load as load_arrays

from interp_assets.compute.octaves import bin_edges
from interp_assets.planning.plots import COLOUR, as_markdown, make_figure, use_log
from interp_assets.storage.manifest import Produced, read_file
from interp_assets.storage.store import Store


def plot_norms(store: Store, statistics: Produced) -> str:
    """Draw the histogram of activation norms at one hook point."""
    arrays = load_arrays(read_file(store, statistics.ref.path, statistics.manifest, "statistics.safetensors"))
    counts, edges = arrays["norm_histogram"], bin_edges()
    first, last = np.flatnonzero(counts)[[0, -1]] if counts.any() else (0, len(counts) - 1)
    shown = slice(max(0, first - 1), last + 2)
    figure, axes = make_figure("norm of an activation", "rows")
    edges = edges[shown.start : shown.stop + 1]
    axes.bar(edges[:-1], counts[shown], width=np.diff(edges), align="edge", color=COLOUR, edgecolor="white", linewidth=0.3)
    use_log(axes, "x", base=2)
    return as_markdown(figure, "Histogram of activation norms")
