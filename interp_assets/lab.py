"""The notebook's way in: a model's internals, and all that a pipeline has made, in a few words.

    from interp_assets import lab

    llm = lab.load("EleutherAI/pythia-160m")  # a model: see garcon/session.py for traces, sweeps and attributions
    llm = lab.connect("http://gpu7:8420", "pythia-160m", token=...)  # the same on a server
    run = lab.open("pythia.yaml")  # or a pipeline's folder, or s3://bucket/name
    run.activations("resid_post.8")[10_000:20_000]  # .tensor .row_ids .tokens .text; .at(row_ids), .document(shard, number)
    run.mixed("resid_post.8")[:4096]
    run.table(); run.table(over="seed"); run.curves(); run.sql("select name, fvu from saes")  # all SAEs, what became of each, its learning curve
    run.sae("l8").encode(run.rows("resid_post.8", 1000)); run.features("l8"); run.feature("l8", 1234)
    run.heads(); run.head("5.3"); llm.attention("a text"); lab.attention(patterns, tokens)

    @lab.architecture(kind="relu")  # in a file of its own, which a configuration names: see docs/howto.md
    def mine(w, x, y, step, *, p: float = 0.5): return lab.Terms(y_hat, latents=f, penalty=...)

Importing this module loads neither torch nor transformers nor a web framework: what computes is imported when it is asked for.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from interp_assets.errors import ArtifactMissingError, InputError
from interp_assets.planning.config import ExecutionConfig, ModelConfig, PipelineConfig, load_config
from interp_assets.planning.progress import format_count
from interp_assets.storage.store import Store, open_store
from interp_assets.train.own.terms import Terms, architecture

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray
    from torch import Tensor

    import interp_assets.garcon.features
    import interp_assets.garcon.patterns.view
    import interp_assets.garcon.session
    import interp_assets.garcon.spread
    import interp_assets.garcon.steering.dose
    import interp_assets.train.sae
    import interp_assets.visualize.steering.patching
    import interp_assets.visualize.steering.search
    from interp_assets.planning.pipeline import Pipeline

__all__ = ["Terms", "architecture", "connect", "load", "open"]
_OPENED_AT_ONCE: Final = 16
_SHARDS_KEPT: Final = 16


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    revision: str = "main",
    device_map: "interp_assets.garcon.spread.DeviceMap | None" = None,
) -> "interp_assets.garcon.session.Model":
    """Load a model by its hub id, folder or `builtin:` name, with its tokenizer.

    `device_map="auto"` spreads one that is larger than a device over all of them, then memory, then the disk (takes accelerate). Raises `InputError`
    for what cannot be found or loaded, and for what does not fit.
    """
    config = ModelConfig.model_validate({"name": name, "dtype": dtype, "revision": revision})
    return _load_model(config, ExecutionConfig.model_validate({"device": device}), device_map)


def attention(
    patterns: "NDArray[np.floating] | Tensor | Mapping[int, NDArray[np.floating]]", tokens: Sequence[str], *, weights: bool = False
) -> "interp_assets.garcon.patterns.view.Attention":
    """Show patterns of one's own, [queries, keys] with heads and layers before these where there are some, or layers mapped to their heads' patterns.

    Of a model's own heads, `llm.attention(text)`. Raises `InputError` for another shape, and for rows that do not sum to one unless `weights`.
    """
    import numpy as np  # noqa: PLC0415 - only when asked for

    from interp_assets.garcon.patterns.view import Attention  # noqa: PLC0415 - brings torch

    if isinstance(patterns, Mapping):
        return Attention(patterns, tokens, weights=weights)
    if hasattr(patterns, "detach"):
        patterns = patterns.detach().float().cpu()  # pyright: ignore[reportAttributeAccessIssue] - a tensor's
    given = np.asarray(patterns)
    if not 2 <= given.ndim <= 4:
        raise InputError(f"Patterns are [queries, keys], with heads before and layers before these; found an array of shape {list(given.shape)}.")
    given = given.reshape((1,) * (4 - given.ndim) + given.shape)
    return Attention(dict(enumerate(given)), tokens, weights=weights)


def connect(url: str, model: str, *, token: str | None = None) -> "interp_assets.garcon.session.Model":
    """Take a model that a server has (`interp serve --model`): the same methods and results as of `load`.

    Needs neither transformers nor the model's files. Raises `InputError` for a model that is not served, `ServiceError` where nobody answers.
    """
    from interp_assets.garcon.remote.client import Connection, RemoteBackend  # noqa: PLC0415 - brings torch
    from interp_assets.garcon.session import Model  # noqa: PLC0415 - as above

    return Model.over(RemoteBackend(Connection(url, token), model))


def open(where: str) -> "Opened":  # noqa: A001 - lab.open reads as it should
    """Open a pipeline: its YAML, its folder or its `s3://` address. Raises `InterpError` with what is missing and the next step."""
    from interp_assets.planning.pipeline import load_configuration, load_pipeline, open_pipeline_store  # noqa: PLC0415 - only when opened

    if where.endswith((".yaml", ".yml")):
        config = load_config(where)
        store = open_pipeline_store(config)
    else:
        store = open_store(where)
        config = load_configuration(store)
    return Opened(load_pipeline(config, store), store)


_TRIED_TOKENS: Final = 512
"""Held-out tokens that an SAE is tried on when a model is loaded with it."""


class Rows:
    """Activations with where they come from. Tokens and text are read when they are asked for."""

    def __init__(self, tensor: "Tensor", row_ids: "NDArray[np.uint64]", run: "Opened") -> None:
        """`StoredRows` makes them."""
        self.tensor = tensor
        """[n, d_in] in the stored dtype."""
        self.row_ids = row_ids
        """Dataset shard times 2^40 plus row in the shard: the address that mixed rows and examples carry too."""
        self._run = run

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.row_ids)

    def __repr__(self) -> str:
        """Say how many rows there are, how wide, and in which shards."""
        n_shards = len(set(_split_ids(self.row_ids)[0].tolist()))
        what = f"{self.tensor.shape[1]:,} x {str(self.tensor.dtype).removeprefix('torch.')}"
        return f"{format_count(len(self), 'row')} of {what}, of {format_count(n_shards, 'shard')}"

    @cached_property
    def tokens(self) -> "NDArray[np.uint32]":
        """Token id of each row. Reads the token table of each shard that rows are of, once."""
        import numpy as np  # noqa: PLC0415 - only when asked for

        tokens = np.empty(len(self), np.uint32)
        shards, rows = _split_ids(self.row_ids)
        for shard in set(shards.tolist()):
            here = shards == shard
            tokens[here] = self._run.token_ids(shard)[rows[here]]
        return tokens

    @cached_property
    def pieces(self) -> list[str]:
        """Each row's token as text."""
        return [self._run.tokenizer.decode([int(token)]) for token in self.tokens]

    @property
    def text(self) -> str:
        """The tokens of all rows as one text, without the special ones that open contexts and end documents; `pieces` has these too."""
        return self._run.tokenizer.decode(self.tokens.tolist(), skip_special_tokens=True)


