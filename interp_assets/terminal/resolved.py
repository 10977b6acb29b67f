"""A configuration becomes YAML with everything that was left to defaults and ranges written out: `interp config`."""

import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from rich.console import Console

from interp_assets.planning.config import PipelineConfig, SaeConfig
from interp_assets.planning.options import find_unread
from interp_assets.planning.progress import format_count
from interp_assets.planning.sections import CorpusConfig


def print_config(out: Console, err: Console, config: PipelineConfig) -> None:
    """Print what a configuration comes to, a line an SAE, as YAML that can be saved; on `err` what of it decides nothing.

    Of the corpus, fields that its source does not read are left out where they are not set.
    """
    for name, value in config:
        if isinstance(value, BaseModel):
            idle = value.unread - value.model_fields_set if isinstance(value, CorpusConfig) else ()
            lines = [f"{name}:", *(f"  {key}: {json.dumps(to_jsonable_python(item))}" for key, item in value if key not in idle)]
        else:
            lines = [f"{name}: {json.dumps(value)}"] if value is not None and name != "saes" else []
        if lines:
            out.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    out.print(f"saes:  # {len(config.saes):,}, with what differs from the defaults", soft_wrap=True, markup=False, highlight=False)
    for sae in config.saes:
        out.print(f"  - {json.dumps(_stated(sae))}", soft_wrap=True, markup=False, highlight=False)
    for sentence in find_idle(config):
        err.print(sentence, soft_wrap=True, markup=False, highlight=False)


def find_idle(config: PipelineConfig) -> list[str]:
    """Say which fields of the corpus and of SAEs are set and read by nothing, one sentence a field and architecture."""
    found: dict[tuple[str, str], list[str]] = {}
    for sae in config.saes:
        if not sae.imported:
            for field in find_unread(sae.architecture, sae.model_fields_set):
                found.setdefault((field, sae.architecture), []).append(sae.name)
    corpus = config.corpus
    return [
        *(f"`corpus.{field}` decides nothing for source {corpus.source}" for field in sorted(corpus.unread & corpus.model_fields_set)),
        *(_name_idle(field, architecture, names) for (field, architecture), names in found.items()),
    ]


def _name_idle(field: str, architecture: str, names: list[str]) -> str:
    return (
        f"`{field}` decides nothing for {architecture}: {format_count(len(names), 'SAE')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    )


def _stated(sae: SaeConfig) -> dict[str, Any]:
    defaults = SaeConfig().model_dump(mode="json")
    shown = ("name", "hook_point", "architecture")
    return {key: value for key, value in sae.model_dump(mode="json").items() if key in shown or value != defaults.get(key)}
