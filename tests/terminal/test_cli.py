"""What people type and read: options, texts, exit codes."""

import errno
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_models import make_tiny_config, save_model, write_texts
from typer.main import get_command
from typer.testing import CliRunner, Result

from interp_assets.errors import ConfigError, InputError, PlanError, explain_missing, find_no_room
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig, load_config
from interp_assets.planning.demo import demo_config
from interp_assets.planning.progress import AssetReport
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import open_store
from interp_assets.storage.verify import Fault, list_tree, verify_tree
from interp_assets.terminal import cli
from interp_assets.terminal.starter import make_starter

OPTIONS = {
    "backfill": ["--config", "--failed", "--partition", "--select"],
    "check": ["--set", "name"],
    "config": ["--config", "--set"],
    "costs": ["--config"],
    "demo": ["--dagster-port", "--port", "--serve"],
    "dev": ["--config", "--dagster-port"],
    "diff": ["--config", "a", "b"],
    "export": ["--bundle", "--config", "--sae", "format_name", "target"],
    "gc": ["--config", "--delete", "--forget", "--hours"],
    "history": ["--config"],
    "import": ["--accept-misfit", "--add", "--config", "--hook-point", "--name", "--target-hook-point", "folder"],
    "init": ["path"],
    "inspect": ["path"],
    "labels": [],
    "plan": ["--config", "--memory", "--range", "--read-again", "--row-bytes", "--rows", "--set", "--simulate", "--workers"],
    "run": ["--config", "--note", "--read-again", "--select", "--set", "--workers", "--yes"],
    "serve": ["--config", "--host", "--model", "--notes", "--port", "--token-file", "--users", "--weights", "path"],
    "steer": ["--config", "--new-tokens", "--prompt", "--seed", "--temperature", "recipe"],
    "sweep": ["--all", "--config", "--csv", "--over", "--sort"],
    "try": ["--config", "--note", "--rows", "--set", "--watch"],
    "verify": ["--config", "path"],
}


def invoke(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.app, list(arguments))


