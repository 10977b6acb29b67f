"""`interp`: what people type, turned into runs, tables and servers.

Exit codes: 0 done; 1 something is wrong, and the message says what and what to do; 2 wrong usage; 3 a bug in this package; 130 interrupted.
Errors of the `InterpError` family are one paragraph; `--debug` shows the traceback too. Imports happen inside the commands, because
torch and Dagster take seconds and `interp --help` should not.
"""

import os
import platform
import shutil
import socket
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from interp_assets.errors import InputError, InterpError, explain_missing, find_no_room
from interp_assets.planning.progress import format_count
from interp_assets.terminal.web import export, find_notes, labels_app, make_desk, read_token

if TYPE_CHECKING:
    from interp_assets.planning.config import PipelineConfig
    from interp_assets.storage.verify import Fault

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.add_typer(labels_app, name="labels")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_INTERRUPTED = 130
_MANY_SAES = 256

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A pipeline's YAML file. Default: the demo pipeline.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A field for this time, `saes.*.k=64` or `corpus.max_shards=4`; several times.")]
ReadAgain = Annotated[bool, typer.Option("--read-again", help="Plan from all text and weights, also of files that look unchanged.")]
Note = Annotated[str, typer.Option(help="A word for the history (`interp history`), such as why this is tried.")]
PathArgument = Annotated[str, typer.Argument(help="An artifact's folder, or any folder above artifacts; a path or s3:// address.")]
PortOption = Annotated[int, typer.Option(help="Port of the feature browser; the next free one is taken when it is in use.")]


@app.command()
def demo(
    serve: Annotated[bool, typer.Option(help="Open the feature browser and Dagster's UI when the road is finished.")] = True,
    port: PortOption = 8420,
    dagster_port: Annotated[int, typer.Option(help="Port of Dagster's UI.")] = 3000,
) -> None:
    """Build everything from the shipped model and the standard library's sources, then show it."""
    config = _load(None)
    _run(config, [])
    if serve:
        _show(config, None, port, dagster_port)
    else:
        out.print(explain_opening(config), soft_wrap=True, markup=False)


@app.command()
def run(
    config: ConfigOption = None,
    select: Annotated[
        list[str] | None, typer.Option(help="Only this asset, for example `activations`; `+sweep` is all up to it. May be given several times.")
    ] = None,
    read_again: ReadAgain = False,
    settings: Settings = None,
    workers: Annotated[str, typer.Option(help="Partitions that are made side by side, or auto: one a GPU, else one a core. Needs Ray.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Also where a sweep has more than 256 SAEs.")] = False,
    note: Note = "",
) -> None:
    """Materialize what is missing of a pipeline, from text to the feature browser's bundle."""
    settings = [*(settings or ()), *([f"execution.workers={workers}"] if workers else [])]
    loaded = _load(config, read_again=read_again, settings=settings)
    if len(loaded.saes) > _MANY_SAES and not yes:
        raise InputError(f"{format_count(len(loaded.saes), 'SAE')} would be trained. `interp plan` says what that takes; --yes begins it.")
    _run(loaded, select or [], note)
    _say(explain_result(loaded, config))


@app.command("config")
def show_config(config: ConfigOption = None, settings: Settings = None) -> None:
    """Print what a configuration comes to: sweeps written out, defaults and --set filled in."""
    from interp_assets.terminal.resolved import print_config

    print_config(out, err, _load(config, settings=settings))


