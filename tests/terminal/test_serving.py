"""What `interp serve` is told about models and users, and what it says of what it cannot do."""

import re
from pathlib import Path

import pytest
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets.errors import InputError, InterpError
from interp_assets.garcon.backend import Backend
from interp_assets.terminal.serving import find_served_bundles, load_models, read_users
from interp_assets.web.guard import hash_token


def test_models_are_served_by_the_last_part_of_their_name(tmp_path: Path) -> None:
    """An address holds no slashes; a pipeline that has not been planned yet adds nothing to its model."""
    folder = save_model(tmp_path / "models" / "pythia", "gpt2")
    config = make_tiny_config(folder, write_texts(tmp_path / "texts"), root=str(tmp_path / "data"))
    said: list[str] = []
    models = load_models([str(folder)], config, weights=True, say=said.append)
    assert models.names == ["pythia"]
    assert said == [f"Loading {folder} ..."]
    served = models.find("pythia")
    assert isinstance(served.backend, Backend)
    assert served.facts == {"model": str(folder), "revision": "main", "saes": {}}
    served.thread.close()
    with pytest.raises(InputError, match="Two models would be served as 'pythia'"):
        load_models([str(folder), f"{folder}/"], config, weights=True, say=said.append)
    with pytest.raises(InputError, match="nowhere"):
        load_models([str(tmp_path / "nowhere")], config, weights=True, say=said.append)


def test_models_are_served_without_bundles_unless_some_are_named(tmp_path: Path) -> None:
    """A GPU box may have nothing else; whoever names a folder means it."""
    config = make_tiny_config(tmp_path / "model", tmp_path / "texts", root=str(tmp_path / "data"))
    assert find_served_bundles(None, config, is_needed=False) == []
    with pytest.raises(InterpError):
        find_served_bundles(str(tmp_path / "data"), config, is_needed=True)


def test_users_are_names_with_hashes(tmp_path: Path) -> None:
    """The file may be read by others: no token stands in it."""
    path = tmp_path / "users.yaml"
    path.write_text(f"anna: {hash_token('a long token')}\nbert: {hash_token('another')}\n")
    assert read_users(path) == {"anna": hash_token("a long token"), "bert": hash_token("another")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anna: secret", "The user 'anna' in"),
        ("anna: 12", "has no SHA-256 of 64 hexadecimal digits"),
        (f"12: {'a' * 64}", "The user 12 in"),
        ("- anna", "names no users"),
        ("", "names no users"),
        ("a: [", "cannot be read from"),
    ],
)
def test_a_file_of_users_that_is_wrong_says_how_it_is_made(tmp_path: Path, text: str, message: str) -> None:
    """A token in the place of its hash would let nobody in, and lie open."""
    path = tmp_path / "users.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_users(path)
    assert "printf %s TOKEN | sha256sum" in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_users(tmp_path / "none.yaml")
