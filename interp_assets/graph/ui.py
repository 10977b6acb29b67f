"""Dagster's UI behind our guard: what `dagster dev` starts (code servers, daemon, webserver), with a webserver that does not obey every page.

Whoever reaches Dagster's webserver runs code with it, and it takes mutations by GET, with any Host and Origin: any page in the same browser
reaches it. So the webserver's application is built here, and `web/guard.py` stands before it. Beyond the loopback address it asks for the
token in INTERP_TOKEN. A program of its own (`python -P -m interp_assets.graph.ui`), which `processes.py` starts and stops by SIGINT:

    this process    the webserver, and the manager of code servers, which are its children
    a child         the daemon: sensors, queue, backfills; when it ends, the webserver does

Modules are loaded with this package's folder as their working directory, which Dagster puts first on the module path: by itself it takes
the current directory, and runs what lies there under the name of a module.
"""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import uvicorn
import yaml
from dagster import DagsterInstance
from dagster._cli.proxy_server_manager import ProxyServerManager
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget, WorkspaceFileTarget
from dagster._utils.log import configure_loggers
from dagster_shared.ipc import get_ipc_shutdown_pipe, send_ipc_shutdown_message
from dagster_webserver.app import create_app_from_workspace_process_context
from dagster_webserver.version import __version__

from interp_assets.web.connections import make_server
from interp_assets.web.guard import App, Guard, Rules
from interp_assets.web.server import check_bind

MODULE: Final = "interp_assets.graph.definitions"
TOKEN_VARIABLE: Final = "INTERP_TOKEN"  # noqa: S105 - a name
HEADERS: Final = (
    (b"content-security-policy", b"frame-ancestors 'none'"),  # besides Dagster's own, and both hold
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
RULES: Final = Rules(headers=HEADERS, query_bytes=12 << 10, body_bytes=8 << 20, posted=("/graphql",), command="interp dev")
"""Bodies name partitions, of which a backfill may have many."""
_TRUSTED: Final = Path(__file__).parents[2]
"""The folder that holds this package."""
_STATEMENT_MS, _POOL_RECYCLE_S, _POOL_OVERFLOW = 15_000, 3600, 20
"""What Dagster's webserver sets for its database connections."""
_STOP_S: Final = 10


def guard_ui(app: App, token: str | None = None) -> Guard:
    """Stand before Dagster's application; with a token any host name is answered, without one those of this machine."""
    return Guard(app, token, ("*",) if token else (), RULES)


def serve_ui(host: str, port: int) -> None:
    """Serve until interrupted, or until the daemon ends. Raises `ConfigError` for another address than the loopback one and no token."""
    token = os.environ.get(TOKEN_VARIABLE)
    check_bind(host, token)
    with ExitStack() as stack:
        instance = stack.enter_context(DagsterInstance.get())
        workspace = stack.enter_context(_start_code_servers(instance))
        daemon = stack.enter_context(_start_daemon(workspace))
        instance.optimize_for_webserver(_STATEMENT_MS, _POOL_RECYCLE_S, _POOL_OVERFLOW)
        target = WorkspaceFileTarget([str(workspace)])
        context = stack.enter_context(WorkspaceProcessContext(instance, target, __version__, read_only=False, code_server_log_level="warning"))
        server = make_server(guard_ui(create_app_from_workspace_process_context(context), token), host, port)
        threading.Thread(target=_end_with, args=(daemon, server), daemon=True).start()
        server.run()


@contextmanager
def _start_code_servers(instance: DagsterInstance) -> Iterator[Path]:
    """Start the code servers, which are started again when they end, and yield the workspace file that names them."""
    target = ModuleTarget(MODULE, attribute=None, working_directory=str(_TRUSTED), location_name=None)
    with ProxyServerManager(instance, target, "warning") as manager, TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace.yaml"
        workspace.write_text(yaml.safe_dump({"load_from": manager.get_code_server_specs()}), encoding="utf-8")
        yield workspace


@contextmanager
def _start_daemon(workspace: Path) -> Iterator[subprocess.Popen[bytes]]:
    read_end, write_end = get_ipc_shutdown_pipe()
    command = [sys.executable, "-P", "-m", "dagster._daemon", "run", "--shutdown-pipe", str(read_end), "--workspace", str(workspace)]
    process = subprocess.Popen(command, pass_fds=[read_end])  # noqa: S603 - our own interpreter
    try:
        yield process
    finally:
        with suppress(BrokenPipeError):
            send_ipc_shutdown_message(write_end)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with(daemon: subprocess.Popen[bytes], server: uvicorn.Server) -> None:
    daemon.wait()
    server.should_exit = True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Dagster's UI and daemon for the pipeline of INTERP_CONFIG, in DAGSTER_HOME.")
    parser.add_argument("--host", default="127.0.0.1", help="other addresses need a token in INTERP_TOKEN")
    parser.add_argument("--port", type=int, default=3000)
    options = parser.parse_args()
    configure_loggers()
    with suppress(KeyboardInterrupt):
        serve_ui(options.host, options.port)
