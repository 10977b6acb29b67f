"""`interp export` and `interp labels import`: bundles and SAEs become other tools' files, bundles a static site, and labels reach a bundle."""

# ruff: noqa: PLC0415 - as in cli.py: imports happen inside the commands, because `interp --help` should not take seconds

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from interp_assets.errors import InputError, InterpError
from interp_assets.planning.progress import format_count

if TYPE_CHECKING:
    from interp_assets.planning.config import PipelineConfig
    from interp_assets.planning.pipeline import Pipeline
    from interp_assets.storage.store import Store
    from interp_assets.web.opened import BundlePlace, OpenBundle
    from interp_assets.web.server import Desk

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
labels_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Labels of features: import them beside a bundle.")
NOTES: Final = "feature-notes"
SITE: Final = "site"
HEADVIS: Final = "headvis"
SAE_FORMATS: Final = ("saelens", "sparsify", "dictionary_learning")
"""What `train/exchange/folders.py` writes; named here, because importing it takes seconds."""

BundleOption = Annotated[
    str | None, typer.Option("--bundle", "-b", help="A bundle, or a folder above one; a path or s3:// address. Default: the pipeline's.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A pipeline's YAML file. Default: the demo pipeline.")]


def export(
    format_name: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="Of a bundle: site, neuronpedia, saedashboard, attribution-graph, or headvis of attention heads. Of an SAE: saelens, sparsify or "
            "dictionary_learning.",
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="TO", help="Folder or s3:// address to write into.")],
    bundle: BundleOption = None,
    config: ConfigOption = None,
    sae: Annotated[str | None, typer.Option(help="Which SAE, by its name. Default: the only one.")] = None,
) -> None:
    """Write a bundle or an SAE as another tool reads it, or a bundle as a site for any static host."""
    from interp_assets.planning.progress import format_bytes
    from interp_assets.storage.store import open_store
    from interp_assets.terminal.console import byte_bar
    from interp_assets.terminal.serving import find_compared_saes, find_served_bundles
    from interp_assets.web.exports import FORMATS, export_bundle
    from interp_assets.web.opened import open_any
    from interp_assets.web.site import export_site

    if format_name in SAE_FORMATS:
        if bundle is not None:
            raise InputError(
                f"A bundle holds no weights to export as {format_name}. Name the pipeline with --config, and one of several SAEs with --sae."
            )
        _export_sae(format_name, target, config, sae)
        return
    if format_name not in (SITE, HEADVIS, *FORMATS):
        raise InputError(f"No export format is called {format_name!r}; there are {', '.join([SITE, HEADVIS, *sorted(FORMATS), *SAE_FORMATS])}.")
    if format_name == HEADVIS:
        _export_heads(_find(bundle, config), target)
        return
    if format_name == SITE:
        compared = find_compared_saes(None if bundle else _load(config))
        places = find_served_bundles(bundle, _load(config), is_needed=not compared)
        total = sum(open_any(place).manifest.n_bytes for place in places)
        with byte_bar(err, "copying", total) as advance:
            site = export_site(places, open_store(target), pipelines=compared, progress=advance)
        counted = f"{format_count(site.n_files, 'file')}, {format_bytes(site.n_bytes)}"
        out.print(f"{counted} in {target}. Serve it from any host that answers Range requests.", soft_wrap=True, markup=False)
        return
    done = export_bundle(_choose(_find(bundle, config), sae), format_name, open_store(target))
    dead = f"; {format_count(done.n_dead, 'dead feature')} left out" if done.n_dead else ""
    counted = f"{format_count(done.n_features, 'feature')} in {format_count(done.n_files, 'file')}, {format_bytes(done.n_bytes)}"
    out.print(f"{counted}, in {target}{dead}.", soft_wrap=True, markup=False)