class StoredRows:
    """All rows of a hook point, one after the other; a range is read when it is asked for, and no byte besides its blocks."""

    def __init__(self, run: "Opened", lengths: Sequence[int], read: "Callable[[int, int, int], tuple[Tensor, NDArray[np.uint64]]]") -> None:
        """`lengths` are the rows of each file; `read` reads a range of one with its row ids."""
        self._run, self._ends, self._read = run, list(accumulate(lengths)), read

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, chosen: slice) -> Rows:
        """Read consecutive rows. Raises `InputError` for steps and for a range without rows."""
        import numpy as np  # noqa: PLC0415 - only when asked for
        import torch  # noqa: PLC0415 - as above

        start, stop, step = chosen.indices(len(self)) if isinstance(chosen, slice) else (0, 0, 1)
        if step != 1 or start >= stop:
            raise InputError(f"Rows are read as a range, such as [10_000:20_000]; found {chosen!r} of {format_count(len(self), 'row')}.")
        parts = []
        place = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[place - 1] if place else 0
            end = min(stop, self._ends[place])
            if end > start:
                parts.append(self._read(place, start - first, end - first))
            start, place = end, place + 1
        tensors, row_ids = zip(*parts, strict=True)
        return Rows(torch.cat(tensors), np.concatenate(row_ids), self._run)


