"""One of several training processes: torchrun starts it, rank 0 reports to its parent in JSON lines.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m interp_assets.train pipeline.yaml demo other

Lines on standard output are objects with the key `event`: `progress` (`n` rows), `metrics` (a logged step), `compiling` (a loop begins or ends to be
compiled), `failed` (an SAE that dropped out: `name`, `type`, `message`), and from every rank `traffic` (requests and bytes, at its end) and, when
all training fails, `error` (`type`, `message`).
Nothing here knows Dagster: `launch.py` reads the lines and hands them on.

Started by `launch.py`, a process ends when its launcher is gone, however that went: the launcher never writes to standard input, which torchrun
passes on to every rank, so what can be read there is its end. Where torchrun itself is killed, the kernel ends its ranks (Linux, prctl(2)).
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import threading
from typing import Any, Final

import torch
import torch.distributed as dist

from interp_assets.compute.compiled import tell_compiling
from interp_assets.errors import InterpError
from interp_assets.garcon.device import choose_device
from interp_assets.planning.config import load_config
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.planning.progress import unheard
from interp_assets.storage.traffic import METER
from interp_assets.train.launch import ATTACHED
from interp_assets.train.loop import train_saes
from interp_assets.train.parallel import make_ranks

_PR_SET_PDEATHSIG: Final = 1


def main(arguments: list[str]) -> int:
    """Train the named SAEs of a configuration as one rank of a process group; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch.distributed.run ... -m interp_assets.train", description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("config", help="the pipeline's YAML or JSON file")
    parser.add_argument("names", nargs="+", help="names of the SAEs to train")
    chosen = parser.parse_args(arguments)
    if os.environ.get(ATTACHED):
        _end_with_launcher()
    rank = int(os.environ["RANK"])
    config = load_config(chosen.config)
    is_cuda = choose_device(config.execution.device).type == "cuda"
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_cuda else "gloo")
    is_first = rank == 0
    if is_first:
        tell_compiling(lambda found: _tell("compiling", **found._asdict()))
    try:
        ranks = make_ranks(rank, int(os.environ["WORLD_SIZE"]), config.execution.latent_processes)
        store = open_pipeline_store(config)
        pipeline = load_pipeline(config, store)
        train_saes(
            pipeline,
            store,
            chosen.names,
            (lambda n: _tell("progress", n=n)) if is_first else unheard,
            (lambda metrics: _tell("metrics", **{**metrics._asdict(), "row": metrics.row._asdict()})) if is_first else None,
            ranks,
            (lambda name, error: _tell("failed", name=name, **_describe(error))) if is_first else (lambda _name, _error: None),
        )
    except InterpError as error:  # told by every rank: memory may run out on one of them alone
        _tell("error", **_describe(error))
        return 1
    finally:
        _tell("traffic", **METER.total()._asdict())
        dist.destroy_process_group()
    return 0


def _end_with_launcher() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)  # the threads that train are inside torch, and would not hear of it

    threading.Thread(target=wait, name="waits for the launcher's end", daemon=True).start()


def _describe(error: InterpError) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}


def _tell(event: str, **content: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **content}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
