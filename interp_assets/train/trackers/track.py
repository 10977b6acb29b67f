"""Logged steps of trainings go to trackers too: TensorBoard, W&B, MLflow, trackio. They are outputs: nothing is read back, and no id knows them.

`on_metrics` puts a step into a queue; a thread of its own opens the trackers and hands steps on, so that training waits for none. A tracker that
fails costs one warning, and is heard of no more. What each writes, and where, its module says; all of it lies outside the pipeline's folder, in
`<root>/tracks/<pipeline>/` (`tracks/` of the working directory where the root is a bucket), and none asks a network unless its own variables say so.
"""

import json
import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import Produced
from interp_assets.train.loop import OnMetrics, TrainingMetrics
from interp_assets.train.refs import sae_ref

FOLDER: Final = "tracks"
LEFT_OUT: Final = ("step", "n_rows")
"""Columns of a logged step that are no numbers to draw."""
MEASURED: Final = ("l0", "fvu", "dead_share")
"""Of a trained SAE, measured on rows that follow: logged last, as `measured_fvu`."""
_WAIT_S: Final = 60.0
_CREDENTIALS: Final = re.compile(r"//[^/\s]*@")
"""What stands before the host of an address: a tracking server's may have a password there, and warnings are kept in logs."""


class Told(NamedTuple):
    """What a tracker is told before the first step."""

    pipeline: str
    folder: Path
    configs: Mapping[str, Mapping[str, Any]]
    """Of each SAE, flat: numbers and words."""
    ids: Mapping[str, str]
    """Of each SAE: its name with the beginning of its artifact's id."""


@runtime_checkable
class Tracker(Protocol):
    """Writes numbers of SAEs somewhere. Each method may raise anything."""

    def log(self, sae: str, n_rows: int, numbers: Mapping[str, float]) -> None:
        """Write numbers of an SAE after so many rows; the first time, its configuration too."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


Step = tuple[str, int, Mapping[str, float]]


class Tracked:
    """Who hears of trainings that are tracked."""

    def __init__(self, steps: "queue.SimpleQueue[Step | None]", on_metrics: OnMetrics | None) -> None:
        """`tracked` makes it."""
        self._steps, self._on_metrics = steps, on_metrics

    def hear(self, metrics: TrainingMetrics) -> None:
        """Hear a logged step."""
        if self._on_metrics is not None:
            self._on_metrics(metrics)
        numbers = {name: float(value) for name, value in metrics.row._asdict().items() if name not in LEFT_OUT}
        self._steps.put((metrics.name, metrics.row.n_rows, numbers))

    def end(self, made: Mapping[str, Produced]) -> None:
        """Hear which SAEs have been trained now, and what was measured of them."""
        for name, produced in made.items():
            facts = produced.manifest.facts
            if not produced.is_cached and facts.get("n_rows"):
                self._steps.put((name, int(facts["n_rows"]), {f"measured_{fact}": float(facts[fact]) for fact in MEASURED}))


@contextmanager
def tracked(
    pipeline: Pipeline,
    names: Sequence[str],
    on_metrics: OnMetrics | None,
    warn: Callable[[str], object],
    make: "Callable[[str, Told], Tracker] | None" = None,
) -> Iterator[Tracked]:
    """Hand logged steps of the named SAEs on to `on_metrics` and the configured trackers; `warn` hears of those that fail."""
    steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
    if not pipeline.config.track:
        yield Tracked(steps, on_metrics)
        return
    told = _tell(pipeline, names)
    thread = threading.Thread(target=_write, args=(dict.fromkeys(pipeline.config.track, make or open_tracker), told, steps, warn), daemon=True)
    thread.start()
    try:
        yield Tracked(steps, on_metrics)
    finally:
        steps.put(None)
        thread.join(_WAIT_S)
        if thread.is_alive():
            warn(f"The trackers {', '.join(pipeline.config.track)} were not done within {_WAIT_S:.0f} s: the end of their curves may be missing.")


def open_tracker(name: str, told: Told) -> Tracker:
    """Open a tracker by its name."""
    return import_module(f"interp_assets.train.trackers.to_{name}").open_tracker(told)


def _tell(pipeline: Pipeline, names: Sequence[str]) -> Told:
    root = pipeline.config.root
    folder = Path(FOLDER if "://" in root else f"{root}/{FOLDER}") / pipeline.config.name
    configs = {name: _flatten(pipeline.config.sae(name).described()) for name in names}
    return Told(pipeline.config.name, folder, configs, {name: sae_ref(pipeline, name).path.rpartition("/")[2] for name in names})


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, str | int | float) else json.dumps(value) for name, value in config.items() if value not in ("", (), {})}


def _write(
    makers: Mapping[str, Callable[[str, Told], Tracker]], told: Told, steps: "queue.SimpleQueue[Step | None]", warn: Callable[[str], object]
) -> None:
    """Hand steps on until there are no more."""
    trackers: dict[str, Tracker] = {}

    def attempt(name: str, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except ImportError as error:
            warn(f"Nothing is tracked by {name}: {error}. Install it: pip install 'interp-assets[{name}]'")
        except Exception as error:  # whatever another tool raises, training goes on
            logging.getLogger(__name__).debug("%s failed", name, exc_info=True)
            reason = _CREDENTIALS.sub("//", str(error).splitlines()[0]) if str(error) else "no message"
            warn(f"Nothing more is tracked by {name}: {type(error).__name__}: {reason}.")
        trackers.pop(name, None)
        return None

    for name, make in makers.items():
        if (opened := attempt(name, lambda name=name, make=make: make(name, told))) is not None:
            trackers[name] = opened
    while (step := steps.get()) is not None:
        for name in list(trackers):
            attempt(name, lambda name=name, step=step: trackers[name].log(*step))
    for name in list(trackers):
        attempt(name, lambda name=name: trackers[name].close())