class Activations(StoredRows):
    """The rows of a hook point in the order of the corpus, also by their address and by document."""

    def __init__(self, run: "Opened", hook_point: str) -> None:
        """`Opened.activations` makes it: reads the manifests of all shards, and nothing else."""
        from interp_assets.harvest.rows import open_rows  # noqa: PLC0415 - only when asked for

        indices = run.pipeline.shard_indices
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            opened = list(pool.map(lambda index: open_rows(run.pipeline, run.store, hook_point, index), indices))
        self._shards = dict(zip(indices, opened, strict=True))

        def read(place: int, start: int, stop: int) -> "tuple[Tensor, NDArray[np.uint64]]":
            return opened[place].read(start, stop), _make_ids(indices[place], start, stop)

        super().__init__(run, [rows.n_rows for rows in opened], read)

    def at(self, row_ids: "Sequence[int] | NDArray[np.uint64]") -> Rows:
        """Read the rows at these addresses, in their order, as mixed rows and examples name them. Raises `InputError` for one that is not there."""
        import numpy as np  # noqa: PLC0415 - only when asked for
        import torch  # noqa: PLC0415 - as above

        try:
            wanted = np.array([int(row_id) for row_id in row_ids], np.uint64)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"Row ids are numbers from 0, as `.row_ids` has them; found {row_ids!r:.80}.") from error
        if not len(wanted):
            raise InputError("Name at least one row id.")
        shards, rows = _split_ids(wanted)
        for row_id, shard, row in zip(wanted.tolist(), shards.tolist(), rows.tolist(), strict=True):
            if shard not in self._shards or row >= self._shards[shard].n_rows:
                lengths = [f"{index} ({format_count(opened.n_rows, 'row')})" for index, opened in self._shards.items()]
                more = f" and {len(lengths) - 4:,} more" if len(lengths) > 4 else ""
                raise InputError(f"There is no row {row:,} of shard {shard:,} (row id {row_id}). The shards are {', '.join(lengths[:4])}{more}.")
        parts = [self._shards[shard].read_each(rows[shards == shard].tolist()) for shard in sorted(set(shards.tolist()))]
        order = np.argsort(np.argsort(shards, kind="stable"), kind="stable")
        return Rows(torch.cat(parts)[torch.from_numpy(order)], wanted, self._run)

    def document(self, shard: int, document: int) -> Rows:
        """Read the rows of one document; `.text` is its text. `Opened.documents` lists them."""
        table = self._run.documents(shard)
        if not 0 <= document < table.height:
            raise InputError(f"Shard {shard} has documents 0 to {table.height - 1}; found {document}.")
        first, n_rows = int(table["first_row"][document]), int(table["n_rows"][document])
        return Rows(self._shards[shard].read(first, first + n_rows), _make_ids(shard, first, first + n_rows), self._run)


def _make_ids(shard: int, start: int, stop: int) -> "NDArray[np.uint64]":
    """Return the addresses of consecutive rows of a shard."""
    import numpy as np  # noqa: PLC0415 - only when asked for

    from interp_assets.planning.pipeline import SHARD_SHIFT  # noqa: PLC0415 - as above

    return np.arange(start, stop, dtype=np.uint64) + np.uint64(shard << SHARD_SHIFT)


def _split_ids(row_ids: "NDArray[np.uint64]") -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    """Return shard and row in the shard of each address."""
    import numpy as np  # noqa: PLC0415 - only when asked for

    from interp_assets.planning.pipeline import SHARD_SHIFT  # noqa: PLC0415 - as above

    return (row_ids >> np.uint64(SHARD_SHIFT)).astype(np.int64), (row_ids & np.uint64((1 << SHARD_SHIFT) - 1)).astype(np.int64)


