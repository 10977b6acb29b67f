"""`interp check`: an architecture of one's own becomes a table of what training will ask of it, a line as soon as it is known."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from interp_assets.errors import InputError
from interp_assets.planning.config import find_code, make_config
from interp_assets.planning.grammar import set_values
from interp_assets.planning.own import split_name

_WIDTH = 10


def print_check(out: Console, name: str, settings: Sequence[str]) -> bool:
    """Check `my_sae.py:function`, with fields of its SAE as `k=4`; return whether nothing failed. Raises `InputError` for another name."""
    named = split_name(name)
    if named is None:
        raise InputError(f"{name!r} names no function in a file, such as my_sae.py:p_anneal.")
    from interp_assets.train.own.check import SIZES, check_architecture  # noqa: PLC0415 - brings torch; a wrong name is told at once

    content = {"saes": [{"name": "checked", "architecture": name, **SIZES}], "features": {"saes": []}}
    content = set_values(content, [f"saes.checked.{setting}" for setting in settings])
    config = find_code(make_config(content, "the SAE that is checked"), Path.cwd())
    if len(config.saes) != 1:
        raise InputError("One architecture is checked at a time: give one value of each field.")
    is_sound = True
    for finding in check_architecture((Path.cwd() / Path(named[0]).expanduser()).read_bytes(), config.saes[0]):
        is_sound &= finding.is_sound
        verdict = "ok    " if finding.is_sound else "FAILED"
        out.print(f"{verdict}  {finding.check:{_WIDTH}}{finding.said}", style=None if finding.is_sound else "red", soft_wrap=True, markup=False)
    return is_sound
