"""Checks of bundles: what a page will open can be read."""

from collections.abc import Sequence
from typing import Final

from interp_assets.errors import ArtifactError
from interp_assets.planning.asset import Check, Shown, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.store import Store
from interp_assets.web.refs import attention_ref


def _read_back(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    from interp_assets.web.opened import BundlePlace, OpenAttention  # noqa: PLC0415 - a table of contents opens at once

    wrong: list[str] = []
    shown: dict[str, Shown] = {}
    try:
        bundle = OpenAttention(BundlePlace(store, attention_ref(pipeline).path))
        for name in bundle.head_names():
            bundle.head(name)
        for prompt in bundle.description["prompts"]:
            bundle.prompt(prompt["name"])
        shown = {"heads": len(bundle.head_names()), "prompts": len(bundle.description["prompts"])}
    except ArtifactError as error:
        wrong.append(str(error))
    return dict.fromkeys(keys, Verdict(wrong, shown))


READS_BACK: Final = Check("bundle_reads_back", "Every head's record and every prompt's pattern can be read from the bundle.", _read_back)
