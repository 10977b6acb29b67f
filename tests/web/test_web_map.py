"""Decoder directions become tiles: every live latent once, coarse tiles a fair sample, axes as the textbook has them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import open_store
from interp_assets.web.map import (
    DIRECTIONS,
    MAX_DEPTH,
    POINT,
    TILE,
    Layout,
    embed_directions,
    measure_kept,
    place_points,
    write_directions,
    write_map,
)


def _write(layout: Layout, frequency: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict]:
    store = open_store("memory://map")
    ref = make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="map")
    with create_artifact(store, ref) as art:
        facts = write_map(art, layout, place_points(layout, frequency))
    points = np.frombuffer(store.get(f"{ref.path}/map/tiles.bin"), POINT)
    return points, np.frombuffer(store.get(f"{ref.path}/map/tiles.idx"), "<u4").reshape(-1, 5), facts


@settings(max_examples=20)
@given(st.integers(0, 12_000), st.integers(0, 2**32), st.booleans())
def test_every_live_latent_is_in_one_tile_that_holds_its_place(n: int, seed: int, is_clumped: bool) -> None:
    """A point outside its tile would vanish from some views; one that is there twice would be drawn too strong."""
    generator = np.random.default_rng(seed)
    xy = np.zeros((n, 2), np.float32) if is_clumped else generator.normal(0, 1, (n, 2)).astype(np.float32)
    frequency = np.where(generator.random(n) < 0.9, generator.random(n), 0).astype(np.float32)
    points, tiles, facts = _write(Layout(xy, "test", None), frequency)
    assert sorted(points["latent"].tolist()) == np.flatnonzero(frequency > 0).tolist()
    assert facts["n_points"] == tiles[:, 4].sum() == len(points)
    for depth, x, y, first, count in tiles.tolist():
        inside = points[first : first + count]
        assert (inside["x"].astype(int) * 2**depth // 65536 == x).all()
        assert (inside["y"].astype(int) * 2**depth // 65536 == y).all()
        assert 0 < count <= (TILE if depth < MAX_DEPTH else n)


def test_the_first_tile_is_a_sample_of_the_whole_map() -> None:
    """Zoomed out, a map of ten million must look like the map."""
    n = 60_000
    left = np.arange(n) < n // 4  # a quarter of the latents, all with low numbers, stands on the left
    xy = np.stack([np.where(left, 0.0, 1.0), np.linspace(0, 1, n)], 1).astype(np.float32)
    points, tiles, _ = _write(Layout(xy, "test", None), np.ones(n, np.float32))
    assert tiles[0].tolist() == [0, 0, 0, 0, TILE]
    share = (points["x"][:TILE] == 0).mean()
    assert share == pytest.approx(0.25, abs=0.05)  # five standard deviations


def test_axes_are_the_principal_components_of_the_unit_rows() -> None:
    """Against NumPy's singular values, up to sign; lengths of decoder rows must not matter."""
    generator = np.random.default_rng(0)
    W = (generator.normal(0, 1, (3000, 12)) * np.linspace(3, 0.5, 12)).astype(np.float32)
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    found = embed_directions(W * generator.uniform(0.1, 9, (3000, 1)).astype(np.float32))
    for axis in range(2):
        wanted = centred @ axes[axis]
        assert abs(np.corrcoef(found.xy[:, axis], wanted)[0, 1]) > 1 - 1e-6
    assert found.variance_share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum(), abs=1e-4)
    assert embed_directions(W).xy.tobytes() == embed_directions(W).xy.tobytes()


def test_directions_keep_their_cosines() -> None:
    """Any two features are compared by a byte a number; what comes of it is the exact cosine to the digits that are shown."""
    W_dec = np.random.default_rng(0).normal(0, 1, (64, 256)).astype(np.float32) * np.geomspace(1e-3, 1e3, 64, dtype=np.float32)[:, None]
    W_dec[1] = 0.7 * W_dec[0] * 1e3 + 0.1 * W_dec[1]
    W_dec[2] = 0
    store, ref = open_store("memory://directions"), make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="directions")
    with create_artifact(store, ref) as art:
        assert write_directions(art, W_dec) == {"width": 256}
    rows = np.frombuffer(store.get(f"{ref.path}/{DIRECTIONS}"), np.int8).reshape(64, 256).astype(float)
    exact, found = (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30) for values in (W_dec.astype(float), rows))
    assert np.abs(exact @ exact.T - found @ found.T).max() < 0.003
    assert (exact @ exact.T)[0, 1] > 0.5


def test_one_dimension_has_a_map_too() -> None:
    """A degenerate SAE is no reason to fail a bundle."""
    found = embed_directions(np.ones((5, 1), np.float32))
    assert found.xy.shape == (5, 2)


def test_neighbours_that_are_kept_are_counted() -> None:
    """The page says what a map is worth: all of it where directions have two dimensions, chance where they have many."""
    generator = np.random.default_rng(0)
    angles = generator.uniform(0, 1, 1500)
    arc = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    latents = np.arange(1500, dtype=np.uint32)
    kept = measure_kept(embed_directions(arc), arc, latents)
    assert kept
    assert kept["near_share"] == pytest.approx(15 / 1499, abs=1e-4)
    assert kept["kept"] > 0.99
    many = generator.normal(0, 1, (1500, 256)).astype(np.float32)
    lost = measure_kept(embed_directions(many), many, latents)
    assert lost
    assert lost["kept"] < 0.05
    unlike = measure_kept(Layout(generator.normal(0, 1, (1500, 2)).astype(np.float32), "test", None), arc, latents)
    assert unlike
    assert unlike["kept"] == pytest.approx(unlike["near_share"], abs=0.01)  # 2,560 draws: five standard deviations
    assert measure_kept(embed_directions(arc), arc, latents[:11]) is None


def test_of_some_latents_only_these_are_neighbours() -> None:
    """Dead latents have decoder rows, too, and are not on the map."""
    generator = np.random.default_rng(1)
    W_dec = generator.normal(0, 1, (400, 8)).astype(np.float32)
    layout = embed_directions(W_dec)
    chosen = generator.permutation(400)[:300].astype(np.uint32)
    unit = W_dec[chosen].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    shares = []
    for i in range(256):
        others = np.delete(np.arange(300), i)
        nearest = others[np.argsort(-(unit[others] @ unit[i]))[:10]]
        near = others[np.argsort(np.linalg.norm(layout.xy[chosen][others] - layout.xy[chosen[i]], axis=1))[:10]]
        shares.append(len(set(nearest.tolist()) & set(near.tolist())) / 10)
    found = measure_kept(layout, W_dec, chosen)
    assert found
    assert found["kept"] == pytest.approx(np.mean(shares), abs=1e-4)
