"""A working directory that somebody else has filled: files named like modules, which leave a mark when they are run."""

from pathlib import Path

NAMES = (
    *(
        "gql",
        "torch",
        "dagster",
        "numpy",
        "yaml",
        "json",
        "ctypes",
        "signal",
        "logging",
        "argparse",
        "random",
        "asyncio",
        "sitecustomize",
        "usercustomize",
    ),
    *(
        "dagster_webserver",
        "dagster_graphql",
        "grpc",
        "uvicorn",
        "h11",
        "websockets",
        "starlette",
        "pydantic",
        "sqlalchemy",
        "alembic",
        "interp_assets",
    ),
    *(
        "resources",
        "transformers",
        "tokenizers",
        "safetensors",
        "numba",
        "polars",
        "pyarrow",
        "fsspec",
        "s3fs",
        "duckdb",
        "matplotlib",
        "PIL",
        "triton",
    ),
    *("ray", "polyfactory", "upath", "dotenv", "tqdm", "psutil", "click", "rich", "typer", "scipy", "pandas", "orjson", "uvloop", "httptools"),
)


class Traps:
    """A folder of traps, and what of them has run."""

    def __init__(self, folder: Path) -> None:
        """Fill a folder."""
        self.folder, self._marks = folder, folder.parent / f"{folder.name}-ran"
        folder.mkdir()
        self._marks.mkdir()
        for name in NAMES:
            (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(self._marks / name)!r}).touch()\nraise SystemExit(99)\n")

    def ran(self) -> list[str]:
        """Name the modules that were run."""
        return sorted(path.name for path in self._marks.iterdir())