@app.command()
def backfill(
    config: ConfigOption = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only partitions whose latest run failed, and what comes after them.")] = False,
    select: Annotated[list[str] | None, typer.Option(help="Only this asset; may be given several times.")] = None,
    partition: Annotated[list[str] | None, typer.Option(help="Only this partition: all of it is read, and what is damaged is made again.")] = None,
) -> None:
    """Make what has failed, is missing or was made from other bytes, as far as possible; exit code 1 when something failed again."""
    pipeline = _load(config)
    _check_names(pipeline, select or [])
    from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store

    load_pipeline(pipeline, open_pipeline_store(pipeline))  # without a plan there is nothing to do, and no history to begin
    from interp_assets.graph.backfill import run_backfill
    from interp_assets.graph.jobs import open_instance, take_turn
    from interp_assets.terminal.console import print_report, print_total
    from interp_assets.terminal.lines import watch

    warnings.simplefilter("ignore")  # as in `run`
    out.print(f"Pipeline {pipeline.name} in {pipeline.root}", soft_wrap=True, markup=False)
    reports = []
    with take_turn(pipeline, _say), open_instance(pipeline) as instance, watch(out) as progress:
        for item in run_backfill(pipeline, instance, select=select or [], partitions=partition or [], only_failed=failed, progress=progress):
            reports.append(item)
            print_report(out, item)
    print_total(out, reports)
    if any(item.failed or item.waiting for item in reports):
        raise typer.Exit(1)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("pipeline.yaml")) -> None:
    """Write a commented configuration to start from."""
    from interp_assets.terminal.starter import make_starter

    if path.exists():
        raise InputError(f"{path} exists already. Name another file, or delete it first.")
    path.write_text(make_starter(path.name), encoding="utf-8")
    out.print(f"Wrote {path}. Change model, text and hook points, then: interp run --config {path}", soft_wrap=True)


@app.command("import")
def import_sae(
    folder: Annotated[str, typer.Argument(help="Folder or s3:// address that SAELens, sparsify or dictionary_learning wrote, or of Gemma Scope.")],
    config: ConfigOption = None,
    name: Annotated[str, typer.Option(help="Name of the SAE in the pipeline. Default: made of the folder's.")] = "",
    hook_point: Annotated[str, typer.Option(help="One of harvest.hook_points. Default: the one that the folder tells.")] = "",
    target_hook_point: Annotated[str, typer.Option(help="What a transcoder reconstructs. Default: the one that the folder tells.")] = "",
    add: Annotated[bool, typer.Option("--add", help="Put the entry into the configuration's file.")] = False,
    accept_misfit: Annotated[bool, typer.Option("--accept-misfit", help="Take it in though FVU or L0 on the held-out rows is far off.")] = False,
) -> None:
    """Check an SAE that another tool trained against a pipeline, and write the entry by which the pipeline takes it in."""
    from interp_assets.terminal.importing import Place, add_entry, make_entry, plan_import, print_import

    if add and config is None:
        raise InputError("--add puts the entry into a file: name it with --config (`interp init` writes one).")
    found = plan_import(_load(config), Place(folder, name, hook_point, target_hook_point), accept_misfit=accept_misfit)
    print_import(err, found)
    out.print(make_entry(found.entry).rstrip(), soft_wrap=True, markup=False)
    shown = f"To browse its features, put {found.entry.name!r} into features.saes too."
    if add and config is not None:
        add_entry(config, found.entry)
        err.print(f"Added to {config}. {shown} Then: interp run --config {config}", soft_wrap=True, markup=False)
    else:
        err.print(f"Put this item into `saes` of the configuration (or --add). {shown} Then: interp run", soft_wrap=True, markup=False)


@app.command()
def plan(
    config: ConfigOption = None,
    rows: Annotated[str | None, typer.Option(help="Quote a shuffle of this many rows instead, without a pipeline; for example 100e9.")] = None,
    row_bytes: Annotated[int, typer.Option(help="Bytes of a row, with its row id (8 bytes).")] = 1032,
    memory: Annotated[str, typer.Option(help="What a job may hold of rows, for example 100GB; sorting takes 32 bytes a row more.")] = "4GB",
    smallest_range: Annotated[str, typer.Option("--range", help="Smallest range of a bucket in a job's file.")] = "8MiB",
    workers: Annotated[int | None, typer.Option(help="Jobs that run at once. Default: execution.workers; 64 with --rows.", min=1)] = None,
    read_again: ReadAgain = False,
    settings: Settings = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="With --rows: run the cheapest plan on row numbers, without a row.")] = False,
) -> None:
    """Say what a pipeline will make before anything is made: partitions, rows, bytes, memory and time of each asset, and what the shuffle costs."""
    if rows is None:
        from interp_assets.terminal.forecast import print_plan

        print_plan(out, _load(config, read_again=read_again, settings=settings), workers)
        return
    from interp_assets.planning.machine import Prices
    from interp_assets.terminal.quote import parse_size, print_quote, print_simulation

    best = print_quote(out, parse_size(rows), row_bytes, parse_size(memory), parse_size(smallest_range), Prices(workers=workers or 64))
    if simulate:
        print_simulation(out, best, row_bytes)