class Feature:
    """What is known of one latent: the record that the browser shows."""

    def __init__(self, record: dict[str, Any], text: "Callable[[int], str]") -> None:
        """`text` writes a token id."""
        self.record, self._text = record, text

    def __repr__(self) -> str:
        """Say which latent it is, and how many examples of it there are."""
        examples = self.record["examples"]
        return f"latent {self.record['latent']:,}: {len(examples['top'])} top and {len(examples['random'])} random examples"

    def examples(self, kind: str = "top") -> "pl.DataFrame":
        """Return `top` or `random` examples: activation, token, the window as text, and where it is. Raises `InputError` for another kind."""
        import polars as pl  # noqa: PLC0415 - as above

        if kind not in ("top", "random"):
            raise InputError(f"Examples are 'top' or 'random'; found {kind!r}. Those of the quantile intervals are in .record.")
        lines = []
        for window in self.record["examples"][kind]:
            pieces = [self._text(token) for token in window["tokens"]]
            shard, row = window["row"]
            where = (shard, row, int(_make_ids(shard, row, row + 1)[0]))
            lines.append((window["activation"], pieces[window["peak"]], "".join(pieces), *where))
        types = {"activation": pl.Float64, "token": pl.String, "text": pl.String, "shard": pl.Int64, "row": pl.Int64, "row_id": pl.UInt64}
        return pl.DataFrame(lines, types, orient="row")


