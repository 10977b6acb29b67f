"""Lists of features: sorting, filtering, searching and stepping agree with the obvious way of doing each."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import InputError
from interp_assets.storage.store import open_store
from interp_assets.web.columns import order_by
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.search import Span, encode_latents, join_spans, mark_latents, parse_query
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


@pytest.mark.parametrize("column", ["latent", "frequency", "count", "max", "mean", "top_token", "n_examples", "decoder_norm"])
@pytest.mark.parametrize("is_descending", [False, True])
@pytest.mark.parametrize("life", ["all", "live", "dead"])
def test_sorting_is_total_and_ties_stand_in_order_of_latent(
    table: FeatureTable, frame: pl.DataFrame, column: str, is_descending: bool, life: str
) -> None:
    """Pages of one list must neither repeat nor lose a feature. A falling list is the rising one backwards; dead features come before live ones."""
    rows = [row for row in frame.to_dicts() if life == "all" or row["is_dead"] == (life == "dead")]
    key = {"latent": lambda row: 0 if life == "all" else row["is_dead"]}.get(
        column, lambda row: (not row["is_dead"], not row["is_dead"] and row[column])
    )
    wanted = [row["latent"] for row in sorted(rows, key=key)]
    query, wanted = Query(column, is_descending, life), wanted[::-1] if is_descending else wanted
    assert table.order(query).tolist() == wanted
    pages = [row["latent"] for offset in range(0, 40, 7) for row in table.page(query, offset, 7).rows]
    assert pages == wanted
    assert table.page(query, 0, 1).n_matches == len(wanted)


def test_rows_say_what_the_table_says(table: FeatureTable, frame: pl.DataFrame) -> None:
    """The list's files are written from the same table that people read as Parquet."""
    for row, wanted in zip(table.rows(range(40)), frame.to_dicts(), strict=True):
        for name in ("latent", "is_dead", "count", "n_examples", "top_token"):
            assert row[name] == wanted[name]
        for name in ("frequency", "mean", "max", "decoder_norm"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-6)
        for name in ("top_tokens", "top_logits", "bottom_logits"):
            assert row[name] == wanted[name][:4]


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_floats_are_ordered_through_their_bits(values: list[float]) -> None:
    """Flipped IEEE bits must compare as the numbers do; minus zero stands before zero."""
    order = order_by(np.array(values, np.float32)).tolist()
    assert [values[i] for i in order] == sorted(values)


@given(st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 6_000_000)), max_size=20))
def test_joined_reads_cover_the_same_lists(gaps: list[tuple[int, int]]) -> None:
    """Whatever is read together, every list comes once and in order, and no read is larger than 4 MiB or a single list."""
    spans, at = [], 0
    for gap, length in gaps:
        spans.append(Span(at + gap, at + gap + length, 1))
        at += gap + length
    groups = list(join_spans(spans))
    assert [span for _, inside in groups for span in inside] == spans
    assert all(len(inside) == 1 or inside[-1].stop - start <= 4 << 20 for start, inside in groups)
    assert all(start == inside[0].start for start, inside in groups)


@given(
    st.one_of(
        st.sets(st.integers(0, 3000)), st.sets(st.integers(0, 1_999_999)), st.sets(st.sampled_from([0, 254, 255, 256, 510, 65535, 131070, 1_999_999]))
    ),
    st.integers(1, 50),
)
def test_lists_of_latents_survive_their_steps(latents: set[int], repeat: int) -> None:
    """Steps at the borders of a width, the first latent and empty lists, however many numbers are summed at once."""
    wanted = np.zeros(2_000_000 + 50_000, bool)
    wanted[list(latents)] = True
    wanted[2_000_000 : 2_000_000 + 1000 * repeat] = True
    data, width = encode_latents(np.flatnonzero(wanted).astype(np.uint32))
    found = np.zeros_like(wanted)
    mark_latents(data, width, found)
    assert (found == wanted).all()
    assert len(data) <= 4 * wanted.sum()