def interp(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `interp` as people do."""
    command = [sys.executable, "-c", "from interp_assets.terminal.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "COLUMNS": "200", **environment}, capture_output=True, text=True, check=False)


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Return a root with a pipeline of two small artifacts."""
    store = open_store(str(tmp_path / "data")).child("small")
    for index in range(2):
        ref = make_ref("token_shard", "1-corpus", identity={"shard": index}, inputs={}, label=f"shard-{index:06d}")
        with create_artifact(store, ref) as art:
            art.put("a.bin", bytes(range(100)) * 10, n_rows=10, block_bytes=256)
            art.put("b.json", json.dumps({"index": index}).encode())
            art.facts["n_rows"] = 10
    store.put("plan.json", b"{}")
    return tmp_path / "data"


def folder_of(artifacts: Path, index: int) -> Path:
    """Return the folder of one of the artifacts."""
    return next((artifacts / "small" / "1-corpus").glob(f"shard-{index:06d}-*"))


def test_the_options_are_the_ones_people_have_in_their_scripts() -> None:
    """An option that is renamed breaks scripts; change this list and the changelog together."""
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    found = {name: sorted(next(iter(p.opts)) for p in command.params if p.name != "help") for name, command in commands.items()}
    assert found == OPTIONS


def test_the_version_can_be_asked_for(tmp_path: Path) -> None:
    """The first line of every report of a fault."""
    done = interp("--version", cwd=tmp_path)
    assert done.returncode == 0
    assert re.fullmatch(r"interp-assets \d+\.\d+\.\d+\S*, Python 3\.\d+\.\d+\S*\n", done.stdout), done.stdout
    assert not done.stderr


def test_the_version_tells_the_processor_on_request(tmp_path: Path) -> None:
    """Speeds, and last bits of products, follow from the processor and from the paths that are taken on it."""
    done = interp("--version", "--debug", cwd=tmp_path)
    assert done.returncode == 0
    assert re.fullmatch(
        r"interp-assets .*\nProcessor \S+ \S+ \(.+\): float32 products by .+, digits (int8|float32), torch's kernels \S+\n", done.stdout
    )
    assert not done.stderr


def test_every_command_and_option_explains_itself() -> None:
    """`--help` is the manual."""
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        assert all(getattr(param, "help", "") for param in command.params if param.name != "help"), name


def test_the_starter_is_the_demo(tmp_path: Path) -> None:
    """What `interp init` writes works as it stands, names every field, and changes nothing."""
    path = tmp_path / "p.yaml"
    result = invoke("init", str(path))
    assert result.exit_code == 0
    assert "interp run --config" in result.stdout
    assert load_config(path) == PipelineConfig()
    content = yaml.safe_load(path.read_text())
    assert set(content) == set(PipelineConfig.model_fields)
    assert set(content["saes"][0]) == set(type(PipelineConfig().saes[0]).model_fields)
    assert make_starter("p.yaml").count("#") > 50


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    """A configuration is somebody's work."""
    (tmp_path / "p.yaml").write_text("name: mine\n")
    result = interp("init", "p.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert "p.yaml exists already. Name another file, or delete it first." in result.stderr
    assert (tmp_path / "p.yaml").read_text() == "name: mine\n"


def test_a_wrong_configuration_is_one_paragraph(tmp_path: Path) -> None:
    """No traceback: which file, which field, what was found, what is allowed."""
    (tmp_path / "p.yaml").write_text("shuffle:\n  passes: 0\nmodle: x\n")
    result = interp("run", "--config", "p.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: p.yaml has 2 wrong fields:")
    assert "shuffle.passes" in result.stderr
    assert "modle" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """A developer needs it, and may write `--debug` anywhere."""
    result = interp("run", "--config", "absent.yaml", "--debug", cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "Error: Cannot read the configuration absent.yaml: No such file or directory. `interp init` writes one" in result.stderr


def test_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    """Scripts tell a typing error from a failed run."""
    assert interp("run", "--conifg", "x", cwd=tmp_path).returncode == 2


def test_verify_passes_what_is_whole(artifacts: Path) -> None:
    """Every block was read: it says how much that was."""
    result = invoke("verify", str(artifacts))
    assert result.exit_code == 0
    assert result.stdout.startswith("2 artifacts, ")
    assert "every block agrees with its manifest" in result.stdout


def test_verify_of_a_folder_without_artifacts_is_an_error(tmp_path: Path) -> None:
    """All whole, 0 artifacts, about a mistyped path, or a line for each file of somebody's text, would mislead."""
    (tmp_path / "my.txt").write_text("text")
    result = invoke("verify", str(tmp_path))
    assert result.exit_code == 1
    assert "There is no artifact below" in str(result.exception)
    assert "my.txt" not in result.stdout


def test_verify_names_every_fault(artifacts: Path) -> None:
    """One flipped byte in any file of any artifact is found and named, and all faults are listed, not the first."""
    first, second = folder_of(artifacts, 0), folder_of(artifacts, 1)
    flip_byte(first / "a.bin", 300)
    flip_byte(first / "a.bin", 999)
    flip_byte(second / "manifest.json", 50)
    (first / "extra.bin").write_bytes(b"x")
    (first / "b.json").unlink()
    (artifacts / "small" / "1-corpus" / "half-written").mkdir()
    (artifacts / "small" / "1-corpus" / "half-written" / "a.bin").write_bytes(b"x")
    result = invoke("verify", str(artifacts))
    text = result.stdout
    assert result.exit_code == 1
    assert f"{first.name}/a.bin is damaged in block 1 (bytes 256 and following)" in text
    assert "damaged in block 3" in text
    assert f"{second.name}/manifest.json" in text
    assert all(line.count(str(artifacts)) == 1 for line in text.splitlines()[:-1])  # the path stands once, and the sentence goes on from it
    assert f"{first.name}/extra.bin is not listed in its manifest" in text
    assert f"{first.name}/b.json is missing, though its manifest lists it" in text
    assert "half-written/a.bin belongs to no artifact" in text
    assert text.splitlines()[-1].endswith(": 6 faults.")


@pytest.mark.parametrize("name", ["a.bin", "b.json", "manifest.json"])
def test_no_flipped_byte_escapes(artifacts: Path, name: str) -> None:
    """Each byte of each file is under a checksum, the manifest's own included."""
    folder = folder_of(artifacts, 0)
    good = (folder / name).read_bytes()
    store = open_store(str(artifacts))
    for at in range(0, len(good), max(1, len(good) // 40)):
        flip_byte(folder / name, at)
        faults = verify_tree(store, "small")
        assert [fault.path for fault in faults] == [f"small/1-corpus/{folder.name}/{name}"], at
        (folder / name).write_bytes(good)
    assert verify_tree(store, "small") == []


def test_verify_finds_a_file_that_was_cut(artifacts: Path) -> None:
    """A truncated file is named with both sizes."""
    path = folder_of(artifacts, 0) / "a.bin"
    path.write_bytes(path.read_bytes()[:500])
    faults = verify_tree(open_store(str(artifacts)), "small")
    assert faults[0].what.startswith("has 500 bytes, its manifest says 1,000.")


def test_verify_finds_an_artifact_in_the_wrong_folder(artifacts: Path) -> None:
    """Readers trust the path, because it carries the id: a copy under another name would be another artifact's bytes."""
    folder = folder_of(artifacts, 0)
    folder.rename(folder.parent / "shard-000007-0123456789ab")
    faults = verify_tree(open_store(str(artifacts)))
    assert [fault.path for fault in faults] == ["small/1-corpus/shard-000007-0123456789ab"]
    assert "It was moved; move it back." in faults[0].what


def test_verify_advances_by_all_bytes(artifacts: Path) -> None:
    """The bar ends at its end."""
    store = open_store(str(artifacts))
    seen: list[int] = []
    verify_tree(store, "", seen.append)
    n_manifest_bytes = sum(path.stat().st_size for path in artifacts.rglob("manifest.json"))
    assert sum(seen) == list_tree(store).n_bytes - n_manifest_bytes


def test_a_fault_is_a_path_and_a_sentence() -> None:
    """The command line joins them with a colon."""
    assert Fault("a/b", "is gone.")._fields == ("path", "what")


def test_verify_of_nothing_says_so(tmp_path: Path) -> None:
    """A path that is not there is no success."""
    result = interp("verify", "absent", cwd=tmp_path)
    assert result.returncode == 1
    assert f"There is no folder {tmp_path / 'absent'}. Name an artifact's folder, or any folder above artifacts." in result.stderr


def test_inspect_shows_one_artifact(artifacts: Path) -> None:
    """What it is, where, from what, its facts and its files."""
    result = invoke("inspect", str(folder_of(artifacts, 1)))
    assert result.exit_code == 0
    for text in ("token_shard", "identity", "shard  1", "facts", "n_rows  10", "a.bin", "1.0 kB", "10 rows", '{"index": 1}'):
        assert text in result.stdout


def test_inspect_counts_what_lies_below_a_folder(artifacts: Path) -> None:
    """The first look at somebody else's bucket."""
    result = invoke("inspect", str(artifacts))
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["kind", "artifacts", "size"]
    assert lines[1][:2] == ["token_shard", "2"]


def test_a_folder_without_artifacts_is_an_error(tmp_path: Path) -> None:
    """An empty answer would look like an empty pipeline."""
    result = interp("inspect", ".", cwd=tmp_path)
    assert result.returncode == 1
    assert "There is no artifact at or below ." in result.stderr


def test_serve_without_a_bundle_says_what_to_do(tmp_path: Path) -> None:
    """The first thing that a newcomer may try."""
    result = interp("serve", cwd=tmp_path, INTERP_ROOT=str(tmp_path / "data"))
    assert result.returncode == 1
    assert "There is nothing to browse at" in result.stderr
    assert "`interp run`" in result.stderr


def test_a_finished_asset_is_one_line() -> None:
    """Logs of a run read like a table; a check that did not pass stands beside its asset."""
    from interp_assets.terminal.console import print_report, print_total

    console = Console(width=200, record=True, file=io.StringIO())
    reports = [
        AssetReport("activations", 16, 4, 2_500_000, 12.34, []),
        AssetReport("sae", 1, 0, 0, 0.0, ["bounds: SAE a has 0.6"]),
    ]
    for report in reports:
        print_report(console, report)
    print_total(console, reports)
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["activations", "4", "made,", "12", "there", "already", "12.3", "s", "2.5", "MB"]
    assert lines[2] == "    check not passed: bounds: SAE a has 0.6"
    assert lines[3] == "  2 assets, 17 partitions: 4 made in 12.3 s, 2.5 MB written."
    print_total(console, [AssetReport("sae", 1, 1, 1000, 1.0, [], stopped=["a"])])
    assert console.export_text().splitlines()[-1] == "  1 asset, 1 partition: 1 made in 1.0 s, 1.0 kB written."


def test_the_demo_root_comes_from_the_environment(tmp_path: Path) -> None:
    """Tests, and people with a big disk elsewhere, move the demo."""
    command = [sys.executable, "-c", "from interp_assets.planning.demo import demo_config; print(demo_config().root)"]
    result = subprocess.run(command, env={**os.environ, "INTERP_ROOT": "/elsewhere"}, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "/elsewhere"
    assert demo_config().name == "pystdlib"


def flip_byte(path: Path, at: int) -> None:
    """Change one bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_plan_quotes_a_shuffle_that_no_pipeline_asks_for_yet() -> None:
    """Whoever asks for machines needs passes, jobs, requests and money first; the simulation shows that the numbers add up."""
    result = invoke("plan", "--rows", "2e6", "--row-bytes", "1000", "--memory", "100MB", "--range", "1MB", "--simulate")
    assert result.exit_code == 0, result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "2,000,000 rows of 1,000 bytes, 2.0 GB; 100.0 MB of rows a job, ranges of 1.0 MB or more"
    assert "shuffle: {passes: 2, fan_out: 20, memory_bytes: 103200000}" in lines
    assert any(line.startswith("1 1 20 2,000,000 100,000 ") for line in lines), result.stdout
    assert any(line.startswith("2 20 20 2,000,000 100,000") for line in lines), result.stdout


@pytest.mark.parametrize(("rows", "passes"), [("100e6", 1), ("10e9", 2), ("1e12", 3), ("1e14", 4)])
def test_plan_gives_the_passes_of_the_blueprint(rows: str, passes: int) -> None:
    """100 GB, 10 TB, 1 PB and 100 PB of 1-KB rows, as people would ask for them."""
    result = invoke("plan", "--rows", rows, "--row-bytes", "1000", "--memory", "100GB", "--range", "1GB")
    assert f"shuffle: {{passes: {passes}, " in result.stdout


def test_plan_refuses_a_size_that_is_none() -> None:
    """A typo in a unit would be off by a thousand."""
    result = invoke("plan", "--rows", "1e9", "--memory", "100 gigs")
    assert isinstance(result.exception, InputError)
    assert "'100 gigs' is not a size: write a number with or without a unit (kb, mb, gb" in str(result.exception)


def test_plan_says_what_there_will_be_and_writes_nothing(tmp_path: Path) -> None:
    """Shards, partitions and the shuffle's cost, before anything is made; a running pipeline keeps its plan."""
    save_model(tmp_path / "model", "gpt2")
    write_texts(tmp_path / "texts", n_files=4, n_chars=900)
    config = make_tiny_config(tmp_path / "model", tmp_path / "texts", root=str(tmp_path / "data"), corpus={"shard_bytes": 900}, shuffle={"passes": 2})
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    (tmp_path / "texts" / "__init__.py").touch()
    result = invoke("plan", "--config", str(tmp_path / "p.yaml"), "--workers", "3")
    assert result.exit_code == 0, result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert max(len(line) for line in result.stdout.splitlines() if str(tmp_path) not in line) <= 100
    assert lines[1].startswith("4 corpus shards: 4 documents, ")
    assert lines[1].endswith("of text; 1 shard held out")
    assert lines[2] == "1 empty file skipped: __init__.py"
    shuffled = next(line for line in lines if line.startswith("Shuffle of "))
    assert shuffled.endswith("(estimated from the text, 4 bytes of text a row): 2 passes, 8 mixed shards")
    rows = {line.partition(" of ")[0].rpartition(" ")[0]: line for line in lines if " of " in line}
    assert rows["corpus_plan"].startswith("corpus_plan 1 of 1 ")  # as `interp run` counts
    assert rows["token_shards"].startswith("token_shards 4 of 4 ")
    assert rows["shuffle_pass_1"].startswith("shuffle_pass_1 3 of 3 ")  # the held-out shard has no share
    assert rows["demo feature_candidates"].startswith("demo feature_candidates 8 of 8 ")
    sae = config.saes[0]
    assert f"1 of 1 {sae.n_rows:,} " in rows["sae"]
    assert "Time with 3 jobs at once (--workers), each of two cores; assumed:\n  300 GFLOP/s" in result.stdout
    assert any(line.startswith("as configured 2 ") for line in lines)
    assert " free, which is enough." in result.stdout
    assert not (tmp_path / "data").exists()


def test_plan_shows_what_the_shuffle_will_be_and_refuses_what_cannot_work(tmp_path: Path) -> None:
    """Nobody states passes; and what is known to fail hours later, in any stage, is said at once and together, with the exit code of an error."""
    save_model(tmp_path / "model", "gpt2")
    write_texts(tmp_path / "texts", n_files=4, n_chars=900)
    changes = {"root": str(tmp_path / "data"), "corpus": {"shard_bytes": 900}}
    config = make_tiny_config(tmp_path / "model", tmp_path / "texts", **changes)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    result = invoke("plan", "--config", str(tmp_path / "p.yaml"))
    assert "1 pass, 1 mixed shard, as `shuffle.passes: auto` will choose for so many" in " ".join(result.stdout.split())
    assert "shuffle_pass" not in result.stdout
    saes = [{"name": name, "hook_point": "resid_post.0", "d_sae": 33, "k": 4, "batch_rows": 100_000} for name in ("demo", "other")]
    config = make_tiny_config(tmp_path / "model", tmp_path / "texts", **changes, saes=saes, execution={"processes": 2, "latent_processes": 2})
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    refused = invoke("plan", "--config", str(tmp_path / "p.yaml"))
    assert isinstance(refused.exception, PlanError)
    said = str(refused.exception)
    assert said.startswith("4 things stand in the way, and nothing was begun:\n")
    assert "SAE 'demo' takes 100,000 rows a batch (batch_rows), and the training shards have at most " in said
    assert "SAE 'other': 2 latent slices don't divide d_sae = 33. Set execution.latent_processes to one of" in said


@pytest.mark.parametrize(
    "command", ["costs", "sweep", "backfill", "serve", "export site out", "export saelens out", "verify {root}", "inspect {root}", "serve {root}"]
)
def test_looking_at_what_is_not_there_makes_no_folder(tmp_path: Path, command: str) -> None:
    """A typing mistake in `root` must not leave empty folders behind, which the next command takes for a pipeline's."""
    config = make_tiny_config(tmp_path / "model", tmp_path / "texts", root=str(tmp_path / "data"))
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    words = [word.format(root=tmp_path / "data") if "{" in word else word.replace("out", str(tmp_path / "out")) for word in command.split()]
    named = [] if words[0] in ("verify", "inspect") else ["--config", str(tmp_path / "p.yaml")]
    result = invoke(*words, *named)
    assert result.exit_code == (0 if command == "costs" else 1), result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.yaml"]


@pytest.mark.parametrize(("found", "typed"), [("/usr/bin/interp", "interp"), (None, ".venv/bin/interp")])
def test_a_demo_that_was_only_built_says_how_to_open_it(monkeypatch: pytest.MonkeyPatch, found: str | None, typed: str) -> None:
    """Whoever builds it on a server, and comes back, has forgotten; and `make` activates nothing."""
    monkeypatch.setattr(cli.shutil, "which", lambda _name: found)
    monkeypatch.setattr(cli.sys, "argv", [".venv/bin/interp", "demo", "--no-serve"])
    said = cli.explain_opening(demo_config())
    assert f" {typed} serve {demo_config().root}/pystdlib " in said
    assert f" {typed} dev " in said
    assert f" {typed} demo " in said


def test_an_interrupt_says_what_is_kept() -> None:
    """Ctrl-C in a run of hours must not look like a crash, nor leave a doubt about what is lost."""
    program = (
        "import sys\n"
        "from interp_assets.terminal import cli\n"
        "@cli.app.command()\n"
        "def stop() -> None:\n"
        "    raise KeyboardInterrupt\n"
        "sys.argv = ['interp', 'stop']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted. Finished partitions are kept; the same command goes on from there."


def test_a_misspelled_asset_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Dagster, torch and the definitions take 15 seconds and more to load; a typing mistake should not."""
    program = (
        "import sys\n"
        "from interp_assets.terminal.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'dagster' in sys.modules, 'transformers' in sys.modules)\n"
    )
    for command in ("backfill", "run"):
        done = subprocess.run([sys.executable, "-c", program, command, "--select", "nope"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "There is no asset 'nope'; this pipeline has activation_statistics, activations, " in done.stderr
        assert done.stdout == "1 False False\n"
        assert list(tmp_path.iterdir()) == []


def test_a_plan_of_a_known_model_needs_no_pytorch() -> None:
    """`interp plan` is asked after each change of a line of YAML; PyTorch and transformers alone take six seconds of it."""
    program = (
        "import sys, interp_assets.corpus.plan, interp_assets.terminal.forecast\n"
        "print(sorted({'torch', 'transformers', 'dagster', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_disk_that_is_full_for_dagsters_history_is_no_bug_of_ours() -> None:
    """The history lies beside the data: SQLite is often the first to find no room, and says it inside other errors."""
    error = RuntimeError("an event was not stored")
    error.__cause__ = sqlite3.OperationalError("database or disk is full")
    assert find_no_room(error)
    assert find_no_room(sqlite3.OperationalError("disk I/O error"))
    assert find_no_room(OSError(errno.ENOSPC, "No space left on device"))
    assert not find_no_room(OSError(errno.ENOENT, "No such file"))
    assert not find_no_room(RuntimeError("something else"))


def test_a_full_disk_is_named_by_what_the_system_said() -> None:
    """Not by the link of the chain that lies nearest, which may say nothing at all."""
    program = (
        "import errno, sys\n"
        "from interp_assets.terminal import cli\n"
        "@cli.app.command()\n"
        "def fill() -> None:\n"
        "    try:\n"
        "        try: raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "        except OSError as error: raise ValueError from error\n"
        "    except ValueError as error: raise RuntimeError('an event was not stored') from error\n"
        "sys.argv = ['interp', 'fill']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Error: A disk is full (or fails)" in done.stderr
    assert "files: [Errno 28] No space left on device. Free" in done.stderr


def test_plan_forecasts_and_then_refuses_what_the_disk_has_no_room_for(tmp_path: Path) -> None:
    """The forecast says where the bytes go; the exit code says that a run would be refused. Of a bucket's room nothing is known."""
    save_model(tmp_path / "model", "gpt2")
    write_texts(tmp_path / "texts", n_files=4, n_chars=900)
    sae = {"name": "demo", "hook_point": "resid_post.0", "d_sae": 1 << 45, "k": 4, "batch_rows": 128}
    changes = {"corpus": {"shard_bytes": 900}, "saes": [sae], "features": {"saes": []}}
    config = make_tiny_config(tmp_path / "model", tmp_path / "texts", root=str(tmp_path / "data"), **changes)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    refused = invoke("plan", "--config", str(tmp_path / "p.yaml"))
    assert "together" in refused.stdout
    assert "which is enough" not in refused.stdout
    assert isinstance(refused.exception, PlanError)
    assert re.search(r"data has [\d.,]+ \wB free, and [\d.,]+ \wB will be written \(sae ", str(refused.exception))
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**config.model_dump(), "root": "memory://x"}))
    refused = invoke("plan", "--config", str(tmp_path / "p.yaml"))
    assert "will be written" not in str(refused.exception)
    assert "sae needs about " in str(refused.exception)  # memory is this machine's, wherever the folder lies
    assert invoke("plan", "--config", str(tmp_path / "p.yaml"), "--set", "saes.*.d_sae=64").exit_code == 0


@pytest.mark.parametrize(
    ("error", "extra"),
    [
        (ModuleNotFoundError("No module named 'dagster_k8s'", name="dagster_k8s"), "'.[kubernetes]'"),
        (ModuleNotFoundError("No module named 'ray'", name="ray.util"), "'.[ray]'"),
        (RuntimeError("Couldn't import module dagster_postgres when attempting to load the configurable class X"), "'.[production]'"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), None),
        (ValueError("ray"), None),
    ],
)
def test_a_missing_optional_package_is_named_with_its_installation(error: Exception, extra: str | None) -> None:
    """`INTERP_EXECUTOR=kubernetes` without the package is no bug of ours, and the remedy is one command."""
    said = explain_missing(error)
    assert (said is None) == (extra is None)
    if extra:
        assert said is not None
        assert said.endswith(f"pip install -c constraints.txt -e {extra}")
        outer = RuntimeError("a step failed")
        outer.__cause__ = error
        assert explain_missing(outer) == said


def test_verify_of_a_pipeline_wants_no_folder_besides(artifacts: Path) -> None:
    """Which of the two would be meant nobody could know."""
    result = invoke("verify", str(artifacts), "--config", "p.yaml")
    assert isinstance(result.exception, InputError)
    assert "name one of the two" in str(result.exception)


def test_the_resolved_configuration_is_one_that_means_the_same(tmp_path: Path) -> None:
    """What `interp config` prints can be saved and run: the sweep written out, the setting in it; what decides nothing is said beside it."""
    path, again = tmp_path / "s.yaml", tmp_path / "again.yaml"
    path.write_text("name: s\nsaes:\n  - {name: a, architecture: relu, k: 3, each: {seed: {count: 2}}}\nfeatures: {saes: []}\n")
    shown = invoke("config", "--config", str(path), "--set", "saes.*.d_sae=64", "--set", "execution.workers=2")
    again.write_text(shown.stdout)
    config = load_config(again)
    assert [(sae.name, sae.seed, sae.d_sae) for sae in config.saes] == [("a-seed0", 0, 64), ("a-seed1", 1, 64)]
    assert config == load_config(path, settings=["saes.*.d_sae=64", "execution.workers=2"])
    assert shown.stderr == "`k` decides nothing for relu: 2 SAEs (a-seed0, a-seed1)\n"
    assert '"name": "demo-k8"' in invoke("config", "--set", "saes.*.k=[8, 16]", "--set", "features.saes=[]").stdout


def test_the_resolved_configuration_shows_of_the_corpus_what_its_source_reads(tmp_path: Path) -> None:
    """The demo's listed ten fields of planted rows under a corpus of text; what is set all the same stays, is part of the ids, and is said."""
    text = {"context_length", "contexts", "held_out_shards", "max_shards", "shard_bytes", "source", "text_kind"}

    def shown(*settings: str) -> tuple[set[str], str]:
        result = invoke("config", *(word for setting in settings for word in ("--set", setting)))
        (tmp_path / "again.yaml").write_text(result.stdout)
        assert load_config(tmp_path / "again.yaml").corpus.source == yaml.safe_load(result.stdout)["corpus"]["source"]
        return set(yaml.safe_load(result.stdout)["corpus"]), result.stderr

    assert shown() == (text, "")
    told = {"documents_per_shard", "path", "revision", "split", "subset", "text_field"}
    assert shown("corpus.source=huggingface", "corpus.path=a/b") == ((text | told) - {"shard_bytes"}, "")
    assert shown("corpus.width=32") == (text | {"width"}, "`corpus.width` decides nothing for source stdlib\n")
    planted, _ = shown("corpus.source=planted", "features.saes=[]", "heads=null", "steering=null")
    assert planted >= {"features", "width", "n_rows", "frequency", "hierarchy", "noise", "max_shards", "context_length"}
    assert not planted & {"path", "text_field", "shard_bytes", "contexts", "text_kind", "split"}


def test_more_saes_than_anybody_wants_by_accident_need_a_yes(tmp_path: Path) -> None:
    """A range too many is 300 SAEs: refused before anything is begun."""
    path = tmp_path / "s.yaml"
    path.write_text("root: memory://s\nsaes:\n  - {name: a, each: {seed: {count: 300}}}\nfeatures: {saes: []}\n")
    refused = invoke("run", "--config", str(path)).exception
    assert isinstance(refused, InputError)
    assert "300 SAEs would be trained. `interp plan` says what that takes; --yes begins it" in str(refused)


def test_all_up_to_an_asset_is_selected_with_a_plus() -> None:
    """Whoever wants the table of a sweep does not want to name what it is made of, nor to make features."""
    road = make_road(demo_config())
    names = [asset.name for asset in road.select(["+sweep"])]
    before = ["corpus_plan", "token_shards", "activations", "activation_statistics"]
    shuffle = ["shuffle_plan", "shuffle_pass_1", "mixed_shards", "shuffle_certificate"]
    assert names == [*before, *shuffle, "sae", "sae_evaluation", "sweep"]
    assert [asset.name for asset in road.select(["+token_shards", "sweep"])] == ["corpus_plan", "token_shards", "sweep"]
    with pytest.raises(ConfigError, match=r"There is no asset 'swep'; this pipeline has .*Did you mean 'sweep'\?"):
        road.select(["+swep"])
