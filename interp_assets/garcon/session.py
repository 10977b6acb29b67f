"""What a person types becomes a plan: texts, tokens and names of points, for a model that is loaded here or on a server.

    llm = lab.load("EleutherAI/pythia-160m")  # or lab.connect("http://gpu7:8420", "pythia-160m"): the same words, the same results
    clean = llm.run("When Mary and John went, John gave to", read=["z.*"])
    with llm.trace("When Mary and Anna went, Anna gave to") as t:  # runs when the block ends; the order of the lines is free
        t.patch("z.8", clean["z.8"], heads=[3])
        d = t.logit_diff(" Mary", " Anna")
        g = t.grad(d, at=["resid_post.*"])

Every result is a copy with a leading axis of rows, also for a single text. Texts are tokenized as the tokenizer itself does, with the special
tokens that it adds; lists of token ids are taken as they are. Where the model is, `backend.py` hides: nothing here needs transformers.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import polars as pl
import torch
from pydantic import ValidationError
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Backend, Chats, PointRow, Token, WritingBackend
from interp_assets.garcon.metrics import MetricOp
from interp_assets.garcon.plan import (
    Add,
    Attribute,
    Cap,
    Divergence,
    Freeze,
    Grad,
    LogitDiff,
    LogProb,
    Loss,
    Patch,
    Plan,
    ProjectOut,
    Read,
    ReadName,
    ReducePlan,
    SaeAdd,
    SaeClamp,
    SaeRead,
    Scale,
    Span,
    TensorName,
    When,
    explain_plan,
    name_tensor,
)
from interp_assets.garcon.results import Grid, Result, Results, tabulate_tokens
from interp_assets.garcon.steering.dose import Dose, Dosing, run_dose
from interp_assets.garcon.steering.recipe import Edits, Steer, load_recipe, make_edits
from interp_assets.garcon.steering.strengths import split_strength
from interp_assets.garcon.steering.texts import Sampling, Texts, is_chat, make_generate_plan, odd_saes
from interp_assets.planning.hook_names import BY_HEAD
from interp_assets.planning.progress import format_count

if TYPE_CHECKING:
    import interp_assets.garcon.features
    import interp_assets.garcon.patterns.view
    import interp_assets.garcon.subject

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor
Where = int | str | slice | Sequence[int] | None
Names = str | Sequence[str]
Value = Tensor | Result | str


class Model:
    """A model: what can be read of it, and traces, sweeps and attributions over it."""

    def __init__(
        self,
        subject: "interp_assets.garcon.subject.SubjectModel",
        tokenizer: Any,
        saes: "Mapping[str, interp_assets.garcon.features.AttachedSae] | None" = None,
    ) -> None:
        """Take a subject model, the tokenizer that belongs to it, and SAEs by name."""
        from interp_assets.garcon.local import LocalBackend  # noqa: PLC0415 - brings transformers, which a client does without

        self.backend: Any = LocalBackend(subject, tokenizer, saes)

    @classmethod
    def over(cls, backend: Backend) -> "Model":
        """Take a model wherever it is."""
        made = cls.__new__(cls)
        made.backend = backend
        return made

    def __repr__(self) -> str:
        """Say which model it is, and which SAEs it has."""
        name = getattr(self.backend, "name", "a model")
        return f"{name}, SAEs {list(self.saes)}" if self.saes else name

    @property
    def subject(self) -> "interp_assets.garcon.subject.SubjectModel":
        """The network itself. Raises `InputError` where it is on a server."""
        return self._here("subject")

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer. Raises `InputError` where it is on a server."""
        return self._here("tokenizer")

    @property
    def saes(self) -> Mapping[str, Any]:
        """SAEs by name."""
        return self.backend.saes

    @saes.setter
    def saes(self, saes: "Mapping[str, interp_assets.garcon.features.AttachedSae]") -> None:
        self.backend.saes = saes

    def attach(self, name: str, sae: Any, hook_point: str, *, target: str = "", more: Sequence[str] = (), text: str | None = None) -> None:
        """Add an SAE of any origin: what encodes rows of `hook_point` (a crosscoder's `more`) and has decoder rows, a transcoder's at `target`.

        It is tried on a short text first; `text` is one of your own. Raises `InputError` for one that explains less than nothing there.
        """
        from interp_assets.garcon.features import AttachedSae  # noqa: PLC0415 - a client has none

        attached = AttachedSae(sae, self.backend.find_point(hook_point), target and self.backend.find_point(target), tuple(self.names(more)))
        self._here("attach")(name, attached, self.tokenize(text) if text else None)

    def _here(self, name: str) -> Any:
        if not hasattr(self.backend, name):
            raise InputError(f"The model is on a server, and its {name} with it. Load it here by `lab.load` to hold it in your hands.")
        return getattr(self.backend, name)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Canonical names by what was asked for: patterns are matched once."""
        return {}

    @cached_property
    def _point_names(self) -> list[str]:
        return [point.name for point in self.backend.list_points() if not point.refused]

    def points(self, pattern: str = "*") -> pl.DataFrame:
        """Return name, shape, module, TransformerLens' name of every point that fits a pattern, and for those that are not there the reason."""
        found = [point for point in self.backend.list_points() if fnmatch.fnmatchcase(point.name, pattern)]
        return pl.DataFrame(found, dict.fromkeys(PointRow._fields, pl.String), orient="row")

    def tokenize(self, prompt: Prompt) -> list[list[int]]:
        """Return the token ids of each row. Raises `InputError` for an empty prompt."""
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        items: Any = [prompt] if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], int)) else list(prompt)
        texts = [item for item in items if isinstance(item, str)]
        tokenized = iter(self.backend.tokenize(texts, special=True) if texts else [])
        rows = [next(tokenized) if isinstance(item, str) else [int(token) for token in item] for item in items]
        if not rows or not all(rows):
            raise InputError("The prompt has a row without tokens: give a text, a list of texts, or token ids.")
        return rows

    def tokens(self, prompt: Any) -> pl.DataFrame:
        """Return one line a token of texts, token ids or conversations: how it is written, whether it is special, and whose words it is of."""
        return tabulate_tokens(self._prompts(prompt), self.backend.pieces, self.writing().special_tokens)

    def token(self, text: str) -> int:
        """Return the id of a text that is one token. Raises `InputError` with the ids that it is."""
        (ids,) = self.backend.tokenize([text], special=False)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {format_count(len(ids), 'token')}: {ids} ({self.pieces(ids)}). Name one token, or its id.")
        return ids[0]

    def names(self, wanted: Names) -> list[str]:
        """Return the canonical names of points; `z.*` or `blocks.*.attn.hook_z` is all layers. Raises `InputError` for what is not there."""
        names: list[str] = []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            if name not in self._names:
                found = fnmatch.filter(self._point_names, name) if "*" in name else [self.backend.find_point(name)]
                self._names[name] = found or self._all_layers(name)
            names += self._names[name]
        return list(dict.fromkeys(names))

    def _all_layers(self, name: str) -> list[str]:
        """Return the points of all layers for a name in TransformerLens' words with a star for the layer."""
        kind, _, layer = self.backend.find_point(name.replace("*", "0")).partition(".")
        if layer != "0":
            raise InputError(f"No hook point fits {name!r}: `*` stands for all layers of a point that has a name. Name modules one by one.")
        return fnmatch.filter(self._point_names, f"{kind}.*")

    def trace(self, prompt: Prompt, *, exact: bool = False, keep: bool = False) -> "Trace":
        """Begin a trace over one row or several.

        On a server others' traces may share its forward, which moves the last bits; with `exact` they do not. With `keep` results stay there
        for a while: later traces take them from there, and they come when somebody looks at their tensor.
        """
        return Trace(self, self.tokenize(prompt), exact=exact, keep=keep)

    def run(
        self, prompt: Prompt, read: Names, *, pos: Where = None, heads: Sequence[int] | None = None, exact: bool = False, keep: bool = False
    ) -> Results:
        """Read points in one forward; `exact` and `keep` as in `trace`."""
        with self.trace(prompt, exact=exact, keep=keep) as trace:
            results = {name: trace.read(name, pos=pos, heads=heads) for name in self.names(read)}
        return Results(results)

    def logit_diff(self, token: str | int, other: str | int, *, pos: int = -1) -> LogitDiff:
        """Return the metric: logit of one token less that of another, at a position."""
        return LogitDiff(name="metric", token=self._id(token), other=self._id(other), pos=pos)

    def logprob(self, token: str | int, *, pos: int = -1) -> LogProb:
        """Return the metric: log probability of a token at a position, in nats."""
        return LogProb(name="metric", token=self._id(token), pos=pos)

    def sweep(self, points: Names, prompt: Prompt, source: Mapping[str, Result] | str, metric: MetricOp, *, by: str = "position") -> Grid:
        """Put the source's activation into each cell, one at a time, and measure: exact, all cells in one growing batch.

        `by` is `position`, or `head` for all positions of one head. `source` are results of another run as long as this one, or `zero`.
        """
        rows = self.tokenize(prompt)
        if len(rows) != 1:
            raise InputError(f"A sweep is over one row; the prompt has {len(rows)}. Sweep each by itself.")
        names = self.names(points)
        tensors = source if isinstance(source, str) else {name: source[name].tensor for name in names}
        base, cells = self.backend.sweep(rows[0], names, tensors, metric, by)
        columns = self.pieces(rows[0]) if by == "position" else [f"head {head}" for head in range(cells.shape[1])]
        return Grid(cells, base, names, columns, f"{metric.metric} with one {by} from {'zero' if isinstance(source, str) else 'another run'}")

    def attribute(self, points: Names, prompt: Prompt, source: Mapping[str, Result] | str, metric: MetricOp) -> Results:
        """Estimate what `sweep` measures by one backward: derivative times change, [rows, positions] or [rows, positions, heads]."""
        with self.trace(prompt) as trace:
            return trace.attribute(trace.measure(metric), points, source)

    def weights(self, name: str, *, head: int | None = None) -> Tensor:
        """Return a copy of a weight by TransformerLens' name: `W_O.5`, `W_E` (`weights.py`). Raises `InputError` for what this model lacks."""
        return self.backend.weight(name, head)

    def generate(
        self,
        prompt: Prompt | Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        new_tokens: int,
        steer: Steer | None = None,
        n: int = 1,
        seed: int = 0,
        compare: bool = False,
        on_token: Callable[[Token], None] | None = None,
        latents: Mapping[str, Sequence[int]] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Texts:
        """Continue texts, token ids or conversations, with the edits of a recipe; `compare` continues them without, too.

        `temperature`, `top_k` and `top_p` say how tokens are drawn; without a temperature the most probable one is taken. `on_token` is handed
        every token as it comes, with what `latents` (by SAE) read at the position that it was drawn from. Raises `InputError` for what the model,
        an SAE or the recipe cannot do.
        """
        backend = self.writing()
        edits = self._edits(steer)
        told = [{"sae": sae, "latents": tuple(found)} for sae, found in (latents or {}).items()]
        options: dict[str, Any] = {"new_tokens": new_tokens, "n": n, "seed": seed, "compare": compare, "latents": told, **sampling}
        plan = make_generate_plan(backend, self._prompts(prompt), edits, **options)
        texts = Texts(plan, backend.generate(plan, edits.tensors, on_token), backend.decode)
        texts.warnings = odd_saes(backend.saes, [edit.write for edit in plan.edits])
        return texts

    def reduce(
        self, texts: Prompt, wanted: Mapping[str, Sequence[str]], *, special: bool = False, progress: Callable[[int], None] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return `mean`, `cov`, `norms`, `histogram` or `top:64` of points over many texts: `{"resid_post.5": ["mean", "top:64"]}`.

        Special tokens are left out unless `special`; `progress` is advanced by tokens. Raises `InputError` for what a point does not have.
        """
        backend = self.writing()
        reductions = {name: tuple(names) for point, names in wanted.items() for name in self.names(point)}
        content = {"rows": tuple(map(tuple, self.tokenize(texts))), "reductions": reductions, "special": () if special else backend.special_tokens}
        try:
            plan = ReducePlan.model_validate(content)
        except ValidationError as error:
            raise InputError(explain_plan(error)) from error
        return backend.reduce(plan, progress)

    def dose(
        self,
        steer: Steer,
        *,
        prompts: Any,
        strengths: Sequence[Any],
        unit: str = "max",
        new_tokens: int = 32,
        n: int = 1,
        seed: int = 0,
        **sampling: Unpack[Dosing],
    ) -> Dose:
        """Continue prompts under a recipe's one latent at each strength, and under controls that are moved as far: what does the feature itself do?

        Controls are another live latent of the same firing decile, a random direction, the opposite one, and the latent at zero. `metric` names
        tokens whose log probability is an outcome too. Raises `InputError` for a recipe with several latents or none.
        """
        backend = self.writing()
        edits = self._edits(steer)
        watch = tuple(self._id(token) for token in sampling.pop("metric", ()))
        options: dict[str, Any] = {"new_tokens": new_tokens, "n": n, "seed": seed, "watch": watch, **sampling}
        return run_dose(backend, self._prompts(prompts), edits, [f"{strength:g} {unit}" for strength in strengths], options)

    def writing(self) -> WritingBackend:
        """Return the model as one that writes texts. Raises `InputError` where its server does not."""
        if not isinstance(self.backend, WritingBackend):
            raise InputError("The server of this model writes no texts. Load the model here by `lab.load`.")
        return self.backend

    def _edits(self, steer: Steer | None) -> Edits:
        edits = Edits((), (), {}) if steer is None else make_edits(load_recipe(steer), self.writing())
        return edits._replace(freeze=tuple(self.names(edits.freeze)))

    def _prompts(self, prompt: Any) -> Chats:
        if is_chat(prompt):
            return self.writing().chats([prompt] if isinstance(prompt[0], Mapping) else prompt)
        return Chats(tuple(map(tuple, self.tokenize(prompt))), ())

    def attention(self, prompt: Prompt, layers: Sequence[int] | None = None) -> "interp_assets.garcon.patterns.view.Attention":
        """Return what every head looks at in one text; a notebook shows it.

        Raises `InputError` for several rows, a layer that does not attend, and where the model is on a server.
        """
        from interp_assets.garcon.patterns.view import read_attention  # noqa: PLC0415 - brings transformers, which a client does without

        rows = self.tokenize(prompt)
        if len(rows) != 1:
            raise InputError(f"Attention is shown of one text; the prompt has {len(rows)}. Ask for each by itself.")
        return read_attention(self.subject, rows[0], self.pieces(rows[0]), layers)

    def pieces(self, row: Sequence[int]) -> list[str]:
        """Return every token of a row as text."""
        return self.backend.pieces([row])[0]

    def _id(self, token: str | int) -> int:
        return self.token(token) if isinstance(token, str) else token


class Trace:
    """What one forward shall read, write and measure, gathered in a `with` block at whose end it runs."""

    def __init__(self, model: Model, rows: list[list[int]], *, exact: bool = False, keep: bool = False) -> None:
        """`Model.trace` makes it."""
        self._model, self._rows, self._exact, self._keeps = model, rows, exact, keep
        self._operations: list[Any] = []
        self._results: dict[str, Result] = {}
        self._derived: dict[str, Results] = {}
        self._tensors: dict[str, Tensor] = {}
        self.ran = False
        self.batch = (0, 0)
        """Rows and tokens of the forward that it ran in, strangers' rows too."""

    @cached_property
    def tokens(self) -> list[list[str]]:
        """Every row's tokens as text."""
        return self._model.backend.pieces(self._rows)

    def __enter__(self) -> "Trace":  # noqa: PYI034 - beartype knows Self in classes that it decorates whole
        """Begin to gather."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Run, unless the block failed."""
        if kind is None:
            self.execute()

    @property
    def plan(self) -> Plan:
        """What has been gathered so far. Raises `InputError` for what no model could do."""
        try:
            return Plan(rows=tuple(map(tuple, self._rows)), operations=tuple(self._operations))
        except ValidationError as error:
            raise InputError(explain_plan(error)) from error

    def execute(self) -> None:
        """Run what was gathered and fill the results."""
        answer = self._model.backend.run(self.plan, self._tensors, exact=self._exact, keep=self._keeps)
        for name, tensor in answer.tensors.items():
            if name in self._results:
                self._results[name].fill(tensor)
        for name, derivatives in answer.derivatives.items():
            for point, tensor in derivatives.items():
                self._derived[name][point].fill(tensor)
        self.ran, self.batch = True, answer.batch

    @property
    def warnings(self) -> list[str]:
        """What was odd about the SAEs of this trace when they were attached."""
        return odd_saes(self._model.saes, self._operations)

    def read(
        self, point: str, *, pos: Where = None, rows: int | Sequence[int] | None = None, heads: Sequence[int] | None = None, after: bool = False
    ) -> Result:
        """Keep a copy of the activation at a point, as it arrives there, or `after` the writes."""
        at = self._at(point, pos, rows, heads)
        name = self._name("read")
        self._operations.append(Read(name=name, after=after, **at))
        chosen = range(len(self._rows)) if at["rows"] is None else at["rows"]
        self._results[name] = Result(at["point"], self._axes(at), self._tokens_at(chosen, at["pos"]), name)
        return self._results[name]

    def patch(
        self, point: str, value: Value, *, pos: Where = None, rows: int | Sequence[int] | None = None, heads: Sequence[int] | None = None
    ) -> None:
        """Replace the activation by a tensor, a result of this or another run, `zero`, or `mean`, the mean over its row's positions."""
        known = getattr(value, "operation", "") if isinstance(value, Result) else ""
        if isinstance(value, str) and value not in ("zero", "mean"):
            raise InputError(f"A patch takes a tensor, a result, 'zero' or 'mean'; found {value!r}.")
        source = ReadName(read=known) if known and self._results.get(known) is value else value if isinstance(value, str) else self._keep(value)
        self._operations.append(Patch(value=source, **self._at(point, pos, rows, heads)))  # type: ignore[arg-type]

    def add(
        self,
        point: str,
        vector: Tensor | Result,
        *,
        times: float | str = 1.0,
        pos: Where = None,
        rows: int | Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        """Add `times` a vector at every position, or a tensor of the part's own shape; `0.2 norm` is that share of the mean norm at the point."""
        strength = self._vector_strength(times, point, vector)
        self._operations.append(Add(value=self._keep(vector), times=strength, **self._at(point, pos, rows, heads)))

    def scale(
        self, point: str, times: float, *, pos: Where = None, rows: int | Sequence[int] | None = None, heads: Sequence[int] | None = None
    ) -> None:
        """Multiply the activation."""
        self._operations.append(Scale(times=times, **self._at(point, pos, rows, heads)))

    def project_out(self, point: str, vector: Tensor | Result, *, pos: Where = None, rows: int | Sequence[int] | None = None) -> None:
        """Take away what points along a vector."""
        self._operations.append(ProjectOut(value=self._keep(vector), **self._at(point, pos, rows, None)))

    def cap(self, point: str, vector: Tensor | Result, limit: float | str, *, pos: Where = None, rows: int | Sequence[int] | None = None) -> None:
        """Take away what points along a vector beyond a limit, a length or, as `0.2 norm`, a share of the mean norm at the point."""
        strength = self._vector_strength(limit, point, None)
        self._operations.append(Cap(value=self._keep(vector), limit=strength, **self._at(point, pos, rows, None)))

    def freeze(self, points: Names) -> None:
        """Keep what these points (patterns, for the most part) are in an unedited forward over the same tokens."""
        self._operations.append(Freeze(points=tuple(self._model.names(points))))

    def sae_read(self, sae: str, latents: Sequence[int] | None = None, *, pos: Where = None, after: bool = False) -> Result:
        """Keep the latent activations of an SAE at its point, as it arrives there or `after` the writes: [rows, positions, latents]."""
        at = self._at(self._sae(sae).hook_point, pos, None, None)
        name = self._name("read")
        self._operations.append(SaeRead(name=name, sae=sae, latents=None if latents is None else tuple(latents), after=after, **at))
        axes = ["row", *([] if isinstance(at["pos"], int) else ["position"]), "latent"]
        self._results[name] = Result(f"{sae} at {at['point']}", axes, self._tokens_at(range(len(self._rows)), at["pos"]), name)
        return self._results[name]

    def sae_clamp(self, sae: str, values: Mapping[int, str], *, pos: Where = None, when: tuple[str, int, float] | None = None) -> None:
        """Set latents of an SAE, each to a value with its unit (`10 max`), and leave all else: what the SAE does not explain, too.

        `when` is an SAE, a latent and a value: only positions where it fires above that are written.
        """
        self._write_sae(SaeClamp, sae, values, pos, when)

    def sae_add(self, sae: str, values: Mapping[int, str], *, pos: Where = None, when: tuple[str, int, float] | None = None) -> None:
        """Add decoder rows of an SAE, each so strongly (`0.2 norm`), whatever its latents are. `when` as in `sae_clamp`."""
        self._write_sae(SaeAdd, sae, values, pos, when)

    def logit_diff(self, token: str | int, other: str | int, *, pos: int = -1) -> Result:
        """Measure the logit of one token less that of another, for every row."""
        return self.measure(self._model.logit_diff(token, other, pos=pos))

    def logprob(self, token: str | int, *, pos: int = -1) -> Result:
        """Measure the log probability of a token, in nats, for every row."""
        return self.measure(self._model.logprob(token, pos=pos))

    def loss(self) -> Result:
        """Measure the mean cross entropy of the next tokens, in nats, for every row."""
        return self.measure(Loss(name="metric"))

    def kl(self, logits: Tensor | Result, *, pos: int = -1) -> Result:
        """Measure the KL divergence in nats from another run's prediction, given as its logits at one position, [rows, vocabulary]."""
        return self.measure(Divergence(name="metric", other=self._keep(logits), pos=pos))

    def measure(self, metric: MetricOp) -> Result:
        """Measure a metric, for every row."""
        name = self._name("metric")
        self._operations.append(metric.model_copy(update={"name": name}))
        self._results[name] = Result(metric.metric, ["row"], self._all_tokens(), name)
        return self._results[name]

    def grad(self, metric: Result, at: Names) -> Results:
        """Differentiate a metric, summed over its rows, at points as they are before the writes."""
        name = self._name("grad")
        points = self._model.names(at)
        self._operations.append(Grad(name=name, of=self._metric_name(metric), at=tuple(points)))
        whole = {point: self._axes({"point": point, "pos": None}) for point in points}
        self._derived[name] = Results({point: Result(f"d {metric.name} / d {point}", axes, self._all_tokens()) for point, axes in whole.items()})
        return self._derived[name]

    def attribute(self, metric: Result, at: Names, source: Mapping[str, Result] | str) -> Results:
        """Estimate what putting the source's vector in each place would change of a metric: derivative times change."""
        name = self._name("attribute")
        points = self._model.names(at)
        if isinstance(source, str) and source != "zero":
            raise InputError(f"A source is the result of another run, or 'zero'; found {source!r}.")
        given: Any = source if isinstance(source, str) else tuple(self._keep(source[point]) for point in points)
        self._operations.append(Attribute(name=name, of=self._metric_name(metric), at=tuple(points), source=given))
        axes = {point: self._axes({"point": point, "pos": None})[:-1] for point in points}
        self._derived[name] = Results({point: Result(f"{metric.name} by {point}", axes[point], self._all_tokens()) for point in points})
        return self._derived[name]

    def _write_sae(self, kind: Any, sae: str, values: Mapping[int, str], pos: Where, when: tuple[str, int, float] | None) -> None:
        attached = self._sae(sae)
        raw = tuple(self._latent_strength(value, sae, latent) for latent, value in values.items())
        condition = None if when is None else When(sae=when[0], latent=when[1], above=when[2])
        at = self._at(getattr(attached, "written_at", attached.hook_point), pos, None, None)
        self._operations.append(kind(sae=sae, latents=tuple(values), values=raw, when=condition, **at))

    def _latent_strength(self, written: str, sae: str, latent: int) -> float:
        number, unit = split_strength(written, f"latent {latent} of {sae!r}")
        return number if unit == "raw" else self._model.writing().latent_strength(written, sae, latent)

    def _vector_strength(self, written: str | float, point: str, vector: Tensor | Result | None) -> float:
        """Return how many times a vector is written; a plain number is that."""
        if not isinstance(written, str):
            return float(written)
        name = self._model.backend.find_point(point)
        tensor = vector.tensor if isinstance(vector, Result) else vector
        return self._model.writing().vector_strength(written, name, 1.0 if tensor is None else float(tensor.norm()))

    def _sae(self, name: str) -> Any:
        if name not in self._model.saes:
            raise InputError(f"No SAE is called {name!r} here; there are {sorted(self._model.saes)}. `lab.open(...).model()` brings a pipeline's.")
        return self._model.saes[name]

    def _metric_name(self, metric: Result) -> str:
        name = getattr(metric, "operation", "")
        if self._results.get(name) is not metric or not name.startswith("metric"):
            raise InputError(f"{metric!r} is no metric of this trace: take what t.logit_diff, t.logprob, t.loss or t.kl returned.")
        return name

    def _name(self, kind: str) -> str:
        return f"{kind}{len(self._operations)}"

    def _keep(self, value: Tensor | Result) -> TensorName:
        if isinstance(value, Result) and (kept := value.kept) is not None and kept.owner is self._model.backend:
            return kept.name
        tensor = value.tensor if isinstance(value, Result) else value
        if not isinstance(tensor, Tensor):
            raise InputError(f"Expected a tensor or a result, found a {type(tensor).__name__}.")
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        name = name_tensor(tensor)
        if name.tensor not in self._tensors:
            self._tensors[name.tensor] = tensor.detach().clone()  # it is used later, and whoever gave it may write into it until then
        return name

    def _at(self, point: str, pos: Where, rows: int | Sequence[int] | None, heads: Sequence[int] | None) -> dict[str, Any]:
        chosen = None if rows is None else (rows,) if isinstance(rows, int) else tuple(rows)
        name = point if point.startswith("module:") else self._model.backend.find_point(point)
        where: Any = pos
        if isinstance(pos, str):
            where = self._find_token(pos, range(len(self._rows)) if chosen is None else chosen)
        elif isinstance(pos, slice):
            where = Span(start=pos.start, stop=pos.stop, step=pos.step)
        elif pos is not None and not isinstance(pos, int):
            where = tuple(int(place) for place in pos)
        return {"point": name, "pos": where, "rows": chosen, "heads": None if heads is None else tuple(heads)}

    def _find_token(self, text: str, rows: Iterable[int]) -> int:
        """Return the place of a token that occurs once in each row, in the same place. Raises `InputError` with the places."""
        places = {row: [place for place, piece in enumerate(self.tokens[row]) if piece == text] for row in rows}
        found = {place for of_row in places.values() for place in of_row}
        if len(found) != 1 or not all(len(of_row) == 1 for of_row in places.values()):
            shown = "; ".join(f"row {row}: {of_row or 'nowhere'}" for row, of_row in places.items())
            raise InputError(f"The token {text!r} must stand once in each row, in one place. Found {shown}. Tokens of row 0: {self.tokens[0]}.")
        return found.pop()

    def _all_tokens(self) -> Callable[[], list[list[str]]]:
        return self._tokens_at(range(len(self._rows)), None)

    def _tokens_at(self, rows: Iterable[int], pos: Any) -> Callable[[], list[list[str]]]:
        """Return what writes the tokens of rows; it does not hold the trace."""
        return partial(_write, self._model.backend.pieces, [self._rows[row] for row in rows if 0 <= row < len(self._rows)], pos)

    def _axes(self, at: Mapping[str, Any]) -> list[str]:
        kind = at["point"].partition(".")[0]
        position = [] if isinstance(at["pos"], int) else ["position"]
        if kind == "pattern":
            return ["row", "head", *position, "key"]
        return ["row", *position, *(["head"] if kind in BY_HEAD else []), "dimension"]


def _write(pieces: Callable[[Sequence[Sequence[int]]], list[list[str]]], rows: Iterable[Sequence[int]], pos: Any) -> list[list[str]]:
    """Return the tokens of each row that stand at `pos`, as text."""
    return pieces([_pick(row, pos) for row in rows])


def _pick(row: Sequence[int], pos: Any) -> Sequence[int]:
    if pos is None:
        return row
    if isinstance(pos, Span):
        return row[slice(pos.start, pos.stop, pos.step)]
    return [row[place] for place in ([pos] if isinstance(pos, int) else pos) if -len(row) <= place < len(row)]