@app.command()
def costs(config: ConfigOption = None) -> None:
    """Show what was expected of each asset's partitions and what they took: bytes, requests, seconds, dollars."""
    from interp_assets.graph.jobs import dagster_home, open_instance, recorded_costs
    from interp_assets.graph.stages import make_road
    from interp_assets.terminal.forecast import print_costs

    warnings.simplefilter("ignore")
    loaded = _load(config)
    if not dagster_home(loaded).exists():
        print_costs(out, loaded, {})
        return
    with open_instance(loaded) as instance:
        print_costs(out, loaded, {asset.name: recorded_costs(instance, asset) for asset in make_road(loaded)})


@app.command()
def inspect(path: PathArgument = "data") -> None:
    """Show an artifact's manifest and the heads of its tables, or count the artifacts below a folder."""
    from interp_assets.terminal.show import print_inspection

    print_inspection(out, path)


@app.command()
def sweep(
    config: ConfigOption = None,
    sort: Annotated[str, typer.Option(help="Column of the table to sort by, for example `l0`.")] = "fvu",
    csv: Annotated[bool, typer.Option("--csv", help="Write all columns as CSV.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every SAE of the pipeline's folder, also of other configurations.")] = False,
    over: Annotated[
        str, typer.Option(help="`seed`: mean, deviation and n of SAEs that differ in nothing else, the default where there are such; `none`: each.")
    ] = "",
) -> None:
    """Show all SAEs of a pipeline side by side: configuration, quality on the held-out shards, speed."""
    from interp_assets.terminal.show import Shown, print_sweep

    print_sweep(out, _load(config), Shown(sort, csv, everything, over))


@app.command("try")
def try_sweep(
    config: ConfigOption = None,
    rows: Annotated[int, typer.Option(help="Rows that each SAE is trained on.", min=1000)] = 100_000,
    settings: Settings = None,
    note: Note = "",
    watch: Annotated[bool, typer.Option("--watch", help="Try again whenever the configuration or a file of code that it names is saved.")] = False,
) -> None:
    """Train all SAEs on the first rows of the mixed shards and compare them, in seconds; nothing of it becomes part of the pipeline."""
    from interp_assets.terminal.trying import print_try, watch_try

    if watch:
        if config is None:
            raise InputError("--watch waits for a file: name the configuration with --config.")
        watch_try(out, lambda: _load(config, settings=settings), config, rows)
        return
    if not print_try(out, _load(config, settings=settings), rows, note):
        raise typer.Exit(1)


@app.command()
def history(config: ConfigOption = None) -> None:
    """List what `interp run` and `interp try` did to a pipeline: when, on which code, how long it took, and what came of it."""
    from interp_assets.terminal.show import print_history

    print_history(out, _load(config))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="An SAE's name, a run of the history, or a folder (or s3:// address) of an artifact or a pipeline.")],
    b: Annotated[str, typer.Argument(help="What it is compared with, of the same sort.")],
    config: ConfigOption = None,
) -> None:
    """Name exactly what two SAEs, artifacts, runs or pipelines differ in: fields, options, code, text, weights, versions; then their numbers."""
    from interp_assets.terminal.differing import print_diff

    print_diff(out, a, b, _load(config))


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A function in a file, for example my_sae.py:p_anneal.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="A field of its SAE, `k=4` or `options.p_end=0.3`; several times.")] = None,
) -> None:
    """Try an architecture of your own on planted rows: gradients, resuming, ranks, folding, exchange, time; exit code 1 when a check fails."""
    from interp_assets.terminal.checking import print_check

    if not print_check(out, name, settings or []):
        raise typer.Exit(1)


@app.command()
def steer(
    recipe: Annotated[str, typer.Argument(help="A YAML file of edits: see docs/steering.md.")],
    prompt: Annotated[str, typer.Option(help="The text that is continued.")],
    config: ConfigOption = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are added at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the numbers that tokens are drawn by, the same for both texts.")] = 0,
) -> None:
    """Continue a text by a pipeline's model with a recipe's edits, and without them, one under the other."""
    from interp_assets import lab
    from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
    from interp_assets.terminal.steering import print_steered

    loaded = _load(config)
    store = open_pipeline_store(loaded)
    llm = lab.Opened(load_pipeline(loaded, store), store).model()
    print_steered(out, llm, recipe, prompt, {"new_tokens": new_tokens, "temperature": temperature, "seed": seed})


