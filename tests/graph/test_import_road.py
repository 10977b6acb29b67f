"""An SAE that another tool trained goes the rest of the road: imported, evaluated, its features gathered, shown; nothing is trained."""

import shutil
from pathlib import Path

import dagster as dg
from measured_saes import load_table
from road_world import Finished

from interp_assets.graph.jobs import run_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.storage.manifest import load_manifest, read_file
from interp_assets.storage.store import open_store
from interp_assets.terminal.importing import Place, plan_import
from interp_assets.train.exchange.folders import export_sae
from interp_assets.train.refs import METRICS, evaluation_ref, sae_ref
from interp_assets.visualize.refs import records_ref
from interp_assets.web.refs import bundle_ref


def test_an_imported_sae_goes_the_rest_of_the_road(finished: Finished, tmp_path: Path) -> None:
    """The same measurements and the same records as the SAE that was exported, byte for byte; the table leaves empty what it has no recipe for."""
    shutil.copytree(finished.config.root, tmp_path / "data")
    before = finished.config.model_copy(update={"root": str(tmp_path / "data")})
    store = open_pipeline_store(before)
    own = load_pipeline(before, store)
    export_sae(own, store, "demo", "saelens", open_store(str(tmp_path / "theirs")))
    entry = plan_import(before, Place(str(tmp_path / "theirs"), "foreign")).entry
    features = before.features.model_copy(update={"saes": ["foreign"]})
    config = PipelineConfig.model_validate({**before.model_dump(), "saes": [entry.model_dump()], "features": features.model_dump()})
    with dg.DagsterInstance.ephemeral() as instance:
        reports = {report.name: report.n_made for report in run_road(config, instance)}
    assert {name for name, n_made in reports.items() if n_made} >= {"sae", "sae_evaluation", "sweep", "features/foreign/feature_records"}
    pipeline = load_pipeline(config, store)
    measured = [
        read_file(store, ref.path, load_manifest(store, ref), METRICS) for ref in (evaluation_ref(own, "demo"), evaluation_ref(pipeline, "foreign"))
    ]
    assert measured[0] == measured[1]
    for latent_slice in range(2):
        refs = records_ref(own, "demo", latent_slice), records_ref(pipeline, "foreign", latent_slice)
        records = [read_file(store, ref.path, load_manifest(store, ref), "records.bin") for ref in refs]
        assert records[0] == records[1]
    assert load_manifest(store, bundle_ref(pipeline, "foreign")).facts["d_sae"] == 32
    facts = load_manifest(store, sae_ref(pipeline, "foreign")).facts
    assert facts["imported"]["model"] == before.model.name.rpartition("/")[2]
    (row,) = load_table(pipeline, store).rows(named=True)
    assert (row["name"], row["learning_rate"], row["train_loss"], row["mixed_shards_id"]) == ("foreign", None, None, None)
    assert row["fvu"] == load_manifest(store, evaluation_ref(own, "demo")).facts["fvu"]
