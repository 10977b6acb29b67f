"""Relative paths: the working directory, then the folder of the configuration's file; and what is nowhere is said at once."""

import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from tiny_models import write_texts

from interp_assets.corpus.sources import survey_sources
from interp_assets.errors import ConfigError, InputError
from interp_assets.garcon.locate import is_hub_id, locate_model
from interp_assets.planning.config import PipelineConfig, load_config, make_config
from interp_assets.storage.seen import SeenFiles
from interp_assets.train.exchange.imported import open_foreign


def _write(folder: Path, **changes: object) -> Path:
    """Write a configuration whose paths are relative."""
    content = {"corpus": {"source": "files", "path": "texts"}, "model": {"name": "models/tiny"}, **changes}
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    return folder / "p.yaml"


def test_what_lies_beside_the_file_is_found_from_anywhere(tmp_path: Path) -> None:
    """A newcomer runs `interp plan -c project/p.yaml` from above the project, and a cron job from `/`."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "models" / "tiny").mkdir(parents=True)
    write_texts(project / "texts")
    (project / "sae").mkdir()
    elsewhere.mkdir()
    sae = {"name": "other", "imported": "sae", "imported_digest": "x"}
    path = _write(project, saes=[sae], features={"saes": ["other"]})
    with chdir(elsewhere):
        found = load_config(path)
    assert [found.corpus.path, found.model.name, found.saes[0].imported] == [str(project / name) for name in ("texts", "models/tiny", "sae")]
    (elsewhere / "texts").mkdir()
    with chdir(elsewhere):
        assert load_config(path).corpus.path == "texts", "the working directory comes first, as before"
    with chdir(project):
        assert load_config(Path("p.yaml")) == make_config(yaml.safe_load(path.read_text())), "and there nothing changes, ids least of all"


def test_what_is_nowhere_is_named_with_the_folders_that_were_tried(tmp_path: Path) -> None:
    """Before any hub is asked: of these names none is an id."""
    project = tmp_path / "project"
    project.mkdir()
    sae = {"name": "other", "imported": "sae/x", "imported_digest": "x"}
    config = load_config(_write(project, model={"name": "my models/a/b"}, saes=[sae], features={"saes": []}))
    tried = rf"\(looked in {Path.cwd()} and {project}\)"
    with pytest.raises(InputError, match=rf"There is no model folder my models/a/b {tried}"):
        locate_model(config.model)
    with pytest.raises(InputError, match=rf"There is nothing at corpus\.path = 'texts' {tried}"):
        survey_sources(config.corpus, 0, (), SeenFiles(None))
    with pytest.raises(InputError, match=rf"There is no folder of a dataset 'a/b/c' {tried}, and it is no id"):
        survey_sources(load_config(_write(project, corpus={"source": "huggingface", "path": "a/b/c"})).corpus, 0, (), SeenFiles(None))
    with pytest.raises(InputError, match=rf"The folder sae/x of an imported SAE is not there {tried}"):
        open_foreign(config.saes[0].imported, config.saes[0].looked_in)
    assert PipelineConfig().model.looked_in == ""


def test_without_a_network_a_name_that_may_be_an_id_is_refused_at_once(tmp_path: Path) -> None:
    """Half a minute of attempts went before the sentence, and it did not say that a folder had been looked for."""
    program = (
        "import sys, time\n"
        "from interp_assets.planning.config import load_config\n"
        "from interp_assets.garcon.locate import load_model_config\n"
        "from interp_assets.errors import InputError\n"
        "import transformers.models.auto.configuration_auto\n"
        "started = time.monotonic()\n"
        "try: load_model_config(load_config(sys.argv[1]).model)\n"
        "except InputError as error: print(error)\n"
        "print(time.monotonic() - started)\n"
    )
    path = _write(tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=environment, capture_output=True, text=True, check=True)
    message, seconds = done.stdout.strip().rsplit("\n", 1)
    assert "Cannot read the configuration of model 'models/tiny'" in message
    assert f"It is no folder (looked in {Path.cwd()} and {tmp_path}). Check the id and revision 'main', the network" in message
    assert "Retrying" not in done.stderr
    assert float(seconds) < 10


def test_ids_of_the_hub_are_told_from_paths() -> None:
    """What cannot be an id is not asked for."""
    assert all(is_hub_id(name) for name in ("gpt2", "EleutherAI/pythia-70m", "google/gemma-2-2b", "a_b/c.d"))
    assert not any(is_hub_id(name) for name in ("a/b/c", "./gpt2", "../x/y", "/a", "~/a", "my model", "a/b/", "", "a//b", "m\u00e9"))


def test_a_configuration_that_is_no_utf8_is_one_paragraph(tmp_path: Path) -> None:
    """An editor of another time wrote it."""
    (tmp_path / "p.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"Cannot read the configuration .*: it is not UTF-8"):
        load_config(tmp_path / "p.yaml")