@app.command()
def verify(
    path: Annotated[str | None, typer.Argument(help="An artifact's folder, or any folder above artifacts. Default: data, or the pipeline's.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A pipeline: what its plan promises and is not there is a fault too.")] = None,
) -> None:
    """Read every block of every artifact below a folder, and name each fault; exit code 1 when there is one."""
    from interp_assets.planning.progress import format_bytes
    from interp_assets.storage.verify import list_tree, locate, verify_tree
    from interp_assets.terminal.console import byte_bar

    if path and config:
        raise InputError("A folder or a pipeline is verified: name one of the two.")
    pipeline = _load(config) if config else None
    path = f"{pipeline.root}/{pipeline.name}" if pipeline else path or "data"
    place = locate(path)
    tree = list_tree(place.store, place.path)
    if not tree.artifacts:
        raise InputError(f"There is no artifact below {path}, so nothing was verified. Name an artifact's folder, or any folder above artifacts.")
    with byte_bar(err, "verifying", tree.n_bytes) as advance:
        faults = verify_tree(place.store, place.path, advance)
    for fault in faults:
        out.print(f"{place.store.url}/{fault.path} {fault.what}", soft_wrap=True, markup=False)
    faults += _print_lost(pipeline) if pipeline else []
    summary = f"{format_count(len(tree.artifacts), 'artifact')}, {format_bytes(tree.n_bytes)}"
    if faults:
        out.print(f"{summary}: {format_count(len(faults), 'fault')}.")
        raise typer.Exit(1)
    out.print(f"{summary}: every block agrees with its manifest.")


@app.command()
def serve(
    path: Annotated[str | None, typer.Argument(help="A bundle, or a folder above bundles; a path or s3:// address. Default: the pipeline's.")] = None,
    config: ConfigOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other machines need a token.")] = "127.0.0.1",
    port: PortOption = 8420,
    token_file: Annotated[Path | None, typer.Option(help="File with the token to ask for. Default: INTERP_TOKEN in the environment.")] = None,
    notes: Annotated[
        Path | None, typer.Option(help="Folder of lists and notes: one JSON file a bundle, made by the first note. Default: beside the pipeline.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Serve a model to notebooks, by hub id, folder or `builtin:` name; the pipeline's own with its SAEs. Several times for several."
        ),
    ] = None,
    users: Annotated[Path | None, typer.Option(help="File of users, `name: SHA-256 of the token` a line: each has quotas of their own.")] = None,
    weights: Annotated[bool, typer.Option(help="Send weights of models to who asks for them.")] = True,
) -> None:
    """Open the feature browser, and serve models to notebooks (`lab.connect`)."""
    from interp_assets.terminal.serving import find_compared_saes, find_served_bundles, load_models, read_users
    from interp_assets.web.server import Desk, check_bind
    from interp_assets.web.server import serve as serve_bundles

    token = os.environ.get("INTERP_TOKEN") if token_file is None else read_token(token_file)
    known = read_users(users) if users else {}
    check_bind(host, token, known)
    pipeline = _load(config)
    compared = find_compared_saes(None if path else pipeline)
    bundles = find_served_bundles(path, pipeline, is_needed=not compared and (not model or bool(path or config)))
    models = load_models(model, pipeline, weights=weights, say=_say) if model else None
    desk = (make_desk(pipeline, bundles, notes or find_notes(bundles)) if bundles else Desk())._replace(pipelines=compared)
    port = _free_port(host, port)
    hint = "add /?token= and the token the first time; " if token or known else ""
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    what = "Feature browser" if bundles else "Comparison of SAEs" if compared else "Models for notebooks"
    out.print(f"{what}: {address}   ({hint}Ctrl-C stops it)", soft_wrap=True, markup=False)
    for name in models.names if models else ():
        _say(f'In a notebook:   lab.connect("{address}", "{name}"{", token=..." if token or known else ""})')
    serve_bundles(bundles, host=host, port=port, token=token, desk=desk._replace(models=models, users=known))