def _export_heads(places: "Sequence[BundlePlace]", target: str) -> None:
    from interp_assets.planning.progress import format_bytes
    from interp_assets.storage.store import open_store
    from interp_assets.web.headvis import export_headvis
    from interp_assets.web.opened import OpenAttention, open_any

    found = [each for each in map(open_any, places) if isinstance(each, OpenAttention)]
    if not found:
        raise InputError(
            f"There is no bundle of attention heads at {places[0].store.url}. Materialize `attention_browser`, or name it with --bundle."
        )
    newest = max(found, key=lambda each: each.manifest.created)
    if len({each.description["pipeline"] for each in found}) > 1:
        raise InputError(f"There are {len(found)} bundles of heads: {', '.join(each.where for each in found)}. Name one with --bundle.")
    done = export_headvis(newest, open_store(target))
    counted = f"{format_count(done.n_heads, 'head')} in {format_count(done.n_files, 'file')}, {format_bytes(done.n_bytes)}"
    out.print(f"{counted}, in {target}.", soft_wrap=True, markup=False)


def _export_sae(format_name: str, target: str, config_path: Path | None, name: str | None) -> None:
    from interp_assets.planning.config import load_config
    from interp_assets.planning.demo import demo_config
    from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
    from interp_assets.planning.progress import format_bytes
    from interp_assets.storage.store import open_store
    from interp_assets.train.exchange.folders import export_sae

    config = demo_config() if config_path is None else load_config(config_path)
    names = [item.name for item in config.saes]
    if name is None and len(names) > 1:
        raise InputError(f"There are {len(names)} SAEs: {', '.join(names)}. Name one with --sae.")
    store = open_pipeline_store(config)
    done = export_sae(load_pipeline(config, store), store, name or names[0], format_name, open_store(target))
    out.print(f"SAE {name or names[0]}: {', '.join(done.files)}, {format_bytes(done.n_bytes)}, in {target}.", soft_wrap=True, markup=False)


@labels_app.callback()
def _labels() -> None:
    """Labels of features: import them beside a bundle."""


@labels_app.command("import")
def import_file(
    path: Annotated[Path, typer.Argument(help="A .parquet, .csv or .jsonl file; Neuronpedia's explanations/batch-N.jsonl.gz is one.")],
    bundle: BundleOption = None,
    config: ConfigOption = None,
    source: Annotated[str | None, typer.Option(help="Which method or model wrote them, for rows that do not say.")] = None,
) -> None:
    """Import labels with source and score; the browser shows them after it is started again."""
    from interp_assets.web.labels import import_labels

    if not path.is_file():
        raise InputError(f"There is no file {path}. Name a Parquet or CSV file of labels, or Neuronpedia's explanations (.jsonl, .jsonl.gz).")
    places = _find(bundle, config)
    chosen = _choose(places, None)
    made = import_labels(chosen, path, source=source)
    facts = made.manifest.facts
    done = "were imported before" if made.is_cached else "imported"
    counted = f"{format_count(facts['n_labels'], 'label')} of {format_count(facts['n_latents'], 'feature')}"
    out.print(f"{counted} {done}: {chosen.place.store.url}/{made.ref.path}", soft_wrap=True, markup=False)


def find_notes(places: "Sequence[BundlePlace]") -> Path:
    """Return the folder where lists and notes are kept: `feature-notes` beside the pipeline's folder, where this machine's disk holds it.

    Of bundles in a bucket it lies in the working directory. Says so where that has notes of one of these bundles that are not looked at.
    """
    from interp_assets.web.refs import FOLDER

    here, root = Path(NOTES), places[0].store.local_path()
    if root is None:
        return here
    above = (root / places[0].path).resolve().parent
    found = (above.parent.parent if above.name == FOLDER else above) / NOTES
    left = [place.name for place in places if found != here.resolve() and (here / f"{place.name}.json").exists()]
    if left:
        text = f"Notes lie in {found}; those in {here.resolve()} are not shown. Move them, or name that folder with --notes."
        out.print(text, soft_wrap=True, markup=False)
    return found


