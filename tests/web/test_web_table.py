"""Lists of features: sorting, filtering, searching and stepping agree with the obvious way of doing each."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from interp_assets.errors import InputError
from interp_assets.store import open_store
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.search import FeatureWords, build_index, search_latents
from interp_assets.web.synthetic import build_synthetic_bundle
from interp_assets.web.table import FeatureTable, Query


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> OpenBundle:
    """Return an invented bundle of 40 features in a folder."""
    store = open_store(str(tmp_path_factory.mktemp("bundle")))
    build_synthetic_bundle(store, n_features=40, n_documents=12)
    return OpenBundle(list_bundles(store)[0])


@pytest.fixture(scope="module")
def table(bundle: OpenBundle) -> FeatureTable:
    """Return its table."""
    return bundle.table()


@pytest.fixture(scope="module")
def frame(bundle: OpenBundle) -> pl.DataFrame:
    """Return the same rows, for the obvious way."""
    return pl.read_parquet(bundle.read("features.parquet"))


@pytest.mark.parametrize("column", ["latent", "frequency", "max", "top_token", "is_dead"])
@pytest.mark.parametrize("is_descending", [False, True])
def test_sorting_is_total_and_ties_stand_in_order_of_latent(table: FeatureTable, frame: pl.DataFrame, column: str, is_descending: bool) -> None:
    """Pages of one list must neither repeat nor lose a feature."""
    order = table.order(Query(column, is_descending)).tolist()
    rows = frame.to_dicts()
    wanted = sorted(range(40), key=lambda i: rows[i][column], reverse=is_descending)  # stable, also in reverse
    assert order == wanted
    pages = [row["latent"] for offset in range(0, 40, 7) for row in table.page(Query(column, is_descending), offset, 7).rows]
    assert pages == wanted


def test_filters_are_conjunctions(table: FeatureTable, frame: pl.DataFrame) -> None:
    """Several bounds narrow the list together."""
    found = table.order(Query(filters=("frequency>=0.02", "max<6", "count>10"), life="live")).tolist()
    wanted = frame.filter((pl.col("frequency") >= 0.02) & (pl.col("max") < 6) & (pl.col("count") > 10) & ~pl.col("is_dead"))
    assert found == wanted["latent"].to_list()


def test_dead_and_live_are_a_partition(table: FeatureTable) -> None:
    """Every 13th invented feature is dead."""
    dead, live = (table.order(Query(life=life)).tolist() for life in ("dead", "live"))
    assert dead == [12, 25, 38]
    assert sorted(dead + live) == list(range(40))


@pytest.mark.parametrize(
    ("query", "text"),
    [
        (Query("weight"), "Cannot sort by 'weight'; the table has"),
        (Query(filters=("top_token>=1",)), "Cannot filter by 'top_token'; the numeric columns are"),
        (Query(filters=("max>=3; drop table",)), "is no filter; they look like"),
        (Query(filters=("max>=1",) * 17), "17 filters were given, at most 16"),
        (Query(life="undead"), "'undead' is none of all, live and dead"),
        (Query(text="x" * 201), "has 201 characters, at most 200"),
    ],
)
def test_queries_that_make_no_sense_are_explained(table: FeatureTable, query: Query, text: str) -> None:
    """The message says what there is to choose from."""
    with pytest.raises(InputError, match=text):
        table.page(query, 0, 10)


def test_pages_are_bounded(table: FeatureTable) -> None:
    """Nobody asks for ten million rows at once."""
    for offset, limit in ((0, 501), (-1, 10), (0, 0)):
        with pytest.raises(InputError, match="ask for 1 to 500 rows"):
            table.page(Query(), offset, limit)
    assert table.page(Query(), 10_000, 10).rows == []
    with pytest.raises(InputError, match="there are 40"):
        table.rows([3, 40])


def test_a_place_names_the_neighbours_in_the_list(table: FeatureTable) -> None:
    """Next and previous follow the list that a person came from."""
    query = Query("max", is_descending=True, life="live")
    order = table.order(query).tolist()
    assert table.place(query, order[3]) == (3, 37, order[2], order[4])
    assert table.place(query, order[0])[2] is None
    assert table.place(query, order[-1])[3] is None
    assert table.place(query, 12) == (None, 37, None, None)


def test_distributions_count_the_live_features(table: FeatureTable) -> None:
    """The overview must not lose the extremes to rounding of the edges."""
    for shown in table.distributions().values():
        assert sum(shown["counts"]) == 37
        assert len(shown["edges"]) == len(shown["counts"]) + 1


def test_search_finds_pieces_of_tokens_and_nothing_else(table: FeatureTable, frame: pl.DataFrame) -> None:
    """The index must agree with looking through every row."""

    def look(*parts: tuple[tuple[str, ...], str]) -> list[int]:
        def has(row: dict, columns: tuple[str, ...], text: str) -> bool:
            return any(text in word.casefold() for column in columns for word in row[column])

        return [row["latent"] for row in frame.to_dicts() if all(has(row, *part) for part in parts)]

    anywhere = ("top_tokens", "top_logits", "bottom_logits")
    assert table.order(Query(text="DEF")).tolist() == look((anywhere, "def"))
    assert table.order(Query(text='" in"')).tolist() == look((anywhere, " in"))
    assert table.order(Query(text="raised:for import")).tolist() == look((("top_logits",), "for"), (anywhere, "import"))
    assert table.order(Query(text="peaks:return")).tolist() == look((("top_tokens",), "return")) != []
    assert table.order(Query(text="):")).tolist() == look((anywhere, "):")) != []
    assert table.order(Query(text="nosuchtoken")).tolist() == []


@pytest.mark.parametrize("text", ['"', "'; DROP TABLE words; --", "a AND", "NEAR(", "*", "col:x", "(((", "\x00", "{peaks}:", "%", "\u202e"])
def test_hostile_searches_find_nothing_or_something_but_never_break(table: FeatureTable, text: str) -> None:
    """Search text is data: no character of it is an operator of the index."""
    assert len(table.order(Query(text=text))) <= 40


def test_the_index_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    """It is part of the bundle, and bundles are compared by their bytes."""
    features = [FeatureWords(i, [f"a{i % 7}", " b"], ["c"], []) for i in range(500)]
    first = build_index(features)
    assert first == build_index(iter(features))
    path = tmp_path / "search.sqlite"
    path.write_bytes(first)
    assert search_latents(path, "a3").tolist() == [i for i in range(500) if i % 7 == 3]
    assert search_latents(path, "a3").dtype == np.uint32
