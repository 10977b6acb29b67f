"""A recipe, as people write it in YAML or in a notebook, becomes the edits of a plan: what is set or added, how strongly, and where.

    model: EleutherAI/pythia-160m        # optional: refused for another model
    edits:
      - {sae: l8, latent: 1234, clamp: 10 max}
      - {sae: l8, latent: 77, add: 0.2 norm, where: generated, if: {sae: l8, latent: 5, above: 0.5 max}}
      - {point: resid_post.8, vector: calm.safetensors, add: 0.1 norm, where: assistant}
      - {point: z.3, heads: [1], patch: zero, where: "0:12"}
      - {freeze: "pattern.*"}

`where` is `all` (unless said), `prompt`, `generated`, `assistant`, a position, a list or a slice; special tokens are left alone unless
`special: true`. An entry does one thing. Strengths are those of `strengths.py`.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.backend import WritingBackend
from interp_assets.garcon.plan import Add, Cap, Edit, Patch, ProjectOut, SaeAdd, SaeClamp, Scale, Span, TensorName, When, name_tensor

Strength = str | float
"""A number with its unit; a number alone is read, to be refused with what to write."""
_KEYS: Final = ("sae", "point", "freeze")
_MAX_BYTES: Final = 1 << 20


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True, populate_by_name=True)


class Condition(_Entry):
    """Where an edit takes place: at positions where a latent fires above a value."""

    sae: str
    latent: Annotated[int, Field(ge=0)]
    above: Strength = "0 raw"


class _Placed(_Entry):
    where: Literal["all", "prompt", "generated", "assistant"] | int | tuple[int, ...] | Span = "all"
    """Positions; `2:8` in a file, a slice in Python."""
    special: bool = False
    """Write at special tokens too."""
    condition: Condition | None = Field(default=None, alias="if")

    @field_validator("where", mode="before")
    @classmethod
    def _read_slice(cls, value: object) -> object:
        if isinstance(value, slice):
            return Span(start=value.start, stop=value.stop, step=value.step)
        if isinstance(value, str) and ":" in value:
            ends = [None if not part.strip() else int(part) for part in value.split(":")]
            return Span(**dict(zip(("start", "stop", "step"), ends, strict=False)))
        return value


class SaeEntry(_Placed):
    """Set a latent of an SAE, or add its decoder row."""

    sae: str
    latent: Annotated[int, Field(ge=0)]
    clamp: Strength | None = None
    """What the latent is set to; what the SAE does not explain stays."""
    add: Strength | None = None
    """How much of its decoder row is added."""

    @model_validator(mode="after")
    def _check(self) -> "SaeEntry":
        _one_of(self, ("clamp", "add"))
        return self


class PointEntry(_Placed):
    """Write at a hook point."""

    point: str
    heads: tuple[int, ...] | None = None
    vector: str | tuple[float, ...] | Tensor | None = None
    """A vector, or a safetensors file of one tensor, beside the recipe."""
    add: Strength | None = None
    """How much of the vector is added."""
    cap: Strength | None = None
    """How far the activation may point along the vector."""
    project_out: bool | None = None
    """Take away what points along the vector."""
    scale: float | None = None
    """Multiply the activation."""
    patch: Literal["zero", "vector"] | None = None
    """Put zero, or the vector, in its place."""

    @model_validator(mode="after")
    def _check(self) -> "PointEntry":
        action = _one_of(self, ("add", "cap", "project_out", "scale", "patch"))
        if (self.vector is None) == (action in ("add", "cap", "project_out") or self.patch == "vector"):
            raise ValueError(f"{action} takes {'a' if self.vector is None else 'no'} vector here")
        return self


class FreezeEntry(_Entry):
    """Keep points as they are over the same tokens without the edits."""

    freeze: str | tuple[str, ...]


def _one_of(entry: BaseModel, actions: Sequence[str]) -> str:
    found = [name for name in actions if getattr(entry, name) not in (None, False)]
    if len(found) != 1:
        raise ValueError(f"says {' and '.join(found) or 'nothing to do'}; an entry does one of {', '.join(actions)}")
    return found[0]


def _kind_of(value: Any) -> str | None:
    return next((key for key in _KEYS if (key in value if isinstance(value, Mapping) else hasattr(value, key))), None)


Entry = Annotated[
    Annotated[SaeEntry, Tag("sae")] | Annotated[PointEntry, Tag("point")] | Annotated[FreezeEntry, Tag("freeze")],
    Discriminator(
        _kind_of,
        custom_error_type="entry",
        custom_error_message="An entry names `sae` and `latent`, or `point`, or `freeze`",
    ),
]


class Recipe(_Entry):
    """Edits under one name."""

    model: str = ""
    """The model that it is for; empty for any."""
    edits: Annotated[tuple[Entry, ...], Field(min_length=1)]
    folder: str = Field(default="", exclude=True)
    """Where files of vectors lie."""


Steer = str | Path | Recipe | Sequence[Mapping[str, Any]]
"""A recipe's file, a recipe, or its entries."""


class Edits(NamedTuple):
    """A recipe in the words of a plan."""

    edits: tuple[Edit, ...]
    freeze: tuple[str, ...]
    tensors: dict[str, Tensor]
    """By digest."""


