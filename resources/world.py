"""What the assets need from the world: a configuration becomes its store, its plan, its tokenizer and its subject model.

The definitions hand it to every step, and no run can set it: who may start a run must not choose which model's code is trusted. Credentials are
no part of it or of a configuration: for an `s3://` root the storage client takes them from where every AWS client does, the `AWS_*`
environment variables or the machine's own role.
"""

from dataclasses import dataclass
from typing import Any

from interp_assets.errors import InputError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.storage.store import Store


@dataclass(frozen=True)
class World:
    """Opens what a pipeline works with."""

    config: PipelineConfig

    def store(self) -> Store:
        """Open the pipeline's own folder, `<root>/<name>`."""
        return open_pipeline_store(self.config)

    def open(self) -> tuple[Pipeline, Store]:
        """Read the plan. Raises `ArtifactMissingError` before `corpus_plan` has been materialized."""
        store = self.store()
        return load_pipeline(self.config, store), store

    def tokenizer(self) -> Any:
        """Load the subject model's tokenizer. Raises `InputError` when it is not the planned one."""
        from interp_assets.garcon.locate import fingerprint_tokenizer  # noqa: PLC0415 - transformers takes seconds to import, and most assets do without
        from interp_assets.garcon.tokenizer import load_tokenizer  # noqa: PLC0415 - as above

        tokenizer = load_tokenizer(self.config.model)
        self._check_planned("tokenizer", fingerprint_tokenizer(self.config.model), self.open()[0].plan.tokenizer_fingerprint)
        return tokenizer

    def model(self) -> Any:
        """Load the subject model onto the configured device; None of planted rows. Raises `InputError` when it is not the planned one."""
        if self.config.corpus.is_planted:
            return None
        from interp_assets.garcon.locate import fingerprint_model  # noqa: PLC0415 - as above
        from interp_assets.garcon.subject import load_subject_model  # noqa: PLC0415 - as above, for torch

        self._check_planned("model", fingerprint_model(self.config.model), self.open()[0].plan.model_fingerprint)
        return load_subject_model(self.config.model, self.config.execution)

    def _check_planned(self, what: str, found: str, planned: str) -> None:
        """Refuse to compute with another model under the planned one's ids."""
        if found != planned:
            raise InputError(
                f"The {what} of {self.config.model.name!r} has changed since it was planned (fingerprint {found}, planned {planned}): its "
                "artifacts would be mixed with another one's. Materialize `corpus_plan` (or `interp run`) to plan again; what the change "
                "touches is then made anew."
            )
