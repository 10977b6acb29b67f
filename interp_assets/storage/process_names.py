"""A process becomes a name that no later process has, and a name becomes the answer whether its process may still run.

A process id alone does not say: after a reboot, or when a container starts again, some other process soon has it. A name holds

    machine:process id:start:boot:namespace

where start (clock ticks since boot) and boot (a random id of every boot) make the id unique, and namespace is that of process ids. What
cannot be read, on systems without /proc, stays empty and is not compared. A process in another namespace of the same machine cannot be seen.
It is believed to run, unless it is older than everything in the namespace that asks: then the container was started again.

File names that may only hold digits carry the same as a number, in which machine and boot are checksums: two machines in a hundred thousand
look like one, and then ids, start and boot still have to agree.

Nothing here ends a process. Sources: proc_pid_stat(5), random(4), pid_namespaces(7).
"""

import os
import socket
import zlib
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_PARTS: Final = {"machine": 5, "boot": 6, "namespace": 10, "process_id": 10, "started": 15}
"""Digits of each part of a number."""
NUMBER_DIGITS: Final = sum(_PARTS.values())


def name_process() -> str:
    """Return the name of this process."""
    process_id = os.getpid()
    return ":".join([socket.gethostname(), str(process_id), _started(process_id), _boot(), _namespace()])


def may_run(name: str) -> bool:
    """Say whether the process of a name may run; of another machine's, and of one that nothing is known of, it is believed."""
    machine, process_id, started, boot, namespace = [*name.split(":"), *[""] * 4][:5]
    if machine != socket.gethostname() or not process_id.isdecimal():
        return True
    if _differ(boot, _boot()):
        return False
    if _differ(namespace, _namespace()):
        first = _started(1)
        return not (started and first) or int(started) >= int(first)
    return is_alive(int(process_id)) and not _differ(started, _started(int(process_id)))


def number_process() -> str:
    """Return the name of this process in `NUMBER_DIGITS` digits."""
    machine, process_id, started, boot, namespace = name_process().split(":")
    found = {"process_id": process_id, "started": started, "namespace": namespace}
    found |= {"machine": _checksum(machine, "machine"), "boot": _checksum(boot, "boot")}
    return "".join(found[part].rjust(n_digits, "0") for part, n_digits in _PARTS.items())


def may_run_number(number: str) -> bool:
    """Say whether the process of a number may run, as `may_run` does."""
    parts, at = {}, 0
    for part, n_digits in _PARTS.items():
        parts[part], at = number[at : at + n_digits].lstrip("0"), at + n_digits
    machine, boot = socket.gethostname(), _boot()
    if parts["machine"] != _checksum(machine, "machine"):
        return True
    same_boot = parts["boot"] == _checksum(boot, "boot")
    return may_run(":".join([machine, parts["process_id"], parts["started"], boot if same_boot else "another", parts["namespace"]]))


def is_alive(process_id: int) -> bool:
    """Say whether any process, anybody's, has this id now."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _checksum(text: str, part: str) -> str:
    return str(zlib.crc32(text.encode()) % 10 ** _PARTS[part]).lstrip("0")


def _differ(said: str, found: str) -> bool:
    return bool(said and found) and said != found


def _started(process_id: int) -> str:
    """Return field 22 of a process's stat; its second, the command in parentheses, may hold anything."""
    fields = _read(_PROC / str(process_id) / "stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _boot() -> str:
    return _read(_PROC / "sys" / "kernel" / "random" / "boot_id").strip()


def _namespace() -> str:
    try:
        return (_PROC / "self" / "ns" / "pid").readlink().name.removeprefix("pid:[").removesuffix("]")
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