def load_recipe(given: Steer) -> Recipe:
    """Read a recipe. Raises `InputError` that names the entry, the field and what is allowed."""
    if isinstance(given, Recipe):
        return given
    content: Any = {"edits": given}
    where = "The recipe"
    if isinstance(given, str | Path):
        path = Path(given)
        where = f"The recipe {path}"
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{where} has {path.stat().st_size:,} bytes; a recipe has at most {_MAX_BYTES:,}.")
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{where} is not there{suggest(path.name, _recipes_in(path.parent))}. Give the path of a YAML file.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where} cannot be read: {error}. Give the path of a YAML file, or a list of edits.") from error
        except yaml.YAMLError as error:
            raise InputError(f"{where} is no YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(content, Mapping):
            raise InputError(f"{where} must be a mapping with `edits`, a list; found a {type(content).__name__}.")
        content = {**content, "folder": str(path.parent)}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
        place = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = f"there is no such field{suggest(str(first['loc'][-1]), _fields_beside(first['loc']))}"
        if first["type"] == "entry" and isinstance(first["input"], Mapping):
            said += next((hint for key in first["input"] if (hint := suggest(str(key), _KEYS))), "")
        raise InputError(f"{where} is wrong{f' at {place}' if place else ''}: {said}.") from error


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a question after the nearest known name; nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _recipes_in(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.y*ml")] if folder.is_dir() else []


def _fields_beside(loc: Sequence[int | str]) -> list[str]:
    """List the fields that may stand where an unknown one does, as people write them."""
    kinds: dict[str, type[BaseModel]] = {"sae": SaeEntry, "point": PointEntry, "freeze": FreezeEntry}
    kind = Condition if "if" in loc[:-1] else next((kinds[part] for part in loc if isinstance(part, str) and part in kinds), Recipe)
    return [field.alias or name for name, field in kind.model_fields.items()]


def make_edits(recipe: Recipe, backend: WritingBackend) -> Edits:
    """Resolve a recipe for a model: names of points, files of vectors, strengths. Raises `InputError` for what the model does not have."""
    if recipe.model and recipe.model != backend.name:
        raise InputError(f"The recipe is for {recipe.model!r}; the model is {backend.name!r}. Load that one, or take `model` out of the recipe.")
    tensors: dict[str, Tensor] = {}
    edits, freeze = [], []
    for entry in recipe.edits:
        if isinstance(entry, FreezeEntry):
            freeze += [entry.freeze] if isinstance(entry.freeze, str) else list(entry.freeze)
            continue
        when = None
        if (given := entry.condition) is not None:
            when = When(sae=given.sae, latent=given.latent, above=backend.latent_strength(given.above, given.sae, given.latent))
        is_sae = isinstance(entry, SaeEntry)
        write: Any = _sae_write(entry, backend, when) if is_sae else _point_write(entry, recipe.folder, backend, when, tensors)
        where = (entry.where,) if isinstance(entry.where, int) else entry.where
        try:
            edits.append(Edit(write=write, where=where, special=entry.special))
        except ValidationError as error:
            raise InputError(f"The recipe is wrong: {error.errors(include_url=False)[0]['msg'].removeprefix('Value error, ')}.") from error
    return Edits(tuple(edits), tuple(freeze), tensors)


def _sae_write(entry: SaeEntry, backend: WritingBackend, when: When | None) -> SaeClamp | SaeAdd:
    written = entry.clamp if entry.clamp is not None else entry.add
    assert written is not None
    value = backend.latent_strength(written, entry.sae, entry.latent)
    kind = SaeClamp if entry.clamp is not None else SaeAdd
    return kind(point=backend.saes[entry.sae].written_at, sae=entry.sae, latents=(entry.latent,), values=(value,), when=when)


def _point_write(entry: PointEntry, folder: str, backend: WritingBackend, when: When | None, tensors: dict[str, Tensor]) -> Any:
    name = backend.find_point(entry.point)
    at: dict[str, Any] = {"point": name, "heads": entry.heads, "when": when}
    if entry.scale is not None:
        return Scale(times=entry.scale, **at)
    if entry.patch == "zero":
        return Patch(value="zero", **at)
    vector = _load_vector(entry, folder)
    value = _keep(vector, tensors)
    if entry.project_out:
        return ProjectOut(value=value, **at)
    if entry.patch == "vector":
        return Patch(value=value, **at)
    if entry.cap is not None:
        return Cap(value=value, limit=backend.vector_strength(entry.cap, name, 1.0), **at)
    assert entry.add is not None
    return Add(value=value, times=backend.vector_strength(entry.add, name, float(vector.norm())), **at)


def _load_vector(entry: PointEntry, folder: str) -> Tensor:
    given = entry.vector
    if isinstance(given, str):
        path = Path(folder) / given
        try:
            found = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(
                f"The vector {str(path)!r} at {entry.point!r} cannot be read: {error}. Give a safetensors file of one tensor."
            ) from error
        if len(found) != 1:
            raise InputError(f"The vector {str(path)!r} at {entry.point!r} holds {len(found)} tensors: {sorted(found)}. Give a file of one.")
        return next(iter(found.values())).float()
    return given.detach().float() if isinstance(given, Tensor) else torch.tensor(given)


def _keep(tensor: Tensor, tensors: dict[str, Tensor]) -> TensorName:
    name = name_tensor(tensor)
    tensors[name.tensor] = tensor
    return name