@app.command()
def dev(config: ConfigOption = None, dagster_port: Annotated[int, typer.Option(help="Port of Dagster's UI.")] = 3000) -> None:
    """Open Dagster's UI on a pipeline, without running anything."""
    from interp_assets.graph.processes import start_dagster

    dagster = start_dagster(_load(config), config, _free_port("127.0.0.1", dagster_port))
    out.print(f"Dagster's UI: {dagster.url}   (ready in some seconds; Ctrl-C stops it; log: {dagster.log})", soft_wrap=True)
    with dagster:
        dagster.wait()


@app.command()
def gc(
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="Every YAML file that uses the folder, once each. Default: the demo.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is listed.")] = False,
    forget: Annotated[list[str] | None, typer.Option(help="An SAE or hook point of no named configuration that may go.")] = None,
    hours: Annotated[float, typer.Option(help="Leave what is younger: somebody may be writing it.", min=0)] = 24.0,
) -> None:
    """List, or delete, what lies in a pipeline's folder and nothing refers to: older configurations' artifacts, leavings of interrupted writes."""
    from interp_assets.terminal.clearing import clear

    clear(out, [_load(path) for path in config] if config else [_load(None)], forget=forget or [], hours=hours, delete=delete)


app.command()(export)  # after the others: `interp --help` lists commands in this order


def _show_version(is_asked: bool) -> bool:
    if is_asked:
        out.print(f"interp-assets {metadata.version('interp-assets')}, Python {platform.python_version()}", soft_wrap=True)
        if "--debug" in sys.argv:
            from interp_assets.compute.processor import explain_processor

            out.print(explain_processor(), soft_wrap=True, markup=False)
        raise typer.Exit
    return is_asked


