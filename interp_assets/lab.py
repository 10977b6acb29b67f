"""The notebook's way in: a model's internals, and all that a pipeline has made, in a few words.

    from interp_assets import lab

    llm = lab.load("EleutherAI/pythia-160m")  # a model: see garcon/session.py for traces, sweeps and attributions
    run = lab.open("pythia.yaml")  # or a pipeline's folder, or s3://bucket/name
    run.activations("resid_post.8")[10_000:20_000]
    run.sae("l8"); run.features("l8"); run.feature("l8", 1234)

Importing this module loads neither torch nor transformers nor a web framework: what computes is imported when it is asked for.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from interp_assets.errors import InputError
from interp_assets.planning.config import ExecutionConfig, ModelConfig, PipelineConfig, load_config
from interp_assets.storage.store import Store, open_store

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray
    from torch import Tensor

    import interp_assets.garcon.session
    import interp_assets.train.sae
    from interp_assets.planning.pipeline import Pipeline


def load(name: str, *, device: str = "auto", dtype: str = "float32", revision: str = "main") -> "interp_assets.garcon.session.Model":
    """Load a model by its hub id, folder or `builtin:` name, with its tokenizer. Raises `InputError` for what cannot be found or loaded."""
    config = ModelConfig.model_validate({"name": name, "dtype": dtype, "revision": revision})
    return _load_model(config, ExecutionConfig.model_validate({"device": device}))


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


class Rows(NamedTuple):
    """Activations with where they come from."""

    tensor: "Tensor"
    """[n, d_in] in the stored dtype."""
    tokens: "NDArray[np.uint32]"
    """Token id of each row."""
    row_ids: "NDArray[np.uint64]"
    """Dataset shard times 2^40 plus row in the shard: the address that mixed rows and examples carry too."""


class StoredRows:
    """All rows of a hook point, one after the other; a range is read when it is asked for, and no byte besides its blocks."""

    def __init__(self, lengths: Sequence[int], read: "Callable[[int, int, int], Rows]") -> None:
        """`lengths` are the rows of each shard; `read` reads a range of one."""
        self._ends, self._read = list(accumulate(lengths)), read

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, chosen: slice) -> Rows:
        """Read consecutive rows. Raises `InputError` for steps and for a range without rows."""
        import numpy as np  # noqa: PLC0415 - as above
        import torch  # noqa: PLC0415 - as above

        start, stop, step = chosen.indices(len(self)) if isinstance(chosen, slice) else (0, 0, 1)
        if step != 1 or start >= stop:
            raise InputError(f"Rows are read as a range, such as [10_000:20_000]; found {chosen!r} of {len(self):,} rows.")
        parts = []
        shard = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[shard - 1] if shard else 0
            end = min(stop, self._ends[shard])
            if end > start:
                parts.append(self._read(shard, start - first, end - first))
            start, shard = end, shard + 1
        tensors, tokens, row_ids = zip(*parts, strict=True)
        return Rows(torch.cat(tensors), np.concatenate(tokens), np.concatenate(row_ids))


class Feature:
    """What is known of one latent: the record that the browser shows."""

    def __init__(self, record: dict[str, Any], text: "Callable[[int], str]") -> None:
        """`text` writes a token id."""
        self.record, self._text = record, text

    def examples(self, kind: str = "top") -> "pl.DataFrame":
        """Return `top` or `random` examples: the activation, token, the window as text, shard and row in it. Raises `InputError` for another kind."""
        import polars as pl  # noqa: PLC0415 - as above

        if kind not in ("top", "random"):
            raise InputError(f"Examples are 'top' or 'random'; found {kind!r}. Those of the quantile intervals are in .record.")
        lines = []
        for window in self.record["examples"][kind]:
            pieces = [self._text(token) for token in window["tokens"]]
            shard, row = window["row"]
            where = {"shard": shard, "row": row}
            lines.append({"activation": window["activation"], "token": pieces[window["peak"]], "text": "".join(pieces), **where})
        return pl.DataFrame(lines)


class Opened:
    """A pipeline's plan and store: everything that it has made, as tensors and tables. Each reading is verified against its manifest."""

    def __init__(self, pipeline: "Pipeline", store: Store) -> None:
        """`open` makes it."""
        self.pipeline, self.store = pipeline, store

    @property
    def config(self) -> PipelineConfig:
        """The configuration it was planned with."""
        return self.pipeline.config

    def model(self) -> "interp_assets.garcon.session.Model":
        """Load the subject model, with the SAEs that are trained. Raises `InputError` when it is not the one that was planned."""
        from interp_assets.garcon.locate import fingerprint_model  # noqa: PLC0415 - as above

        found, planned = fingerprint_model(self.config.model), self.pipeline.plan.model_fingerprint
        if found != planned:
            raise InputError(
                f"The model {self.config.model.name!r} has changed since it was planned (fingerprint {found}, planned {planned}). Plan again."
            )
        from interp_assets.garcon.features import AttachedSae, Fit  # noqa: PLC0415 - as above
        from interp_assets.storage.manifest import find_manifest  # noqa: PLC0415 - as above
        from interp_assets.train.refs import evaluation_ref, sae_ref  # noqa: PLC0415 - as above

        llm = _load_model(self.config.model, self.config.execution)
        llm.backend.norms = self._mean_norms()
        texts = self._held_out_texts()
        for sae in self.config.saes:
            if find_manifest(self.store, sae_ref(self.pipeline, sae.name)) is None:
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

    def activations(self, hook_point: str) -> StoredRows:
        """Open the activations of a hook point: all dataset shards, in order, special tokens included."""
        import numpy as np  # noqa: PLC0415 - as above

        from interp_assets.corpus.tokens import load_tokens  # noqa: PLC0415 - as above
        from interp_assets.harvest.rows import open_rows  # noqa: PLC0415 - as above
        from interp_assets.planning.hook_names import canonical_name  # noqa: PLC0415 - as above
        from interp_assets.shuffle.rows import SHARD_SHIFT  # noqa: PLC0415 - as above

        name = canonical_name(hook_point)
        self.pipeline.d_in(name)
        opened = [open_rows(self.pipeline, self.store, name, index) for index in self.pipeline.shard_indices]

        def read(shard: int, start: int, stop: int) -> Rows:
            index = self.pipeline.shard_indices[shard]
            tokens = self.pipeline.remember(("tokens", index), lambda: load_tokens(self.pipeline, self.store, index).token_ids)
            return Rows(
                opened[shard].read(start, stop), tokens[start:stop], np.arange(start, stop, dtype=np.uint64) + np.uint64(index << SHARD_SHIFT)
            )

        return StoredRows([rows.n_rows for rows in opened], read)

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

    def sweep(self) -> "pl.DataFrame":
        """Return the table of all SAEs, one line each."""
        from interp_assets.storage.manifest import load_manifest  # noqa: PLC0415 - as above
        from interp_assets.train.refs import sweep_ref  # noqa: PLC0415 - as above
        from interp_assets.train.sweep import TABLE, read_table  # noqa: PLC0415 - as above

        ref = sweep_ref(self.pipeline)
        return read_table(self.store, ref.path, load_manifest(self.store, ref), TABLE)

    def features(self, name: str) -> "pl.DataFrame":
        """Return the statistics of an SAE's features, one line a latent."""
        import polars as pl  # noqa: PLC0415 - as above

        return pl.read_parquet(io.BytesIO(self._bundle(name).read("features.parquet")))

    def feature(self, name: str, latent: int) -> Feature:
        """Read one feature's record: examples, histogram, logits, neighbours."""
        bundle = self._bundle(name)
        return Feature(bundle.record(latent), bundle.vocabulary.text)

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

    def _firings(self, name: str) -> Any:
        """Return how the latents of an SAE fire, as its features tell; None where these have not been made."""
        import numpy as np  # noqa: PLC0415 - as above
        import torch  # noqa: PLC0415 - as above

        from interp_assets.garcon.features import Firings  # noqa: PLC0415 - as above
        from interp_assets.storage.manifest import find_manifest  # noqa: PLC0415 - as above
        from interp_assets.web.refs import bundle_ref  # noqa: PLC0415 - as above

        if name not in self.config.features.saes or find_manifest(self.store, bundle_ref(self.pipeline, name)) is None:
            return None

        def quantile(latent: int, share: float) -> float:
            histogram = self.feature(name, latent).record["statistics"]["histogram"]
            counted = np.concatenate([[0], np.cumsum(histogram["counts"])])
            return float(np.interp(share * counted[-1], counted, histogram["edges"]))

        table = self.features(name)
        maximum, frequency = (torch.from_numpy(table[column].to_numpy().astype("float32")) for column in ("max", "frequency"))
        return Firings(maximum, frequency, quantile)

    def _bundle(self, name: str) -> Any:
        from interp_assets.web.opened import BundlePlace, OpenBundle  # noqa: PLC0415 - as above
        from interp_assets.web.refs import bundle_ref  # noqa: PLC0415 - as above

        self.config.sae(name)
        path = bundle_ref(self.pipeline, name).path
        return self.pipeline.remember(("bundle", path), lambda: OpenBundle(BundlePlace(self.store, path)))


def _load_model(model: ModelConfig, execution: ExecutionConfig) -> "interp_assets.garcon.session.Model":
    from interp_assets.garcon.session import Model  # noqa: PLC0415 - transformers takes seconds to import
    from interp_assets.garcon.subject import load_subject_model  # noqa: PLC0415 - as above
    from interp_assets.garcon.tokenizer import load_tokenizer  # noqa: PLC0415 - as above

    return Model(load_subject_model(model, execution), load_tokenizer(model))
