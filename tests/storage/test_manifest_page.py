"""The page on manifests describes what the code reads and writes."""

from pathlib import Path

from interp_assets.storage.manifest import decode_manifest, encode_manifest

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "manifest.md"


def _example() -> bytes:
    return PAGE.read_text(encoding="utf-8").partition("```json\n")[2].partition("\n```")[0].encode()


def test_the_example_is_a_manifest_to_the_last_byte() -> None:
    """A page that nobody executes drifts."""
    manifest = decode_manifest(_example(), "the page")
    assert encode_manifest(manifest) == _example()
    assert manifest.file("rows.bin").n_bytes == 3


def test_every_field_is_described() -> None:
    """A new field needs a line on the page."""
    table = PAGE.read_text(encoding="utf-8")
    manifest = decode_manifest(_example(), "the page")
    for name in [*vars(manifest), *vars(manifest.files[0]), "format", "version", "digest", "seal"]:
        assert f"`{name}`" in table or f"`{name}[]`" in table, f"docs/formats/manifest.md does not describe {name}"