def test_a_list_takes_the_width_that_makes_it_shortest() -> None:
    """A byte a latent for a frequent word, never more than four for a rare one."""
    for step, width, n_bytes in ((3, 1, 1000), (700, 2, 2000), (300_000, 4, 4000)):
        data, found = encode_latents(np.arange(1000, dtype=np.uint32) * step)
        assert (found, len(data)) == (width, n_bytes)
    long = np.arange(1 << 20, dtype=np.uint32) * 2
    mask = np.zeros(1 << 22, bool)
    mark_latents(*encode_latents(long), mask)
    assert np.flatnonzero(mask).tolist() == long.tolist()


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
        (Query("relevance"), "Cannot sort by 'relevance'"),
        (Query(filters=("frequency>=2 percent",)), "is no filter; they look like"),
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


def test_distributions_count_the_live_features(bundle: OpenBundle) -> None:
    """The overview must not lose the extremes to rounding of the edges."""
    for shown in bundle.description["distributions"].values():
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
    words = {word for row in frame.to_dicts() for name in anywhere for word in row[name]}
    single = [row["latent"] for row in frame.to_dicts() if any(word.strip() == "1" for name in anywhere for word in row[name])]
    assert "1" in words
    assert table.order(Query(text="1")).tolist() == single


@pytest.mark.parametrize("text", ["DEF", '" in"', "raised:for import", "re", "1", "peaks:return re", ")"])
@pytest.mark.parametrize("life", ["all", "live"])
def test_a_search_is_ranked_by_its_best_matches(table: FeatureTable, frame: pl.DataFrame, text: str, life: str) -> None:
    """What a feature fires on counts more than what it raises, that more than what it lowers; the whole token more than its beginning or a piece."""
    columns = {"peaks": "top_tokens", "raised": "top_logits", "lowered": "bottom_logits"}
    worth = {"peaks": 7, "raised": 4, "lowered": 1}

    def weigh(row: dict, column: str, part: str) -> int:
        found = [(name, word.casefold()) for name, key in columns.items() if column in ("", name) for word in row[key]]
        found = [(name, word) for name, word in found if (word.strip() == part if len(part) == 1 and part.isalnum() else part in word)]
        close = ((name, word.strip() == part.strip(), word.strip().startswith(part.strip())) for name, word in found)
        return max((worth[name] + (2 if is_whole else int(is_start)) for name, is_whole, is_start in close), default=0)

    def score(row: dict) -> int:
        each = [weigh(row, column, part.casefold()) for column, part in parse_query(text)]
        return sum(each) if all(each) else 0

    rows = [row for row in frame.to_dicts() if score(row) and (life == "all" or not row["is_dead"])]
    wanted = [row["latent"] for row in sorted(rows, key=lambda row: (-score(row), row["latent"]))]
    assert wanted
    assert table.order(Query("relevance", life=life, text=text)).tolist() == wanted
    assert table.order(Query("relevance", True, life, text=text)).tolist() == wanted[::-1]
    assert sorted(table.order(Query(life=life, text=text)).tolist()) == sorted(wanted)


def test_shares_are_filtered_in_percent_too(table: FeatureTable) -> None:
    """People read frequencies as percentages, so they write them so."""
    wanted = table.order(Query(filters=("frequency>=0.02",))).tolist()
    for text in ("frequency>=2%", "frequency >= 2 %", " frequency>=2.0%"):
        assert table.order(Query(filters=(text,))).tolist() == wanted
    assert 0 < len(wanted) < 40


@pytest.mark.parametrize("text", ['"', "'; DROP TABLE words; --", "a AND", "NEAR(", "*", "col:x", "(((", "\x00", "{peaks}:", "%", "\u202e"])
def test_hostile_searches_find_nothing_or_something_but_never_break(table: FeatureTable, text: str) -> None:
    """Search text is data: no character of it is an operator of the index."""
    assert len(table.order(Query(text=text))) <= 40
