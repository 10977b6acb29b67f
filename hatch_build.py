"""Builds the browser's pages into the wheel and the sdist, so that installing either needs no Node.

Standard builds run `frontend/build.py`, which does nothing when the pages are current. An editable install never builds: a checkout's
Makefile does, when the pages are needed.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class FrontendHook(BuildHookInterface):  # type: ignore[type-arg]
    """Run the front-end build before hatchling collects files."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Ask for Node from PyPI when the pages must be built and the machine has none."""
        script = self._load_script()
        return [script.NODE_PACKAGE] if script.needs_node_package() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the pages, unless this is an editable install."""
        del build_data
        if version == "editable":
            return
        script = self._load_script()
        try:
            self.app.display_info(f"front end: {script.build()}")
        except script.BuildError as error:
            sys.exit(f"front end: {error}")

    def _load_script(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("frontend_build", Path(self.root) / "frontend" / "build.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
