"""HeadVis' tree: what is written is read again, and a foreign one is believed only where it holds together."""

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_heads import build_synthetic_heads

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.store import Store, open_store
from interp_assets.terminal.web import export
from interp_assets.web.headvis import HeadVis, export_headvis
from interp_assets.web.opened import OpenAttention, list_bundles, open_any


@pytest.fixture(scope="module")
def bundle() -> OpenAttention:
    """Write the invented bundle."""
    store = open_store("memory://headvis")
    build_synthetic_heads(store)
    (found,) = map(open_any, list_bundles(store))
    assert isinstance(found, OpenAttention)
    return found


@pytest.fixture
def tree(bundle: OpenAttention, tmp_path: Path) -> Store:
    """Export it."""
    out = open_store(str(tmp_path / "tree"))
    assert export_headvis(bundle, out).n_files == 6 + 4
    return out


def test_what_is_written_is_read_again(bundle: OpenAttention, tree: Store) -> None:
    """Every example with its edges, values to four decimals; statistics under both spellings; conventions are named."""
    found = HeadVis(tree)
    assert found.heads() == bundle.head_names()
    assert (found.config["model_name"], found.config["n_layers"], found.config["n_heads"], found.n_intervals) == ("invented", 2, 3, 2)
    columns = bundle.description["heads"]
    assert found.scatter["induction_score_repeated"].to_list() == columns["induction"]
    over_all = [mean * of / rows for mean, of, rows in zip(columns["induction"], columns["induction_rows"], columns["rows"], strict=True)]
    assert found.scatter["induction_score"].to_list() == pytest.approx(over_all)
    assert over_all != columns["induction"]
    assert found.scatter["previous_token_score"].to_list() == found.scatter["prev_token_score"].to_list() == columns["previous"]
    assert "divided by all queries: HeadVis' convention" in found.config["metric_descriptions"]["induction_score"]
    assert "whose token occurred earlier" in found.config["metric_descriptions"]["induction_score_repeated"]
    assert set(found.config["metrics"]) | {"layer", "head"} == set(found.scatter.columns)
    for name in found.heads():
        head, record = found.head(name), bundle.head(name)
        assert head.refused == []
        wanted = {*record["top"], *(place for part in record["intervals"] for place in part["examples"])}
        assert [sequence.sequence_id for sequence in head.sequences] == sorted(wanted)
        for sequence in head.sequences:
            example = record["examples"][sequence.sequence_id]
            pattern = sequence.pattern()
            for row, (keys, masses) in enumerate(zip(example["keys"], example["masses"], strict=True)):
                np.testing.assert_allclose(pattern[example["first_query"] + row, keys], (np.array(masses) / 255) ** 2, atol=5e-5)
            assert np.count_nonzero(pattern) <= sum(byte > 0 for masses in example["masses"] for byte in masses)
            assert sequence.tokens == [bundle.vocabulary.text(token) for token in record["contexts"][example["context"]]["tokens"]]
            assert sequence.interval == (2 if sequence.sequence_id in (*record["top"], *record["intervals"][1]["examples"]) else 1)
        assert head.record["histogram"] == {"bin_edges": record["score"]["edges"], "bin_values": record["score"]["counts"]}
        assert len(head.record["qk_distance_histogram"]["bin_edges"]) == 1 + len(record["distance"])


def test_the_largest_activation_leaves_out_the_first_row_and_column(bundle: OpenAttention, tree: Store) -> None:
    """HeadVis' pages do; else its intervals would not be what they show."""
    content = json.loads(tree.get("heads/L1H0.json"))
    for sequence in content["sequences"]:
        n = sequence["seq_len"]
        edges = zip(sequence["attention_indices"], sequence["attention_values"], strict=True)
        assert sequence["max_activation"] == max((value for index, value in edges if index // n and index % n), default=0.0)
    assert max(sequence["max_activation"] for sequence in content["sequences"]) > 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda sequence: sequence["attention_indices"].__setitem__(0, sequence["seq_len"] ** 2), "lies outside of 64 x 64 edges"),
        (lambda sequence: sequence["attention_indices"].__setitem__(0, -1), "index -1 lies outside"),
        (lambda sequence: sequence["attention_values"].pop(), "indices and"),
        (lambda sequence: sequence["tokens"].pop(), "it has 63 tokens and says 64"),
        (lambda sequence: sequence.update(interval=3), "interval 3 of 2"),
        (lambda sequence: sequence.pop("seq_len"), "seq_len"),
    ],
)
def test_a_sequence_that_does_not_hold_together_is_left_out_by_name(tree: Store, change, reason: str) -> None:
    """An edge outside of a text would be drawn at another place."""
    content = json.loads(tree.get("heads/L1H0.json"))
    n_before = len(content["sequences"])
    change(content["sequences"][1])
    tree.put("heads/L1H0.json", json.dumps(content).encode())
    head = HeadVis(tree).head("1.0")
    assert len(head.sequences) == n_before - 1
    (refused,) = head.refused
    assert refused.startswith("heads/L1H0.json: sequence 1 is left out: ")
    assert reason in refused


def test_what_is_no_tree_is_refused(tree: Store, tmp_path: Path) -> None:
    """With the file that is missing or wrong, and with the heads there are."""
    with pytest.raises(InputError, match=r"no head '7\.0' in .*; there are 0\.0, 0\.1"):
        HeadVis(tree).head("7.0")
    with pytest.raises(ArtifactCorruptError, match=r"no .*config\.json: the folder holds no tree of HeadVis"):
        HeadVis(open_store(str(tmp_path / "empty")))
    tree.put("scatter_data.json", b'[{"layer": 9, "head": 0}]')
    with pytest.raises(ArtifactCorruptError, match=r"has a line of head 9\.0, which config\.json does not list"):
        HeadVis(tree)
    tree.put("config.json", b'{"heads": [[0]]}')
    with pytest.raises(ArtifactCorruptError, match="is no tree of HeadVis"):
        HeadVis(tree)
    tree.put("config.json", b"[]")
    with pytest.raises(ArtifactCorruptError, match=r"config\.json holds no dict"):
        HeadVis(tree)


def test_the_command_writes_it(tmp_path: Path) -> None:
    """`interp export headvis`, from the folder of the bundle."""
    build_synthetic_heads(open_store(str(tmp_path / "served")))
    export("headvis", str(tmp_path / "out"), str(tmp_path / "served"))
    assert (tmp_path / "out" / "heads" / "L1H2.json").exists()
    assert json.loads((tmp_path / "out" / "server_config.json").read_text()) == {}