class Opened:
    """A pipeline's plan and store: everything that it has made, as tensors and tables. Each reading is verified against its manifest."""

    def __init__(self, pipeline: "Pipeline", store: Store) -> None:
        """`open` makes it."""
        self.pipeline, self.store = pipeline, store
        self._token_ids: dict[int, NDArray[np.uint32]] = {}

    def __repr__(self) -> str:
        """Say which pipeline it is, and where."""
        return f"pipeline {self.config.name} at {self.store.url}: {self.config.model.name}, SAEs {[sae.name for sae in self.config.saes]}"

    @property
    def config(self) -> PipelineConfig:
        """The configuration it was planned with."""
        return self.pipeline.config

    def model(self) -> "interp_assets.garcon.session.Model":
        """Load the subject model, with the SAEs that are trained. Raises `InputError` when it is not the one that was planned."""
        from interp_assets.garcon.locate import fingerprint_model  # noqa: PLC0415 - as above

        if self.config.corpus.is_planted:
            raise InputError("The rows of this pipeline are planted: there is no model that they are of.")
        found, planned = fingerprint_model(self.config.model), self.pipeline.plan.model_fingerprint
        if found != planned:
            raise InputError(
                f"The model {self.config.model.name!r} has changed since it was planned (fingerprint {found}, planned {planned}). Plan again."
            )
        from interp_assets.garcon.features import AttachedSae, Fit  # noqa: PLC0415 - as above
        from interp_assets.storage.manifest import find_manifest  # noqa: PLC0415 - as above
        from interp_assets.train.refs import evaluation_ref  # noqa: PLC0415 - as above

        llm = _load_model(self.config.model, self.config.execution)
        llm.backend.norms = self._mean_norms()
        texts = self._held_out_texts()
        for sae in self.config.saes:
            if not self._is_trained(sae.name):
                continue
            facts = evaluated.facts if (evaluated := find_manifest(self.store, evaluation_ref(self.pipeline, sae.name))) else None
            attached = AttachedSae(
                self.sae(sae.name).to(llm.subject.device),
                sae.hook_point,
                target=sae.target_hook_point,
                more=sae.more_hook_points,
                firings=self._firings(sae.name),
                evaluated=Fit(float(facts["fvu"]), float(facts["l0"])) if facts else None,
            )
            llm.backend.attach(sae.name, attached, texts)
        return llm

    def _is_trained(self, sae: str) -> bool:
        """Tell whether an SAE is there; where the plan has not chosen the shuffle yet, none has an address."""
        from interp_assets.storage.manifest import find_manifest  # noqa: PLC0415 - as above
        from interp_assets.train.refs import sae_ref  # noqa: PLC0415 - as above

        try:
            return find_manifest(self.store, sae_ref(self.pipeline, sae)) is not None
        except ArtifactMissingError:
            return False

    @cached_property
    def tokenizer(self) -> Any:
        """The subject model's tokenizer."""
        from interp_assets.garcon.tokenizer import load_tokenizer  # noqa: PLC0415 - as above

        return load_tokenizer(self.config.model)

    def activations(self, hook_point: str) -> Activations:
        """Open the activations of a hook point: all dataset shards, in order, special tokens included."""
        return Activations(self, self._harvested(hook_point))

    def mixed(self, hook_point: str) -> StoredRows:
        """Open the shuffled rows of a hook point, as training reads them: the valid rows of all shards that are trained on."""
        from interp_assets.shuffle.mixed import open_mixed, read_mixed_rows  # noqa: PLC0415 - as above

        shards = open_mixed(self.pipeline, self.store, self._harvested(hook_point))

        def read(place: int, start: int, stop: int) -> "tuple[Tensor, NDArray[np.uint64]]":
            found = read_mixed_rows(self.store, shards[place], start, stop)
            return found.rows, found.row_ids.numpy()

        return StoredRows(self, [shard.n_rows for shard in shards], read)

    def tokens(self, shard: int) -> "pl.DataFrame":
        """Return the token positions of a shard: row, token id, context, document, and whether the row is valid."""
        import polars as pl  # noqa: PLC0415 - as above

        from interp_assets.corpus.tokens import load_tokens  # noqa: PLC0415 - as above

        found = load_tokens(self.pipeline, self.store, self._shard(shard))
        columns = {"token_id": found.token_ids, "context": found.contexts, "document": found.documents, "valid": found.valid}
        return pl.DataFrame(columns).with_row_index("row")

    def documents(self, shard: int) -> "pl.DataFrame":
        """Return the documents of a shard: where each is from, its first row and its number of rows."""
        import polars as pl  # noqa: PLC0415 - as above

        from interp_assets.corpus.tokens import load_documents  # noqa: PLC0415 - as above

        found = load_documents(self.pipeline, self.store, self._shard(shard))
        return pl.DataFrame({"source": found.sources, "first_row": found.first_rows, "n_rows": found.n_rows}).with_row_index("document")

    def token_ids(self, shard: int) -> "NDArray[np.uint32]":
        """Return the token id of each row of a shard. The shards that were asked for last are kept."""
        from interp_assets.corpus.tokens import load_tokens  # noqa: PLC0415 - as above

        kept = self._token_ids
        kept[shard] = kept.pop(shard) if shard in kept else load_tokens(self.pipeline, self.store, self._shard(shard)).token_ids
        if len(kept) > _SHARDS_KEPT:
            del kept[next(iter(kept))]
        return kept[shard]

    def _shard(self, index: int) -> int:
        if index not in self.pipeline.shard_indices:
            raise InputError(f"There is no shard {index}; there are {len(self.pipeline.shard_indices):,}, from {self.pipeline.shard_indices[0]}.")
        return index

    def _harvested(self, hook_point: str) -> str:
        """Return the canonical name of a hook point that the plan has. Raises `ConfigError` with those it has."""
        from interp_assets.planning.hook_names import canonical_name  # noqa: PLC0415 - as above

        name = canonical_name(hook_point)
        self.pipeline.d_in(name)
        return name

    def sae(self, name: str) -> "interp_assets.train.sae.Sae":
        """Read a trained SAE."""
        from interp_assets.train.checkpoint import load_sae  # noqa: PLC0415 - as above

        self.config.sae(name)
        return load_sae(self.pipeline, self.store, name)

    def evaluation(self, name: str) -> dict[str, Any]:
        """Return what was measured of an SAE on held-out shards: FVU, L0, recovered loss and the rest."""
        from interp_assets.storage.manifest import load_manifest  # noqa: PLC0415 - as above
        from interp_assets.train.refs import evaluation_ref  # noqa: PLC0415 - as above

        self.config.sae(name)
        return dict(load_manifest(self.store, evaluation_ref(self.pipeline, name)).facts)

    def table(self, *, over: str = "", everything: bool = False) -> "pl.DataFrame":
        """Return all SAEs, one line each: configuration, quality, speed, `status` (measured, trained, stopped, failed) and `why`.

        `over="seed"` makes one line of those that differ in their seed alone: means, deviations, `n`, and what is within noise. `everything` takes
        every SAE of the folder in, other configurations' too. Raises `ArtifactMissingError` where there is none.
        """
        from interp_assets.train.results.arms import read_table  # noqa: PLC0415 - as above
        from interp_assets.train.results.replicas import SEED, over_seeds  # noqa: PLC0415 - as above

        if over not in ("", SEED):
            raise InputError(f"SAEs are folded over {SEED!r}; found {over!r}. For anything else: .table().group_by(...).")
        found = read_table(self.pipeline, self.store, everything=everything)
        return over_seeds(found) if over else found

    def curves(self) -> "pl.DataFrame":
        """Return the logged steps of all SAEs that were trained here, of those that ended early too: `name`, `n_rows`, `loss`, `fvu` and more."""
        from interp_assets.train.results.arms import read_curves  # noqa: PLC0415 - as above

        return read_curves(self.pipeline, self.store)

    def matches(self) -> "pl.DataFrame":
        """Return the latents of the SAEs of `matches` beside their nearest in each other: cosine, whether mutual, correlation on held-out rows."""
        from interp_assets.train.results.matches import read_matches  # noqa: PLC0415 - as above

        return read_matches(self.pipeline, self.store)

    def probes(self, sae: str) -> "pl.DataFrame":
        """Return how well few latents of an SAE tell labels of held-out rows, beside its activation: a line a label's value and kind of probe."""
        from interp_assets.train.probes.probe import read_probes  # noqa: PLC0415 - as above

        return read_probes(self.pipeline, self.store, sae)

    def history(self) -> "pl.DataFrame":
        """Return what `interp run` and `interp try` did here, one line each: when, how long, on which code, with what note, and what came of it."""
        from interp_assets.planning.history import read_history  # noqa: PLC0415 - as above

        return read_history(self.store)

    def rows(self, hook_point: str, n: int) -> "Tensor":
        """Return `n` rows of a hook point, [n, d_in] in the stored dtype: the first mixed ones, which are a uniform sample without repetition."""
        return self.mixed(hook_point)[:n].tensor

    def sql(self, query: str) -> "pl.DataFrame":
        """Ask DuckDB of what is here: the tables `saes`, `replicas`, `curves` and `history`, as `table()`, `table(over="seed")` and so on are."""
        import duckdb  # noqa: PLC0415 - as above

        from interp_assets.train.results.replicas import over_seeds  # noqa: PLC0415 - as above

        asked = query.lower()
        with duckdb.connect() as base:
            tables = {"saes": self.table, "replicas": lambda: over_seeds(self.table()), "curves": self.curves, "history": self.history}
            for name, make in tables.items():
                if name in asked:
                    base.register(name, make().to_arrow())
            try:
                return base.sql(query).pl()
            except duckdb.Error as error:
                raise InputError(f"DuckDB cannot answer: {error}. The tables are saes, replicas, curves and history.") from error

    def dose(self, recipe: str) -> "interp_assets.garcon.steering.dose.Dose":
        """Read the dose curve of a recipe of the configuration: texts, table and picture."""
        from interp_assets.visualize.steering.curves import read_curve  # noqa: PLC0415 - as above

        return read_curve(self.pipeline, self.store, recipe)

    def steering_search(self, sae: str) -> "interp_assets.visualize.steering.search.Search":
        """Read what a search among an SAE's latents found: `.candidates`, a table of all that were tried, and `.doses` of those that were chosen."""
        from interp_assets.visualize.steering.search import read_search  # noqa: PLC0415 - as above

        self.config.sae(sae)
        return read_search(self.pipeline, self.store, sae)

    def patching(self, name: str) -> "interp_assets.visualize.steering.patching.Patching":
        """Read what patching did over a set of prompts of the configuration: table and heat map."""
        from interp_assets.visualize.steering.patching import read_patching  # noqa: PLC0415 - as above

        return read_patching(self.pipeline, self.store, name)

    def features(self, name: str) -> "pl.DataFrame":
        """Return the statistics of an SAE's features, one line a latent."""
        import polars as pl  # noqa: PLC0415 - as above

        return pl.read_parquet(io.BytesIO(self._bundle(name).read("features.parquet")))

    def feature(self, name: str, latent: int) -> Feature:
        """Read one feature's record: examples, histogram, logits, neighbours."""
        bundle = self._bundle(name)
        return Feature(bundle.record(latent), bundle.vocabulary.text)

    def labels(self, name: str) -> "pl.DataFrame":
        """Return what people and models say that an SAE's features mean, with who said it, how it scored, and from which file it came when."""
        import polars as pl  # noqa: PLC0415 - as above

        from interp_assets.web.labels import Label, find_labels  # noqa: PLC0415 - as above

        rows = [label for found in find_labels(self._bundle(name)) for label in found.all()]
        types = {"latent": pl.UInt32, "score": pl.Float64}
        return pl.DataFrame(rows, {field: types.get(field, pl.String) for field in (*Label._fields, "set", "file", "imported")})

    def heads(self) -> "pl.DataFrame":
        """Return the statistics of every attention head, one line a head: means, and `uniform_` what looking at all keys alike gives."""
        from interp_assets.harvest.heads.records import read_tables  # noqa: PLC0415 - as above

        return read_tables(self.pipeline, self.store)

    def head(self, name: str) -> dict[str, Any]:
        """Read one head's record, named by layer and place (`5.3`): statistics, distances, tokens, examples with their patterns."""
        from interp_assets.harvest.heads.records import read_head  # noqa: PLC0415 - as above

        return read_head(self.pipeline, self.store, name)

    def prompt(self, name: str) -> "interp_assets.garcon.patterns.view.Attention":
        """Read the patterns over a configured prompt, as `attention` of a model gives them; no model is needed."""
        from interp_assets.harvest.heads.prompts import read_prompt  # noqa: PLC0415 - as above

        return read_prompt(self.pipeline, self.store, name)

    def _mean_norms(self) -> dict[str, float]:
        """Return the mean norm of the rows of every harvested hook point whose statistics there are."""
        from interp_assets.harvest.refs import statistics_ref  # noqa: PLC0415 - as above
        from interp_assets.storage.manifest import find_manifest  # noqa: PLC0415 - as above

        found = {name: find_manifest(self.store, statistics_ref(self.pipeline, name)) for name in self.config.harvest.hook_points}
        return {name: float(manifest.facts["mean_norm"]) for name, manifest in found.items() if manifest is not None}

    def _held_out_texts(self) -> list[list[int]]:
        """Return the first held-out contexts, on which SAEs are tried; none where there is none yet."""
        from interp_assets.corpus.refs import token_shard_ref  # noqa: PLC0415 - as above
        from interp_assets.corpus.tokens import load_tokens  # noqa: PLC0415 - as above
        from interp_assets.storage.manifest import find_manifest  # noqa: PLC0415 - as above

        for index in self.pipeline.held_out_indices:
            if find_manifest(self.store, token_shard_ref(self.pipeline, index)) is not None:
                tokens = load_tokens(self.pipeline, self.store, index)
                contexts, length = tokens.contexts, self.config.corpus.context_length
                return [
                    tokens.token_ids[contexts == context].tolist()
                    for context in list(dict.fromkeys(contexts.tolist()))[: -(-_TRIED_TOKENS // length)]
                ]
        return []

    def _firings(self, name: str) -> "interp_assets.garcon.features.Firings | None":
        """Return how the latents of an SAE fire, as its records tell; None where these have not been made."""
        from interp_assets.visualize.steering.firings import load_firings  # noqa: PLC0415 - as above

        try:
            return load_firings(self.pipeline, self.store, name) if name in self.config.features.saes else None
        except ArtifactMissingError:
            return None

    def _bundle(self, name: str) -> Any:
        from interp_assets.web.opened import BundlePlace, OpenBundle  # noqa: PLC0415 - as above
        from interp_assets.web.refs import bundle_ref  # noqa: PLC0415 - as above

        self.config.sae(name)
        path = bundle_ref(self.pipeline, name).path
        return self.pipeline.remember(("bundle", path), lambda: OpenBundle(BundlePlace(self.store, path)))


def _load_model(
    model: ModelConfig, execution: ExecutionConfig, device_map: "interp_assets.garcon.spread.DeviceMap | None" = None
) -> "interp_assets.garcon.session.Model":
    from interp_assets.garcon.session import Model  # noqa: PLC0415 - transformers takes seconds to import
    from interp_assets.garcon.subject import load_subject_model  # noqa: PLC0415 - as above
    from interp_assets.garcon.tokenizer import load_tokenizer  # noqa: PLC0415 - as above

    return Model(load_subject_model(model, execution, device_map), load_tokenizer(model))
