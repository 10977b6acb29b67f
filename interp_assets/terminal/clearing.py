"""What nothing refers to, as a table and a list with sizes, and then gone: `interp gc`. What it is, `graph/leftovers.py` decides."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from rich.console import Console

from interp_assets.errors import InputError
from interp_assets.graph.leftovers import delete_leftovers, find_leftovers
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import open_pipeline_store
from interp_assets.planning.progress import format_count
from interp_assets.terminal.console import format_bytes, print_table
from interp_assets.terminal.forecast import plan_aside

SHOWN: Final = 50


def clear(console: Console, configs: Sequence[PipelineConfig], *, forget: Sequence[str], hours: float, delete: bool) -> None:
    """List what may go, and delete it when asked. Raises `InputError` for configurations of several folders, and like `find_leftovers`."""
    places = {(config.root, config.name) for config in configs}
    if len(places) > 1:
        listed = ", ".join(f"{root}/{name}" for root, name in sorted(places))
        raise InputError(f"These configurations use several folders ({listed}). Clear one folder at a time, and name all that use it.")
    store = open_pipeline_store(configs[0])
    found = find_leftovers(store, [plan_aside(config, store) for config in configs], min_age=timedelta(hours=hours), forget=forget)
    young = f"; {found.n_young:,} more are younger than {hours:g} h (--hours)" if found.n_young else ""
    if not found.items and not found.remains:
        console.print(f"Nothing in {store.url} may go{young}.", soft_wrap=True, markup=False)
        return
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for item in found.items:
        sizes[item.kind or "file of no artifact"].append(item.n_bytes)
    sizes |= {"remains of killed writers": [path.stat().st_size for path in found.remains]} if found.remains else {}
    print_table(console, ["kind", "how many", "size"], [(kind, len(parts), format_bytes(sum(parts))) for kind, parts in sorted(sizes.items())])
    listed = [(item.path, item.n_bytes) for item in found.items] + [(str(path), path.stat().st_size) for path in found.remains]
    for path, n_bytes in sorted(listed, key=lambda pair: -pair[1])[:SHOWN]:
        console.print(f"  {format_bytes(n_bytes):>9}  {path}", soft_wrap=True, markup=False)
    if len(listed) > SHOWN:
        console.print(f"  and {len(listed) - SHOWN:,} smaller ones", soft_wrap=True)
    counted = f"{format_count(len(listed), 'thing')}, {format_bytes(found.n_bytes)}"
    if delete:
        delete_leftovers(store, found)
        console.print(f"Deleted {counted}{young}.", soft_wrap=True)
    else:
        console.print(f"{counted} may go{young}. Nothing refers to them; --delete deletes them.", soft_wrap=True)