@app.callback()
def explain(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and go; with --debug also the processor and its paths.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """From text to the features of a language model: token shards, activations, an exact shuffle, sparse autoencoders, a browser."""


def main() -> None:
    """Run the command line; errors become one paragraph and an exit code. `--debug` may stand anywhere."""
    is_debug = "--debug" in sys.argv
    os.environ["PYTHONSAFEPATH"] = "1"  # for whatever starts a Python: a file of the current directory is no module
    os.environ.setdefault("NUMBA_CACHE_DIR", "")  # else a `.numba_config.yaml` there names the folder whose machine code is run
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads would spin on the cores that compiled loops use
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except InterpError as error:
        if is_debug:
            err.print(getattr(error, "trace", "") or traceback.format_exc(), markup=False, soft_wrap=True)
        err.print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # what Typer makes of Ctrl-C, without a word
            err.print("\nInterrupted. Finished partitions are kept; the same command goes on from there.", soft_wrap=True)
        raise
    except Exception as error:  # noqa: BLE001 - the last resort: a person gets a sentence, a developer --debug
        if is_debug:
            err.print(traceback.format_exc(), markup=False, soft_wrap=True)
        if found := find_no_room(error):
            reason = (str(found).strip() or type(found).__name__).splitlines()[0]
            text = f"Error: A disk is full (or fails), that of Dagster's history or of temporary files: {reason}. "
            err.print(f"{text}Free some space and run the same command again: finished shards are kept.", style="red", markup=False, soft_wrap=True)
            sys.exit(1)
        if said := explain_missing(error):
            err.print(f"Error: {said}", style="red", markup=False, soft_wrap=True)
            sys.exit(1)
        err.print(f"A bug in interp-assets: {type(error).__name__}: {error}. Please report it with what --debug shows.", style="red", markup=False)
        sys.exit(3)


def _load(path: Path | None, *, read_again: bool = False, settings: Sequence[str] | None = None) -> "PipelineConfig":
    from interp_assets.planning.config import find_code, load_config, make_config
    from interp_assets.planning.demo import demo_config
    from interp_assets.planning.grammar import set_values

    if path is not None:
        config = load_config(path, settings=settings or ())
    else:
        config = demo_config()
        content = set_values(config.model_dump(exclude_unset=True), settings or ())
        config = find_code(make_config(content, "the demo's configuration"), Path.cwd()) if settings else config
    return config.model_copy(update={"execution": config.execution.model_copy(update={"read_again": True})}) if read_again else config


def _print_lost(config: "PipelineConfig") -> "list[Fault]":
    from interp_assets.graph.stages import make_road
    from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
    from interp_assets.planning.promised import find_lost

    store = open_pipeline_store(config)
    promised = find_lost(make_road(config), load_pipeline(config, store), store)
    for fault in promised.lost:
        out.print(f"{store.url}/{fault.path} {fault.what}", soft_wrap=True, markup=False)
    if promised.n_not_made:
        out.print(f"{format_count(promised.n_not_made, 'partition')} of the plan not made yet; `interp run` makes them.", soft_wrap=True)
    return promised.lost


def _check_names(config: "PipelineConfig", select: list[str]) -> None:
    """Refuse names of assets that there are not, before the libraries are loaded that would make them."""
    if select:
        from interp_assets.graph.stages import make_road

        make_road(config).select(select)


def _run(config: "PipelineConfig", select: list[str], note: str = "") -> None:
    _check_names(config, select)
    from interp_assets.graph.jobs import open_instance, run_road, take_turn
    from interp_assets.terminal.console import print_report, print_total
    from interp_assets.terminal.lines import watch
    from interp_assets.terminal.recording import recorded

    warnings.simplefilter("ignore")  # Dagster's notes about beta features; the tests run with warnings as errors
    out.print(f"Pipeline {config.name} in {config.root}", soft_wrap=True, markup=False)
    reports = []
    with take_turn(config, _say), open_instance(config) as instance, watch(out) as progress, recorded(config, note, progress) as entry:
        for report in run_road(config, instance, select=select, progress=progress):
            reports.append(report)
            entry.add(report)
            print_report(out, report)
    print_total(out, reports)


def _say(sentence: str) -> None:
    out.print(sentence, soft_wrap=True, markup=False)


def _show(config: "PipelineConfig", config_path: Path | None, port: int, dagster_port: int) -> None:
    from interp_assets.graph.processes import start_dagster
    from interp_assets.web.opened import find_bundles
    from interp_assets.web.server import serve as serve_bundles

    bundles = find_bundles(f"{config.root}/{config.name}")
    port = _free_port("127.0.0.1", port)
    dagster = start_dagster(config, config_path, _free_port("127.0.0.1", dagster_port))
    out.print(f"\nFeature browser: http://127.0.0.1:{port}", soft_wrap=True)
    out.print(f"Dagster's UI:    {dagster.url}   (ready in some seconds; log: {dagster.log})\nCtrl-C stops both.", soft_wrap=True)
    with dagster:
        serve_bundles(bundles, port=port, desk=make_desk(config, bundles, find_notes(bundles)))


def explain_opening(config: "PipelineConfig") -> str:
    """Say how a finished demo is opened again, in words that can be typed: `make` puts no `interp` on the path."""
    interp = "interp" if shutil.which("interp") else sys.argv[0]
    told = {f"serve {config.root}/{config.name}": "the feature browser", "dev": "Dagster's UI", "demo": "both; what is made is found"}
    width = max(map(len, told))
    lines = [f"{interp} {words:{width}}   ({what})" for words, what in told.items()]
    return "\nTo open it: " + "\n            ".join(lines)


def explain_result(config: "PipelineConfig", path: Path | None) -> str:
    """Say by which commands the results of a run are looked at."""
    from interp_assets.terminal.serving import find_served_bundles

    given = f" --config {path}" if path else ""
    has_bundles = bool(config.features.saes) and bool(find_served_bundles(None, config, is_needed=False))
    told = {f"interp serve{given}": "the feature browser"} if has_bundles else {}
    told |= {f"interp sweep{given}": "all SAEs in one table", f"interp dev{given}": "Dagster's UI"}
    width = max(map(len, told))
    return "To look at it: " + "\n               ".join(f"{words:{width}}   ({what})" for words, what in told.items())


def _free_port(host: str, port: int) -> int:
    """Return the port, or the next free one above it."""
    for candidate in range(port, port + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return candidate
    raise InputError(f"No port from {port} to {port + 99} is free on {host}. Name another one.")
