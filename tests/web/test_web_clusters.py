"""Clusters of the map have the names that were planted, and chance has none."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import open_store
from interp_assets.web.clusters import CLUSTERS, find_clusters, hold_tokens, surprise, write_clusters

NO_WORD = 0xFFFFFFFF
TEXTS = [" import", "Import", "import", "\n", "\n    ", *(f" word{i}" for i in range(200))]


def _scatter(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return latents all over the map with four tokens of each kind, by chance."""
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 65536, (2, n)).astype(np.uint16)
    words = generator.integers(5, len(TEXTS), (n, 2, 4)).astype(np.uint32)
    words[generator.random((n, 2, 4)) < 0.2] = NO_WORD
    return x, y, words


def _plant(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gather 60 latents that fire on one word, and 40 that raise a new line, at two places."""
    x, y, words = _scatter(3000, seed)
    generator = np.random.default_rng(seed + 1)
    for rows, place in ((slice(0, 60), (20_000, 50_000)), (slice(60, 100), (55_000, 9_000))):
        x[rows], y[rows] = (np.clip(generator.normal(at, 600, rows.stop - rows.start), 0, 65535).astype(np.uint16) for at in place)
    words[:60, 0, 1] = generator.choice([0, 0, 0, 1, 2], 60)
    words[60:100, 1, 0] = 3
    return x, y, words


def test_what_was_planted_is_named_where_it_was_planted() -> None:
    """The commonest spelling stands for all, and what is raised is told from what is fired on."""
    found = find_clusters(*_plant(), TEXTS)
    assert {tuple(name) for item in found for name in item["names"]} == {("peaks", " import"), ("raised", "\n")}
    for item in found:
        place = (20_000, 50_000) if item["names"][0][0] == "peaks" else (55_000, 9_000)
        assert abs(item["x"] - place[0]) < 500
        assert abs(item["y"] - place[1]) < 500
        assert item["n_latents"] >= 40
    assert found[0]["cells"] == 8  # seen from far away already


@pytest.mark.parametrize("n", [0, 7, 300, 5000])
def test_chance_has_no_name(n: int) -> None:
    """A map without meaning must not look as if it had some: twenty of them, each with a chance of 1 % at most of a single name."""
    assert [find_clusters(*_scatter(n, seed), TEXTS) for seed in range(20 if n < 1000 else 3)].count([]) == (20 if n < 1000 else 3)


def test_dense_places_without_tokens_of_their_own_have_no_name() -> None:
    """That features stand close says nothing of what they mean."""
    x, y, words = _scatter(3000, 3)
    x[:500], y[:500] = x[:500] // 40 + 30_000, y[:500] // 40 + 30_000
    assert find_clusters(x, y, words, TEXTS) == []


@settings(max_examples=200)
@given(st.integers(20, 400), st.data())
def test_the_bound_holds_for_draws_without_replacement(n_all: int, data) -> None:
    """Names stand on it: the exact probability is never larger."""
    n_having, n_drawn = data.draw(st.integers(1, n_all)), data.draw(st.integers(1, n_all))
    n = data.draw(st.integers(0, min(n_having, n_drawn)))
    bound = np.exp(-surprise(np.array([n]), np.array([n_drawn * n_having / n_all])))[0]
    assert hypergeom.sf(n - 1, n_all, n_having, n_drawn) <= bound * (1 + 1e-9)


def test_a_latent_has_a_token_once_however_it_is_spelled() -> None:
    """Three spellings among its top tokens are no three witnesses; white space alone keeps its kind."""
    words = np.full((3, 2, 4), NO_WORD, np.uint32)
    words[0, 0], words[1, 0, :2], words[1, 1, 0] = [0, 1, 2, 3], [3, 4], 0
    held = hold_tokens(words, TEXTS)
    assert held.starts.tolist() == [0, 2, 5, 5]
    n_tokens = len(held.totals) // 2
    assert held.tokens.tolist() == [0, 1, 1, 2, n_tokens]
    assert held.totals[[0, 1, 2, n_tokens]].tolist() == [1, 2, 1, 1]


def test_the_file_is_the_same_for_the_same_map_and_names_are_text() -> None:
    """Same inputs, same bytes."""
    written = []
    for run in range(2):
        store, ref = open_store(f"memory://clusters-{run}"), make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="clusters")
        with create_artifact(store, ref) as art:
            facts = write_clusters(art, *_plant(), TEXTS)
        written.append(store.get(f"{ref.path}/{CLUSTERS}"))
    assert written[0] == written[1]
    content = json.loads(written[0])
    assert facts == {"n_clusters": len(content["clusters"])}
    assert (content["format"], content["version"]) == ("interp-assets/map-clusters", 1)
