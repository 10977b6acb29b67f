"""The configuration models become a commented YAML file to start from: every field, its default and its sentence."""

import json
from typing import Any

from pydantic import BaseModel

from interp_assets.planning.config import PipelineConfig

_HEAD = """\
# A pipeline of interp-assets: from text to features. Run it with
#     interp run --config {name}
# Every field has a default, shown here; delete what you do not change. `identity` fields decide bytes: changing one makes new artifacts
# beside the old ones. Fields marked "Execution" only decide how the work is done.
"""


def make_starter(name: str) -> str:
    """Return the text of a starter configuration that will be saved as `name`."""
    lines = [_HEAD.format(name=name)]
    for field_name, field in PipelineConfig.model_fields.items():
        value = field.default
        if isinstance(value, BaseModel):
            lines += ["", f"# {_first_line(value)}", f"{field_name}:", *_fields(value, "  ")]
        elif isinstance(value, list) and value:
            lines += ["", f"# {_first_line(value[0])} More items make a sweep: they share one read of the data.", f"{field_name}:"]
            lines += [line for item in value for line in _item(item)]
        else:
            lines += [f"# {field.description}", f"{field_name}: {_scalar(value)}"]
    return "\n".join(lines) + "\n"


def _fields(model: BaseModel, indent: str) -> list[str]:
    lines = []
    for name, field in type(model).model_fields.items():
        lines += [f"{indent}# {field.description}", f"{indent}{name}: {_scalar(getattr(model, name))}"]
    return lines


def _item(model: BaseModel) -> list[str]:
    """Write one item of a list: its first field carries the dash."""
    lines = _fields(model, "    ")
    first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
    lines[first] = "  - " + lines[first].lstrip()
    return ["  " + line.lstrip() for line in lines[:first]] + lines[first:]


def _first_line(model: BaseModel) -> str:
    return (type(model).__doc__ or "").splitlines()[0]


def _scalar(value: Any) -> str:
    """Write a value as YAML; JSON is YAML."""
    return json.dumps(dict(value) if isinstance(value, BaseModel) else value)