def make_desk(config: "PipelineConfig", places: "Sequence[BundlePlace]", notes: Path) -> "Desk":
    """Return what `interp serve` has besides bundles: the folder of notes, and model and SAE of those bundles that this pipeline made."""
    from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
    from interp_assets.train.refs import sae_ref
    from interp_assets.web.opened import OpenBundle, open_bundle
    from interp_assets.web.server import Desk

    examples = {}
    opened = [bundle for bundle in map(open_bundle, places) if isinstance(bundle, OpenBundle)]
    ours = [bundle for bundle in opened if bundle.description["pipeline"] == config.name]
    try:
        if ours:
            store = open_pipeline_store(config)
            pipeline = load_pipeline(config, store)
            for bundle in ours:
                name, artifact_id = bundle.description["sae"]["name"], bundle.description["sae"]["artifact_id"]
                if any(sae.name == name and sae_ref(pipeline, name).artifact_id == artifact_id for sae in config.saes):
                    examples[bundle.name] = _Later(pipeline, store, name)
    except InterpError:
        pass  # no pipeline beside these bundles: the pages say what search by example needs
    return Desk(notes, examples)


def read_token(path: Path) -> str:
    """Read the token that a server asks for from a file: arguments stand in `ps`. Raises `InputError` when there is none."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The token cannot be read from {path} ({error}). Write a long random text into it.") from error
    if not token:
        raise InputError(f"The file {path} holds no token. Write a long random text into it.")
    return token


class _Later:
    """Imports torch, and loads model and SAE, when the first text comes."""

    def __init__(self, pipeline: "Pipeline", store: "Store", sae: str) -> None:
        self._pipeline, self._store, self._sae = pipeline, store, sae
        self._lock = Lock()
        self._examples: Any = None

    def ask(self, text: str) -> dict[str, Any]:
        with self._lock:
            if self._examples is None:
                from interp_assets.web.example import Examples, load_probe

                self._examples = Examples(partial(load_probe, self._pipeline, self._store, self._sae))
        return self._examples.ask(text)


def _choose(places: "list[BundlePlace]", sae: str | None) -> "OpenBundle":
    """Open the one bundle that is meant: of an SAE that was shown more than once, the newest. Raises `InputError` when several SAEs are meant."""
    from interp_assets.web.opened import OpenAttention, OpenBundle, open_any

    opened = [open_any(place) for place in places]
    found = [bundle for bundle in opened if isinstance(bundle, OpenBundle)]
    if not found:
        named = ", ".join(bundle.where for bundle in opened if isinstance(bundle, OpenAttention))
        raise InputError(f"What lies there is of attention heads and has no features: {named}. `interp export site` writes it as pages.")
    names = sorted({str(item.description["sae"]["name"]) for item in found})
    if sae is not None:
        found = [item for item in found if item.description["sae"]["name"] == sae]
        if not found:
            raise InputError(f"No bundle shows an SAE {sae!r}; there are {', '.join(names)}. Is it in features.saes?")
    by_sae: dict[tuple[str, str], OpenBundle] = {}
    for item in sorted(found, key=lambda item: item.manifest.created):
        by_sae[str(item.description["pipeline"]), str(item.description["sae"]["name"])] = item
    if len(by_sae) > 1:
        shown = ", ".join(f"{item.place.store.url}/{item.place.path}" for item in by_sae.values())
        raise InputError(f"There are bundles of {len(by_sae)} SAEs: {shown}. Name one with --bundle, or --sae where the command has it.")
    (chosen,) = by_sae.values()
    if len(found) > 1:
        err.print(
            f"Of {len(found)} bundles, {chosen.name} is the newest; older ones are taken only if --bundle names them.", soft_wrap=True, markup=False
        )
    return chosen


def _load(config: Path | None) -> "PipelineConfig":
    from interp_assets.planning.config import load_config
    from interp_assets.planning.demo import demo_config

    return demo_config() if config is None else load_config(config)


def _find(bundle: str | None, config: Path | None) -> "list[BundlePlace]":
    from interp_assets.web.opened import find_bundles

    pipeline = _load(config)
    return find_bundles(bundle or f"{pipeline.root}/{pipeline.name}")
