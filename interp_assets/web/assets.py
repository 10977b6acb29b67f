"""The feature browser as an asset: one bundle for each SAE that is shown."""

import dagster as dg

from interp_assets.graph.faces import OWNERS, RETRIES, Events, code_version, made, record
from interp_assets.graph.partitions import Layout, every
from interp_assets.planning.progress import Progress
from interp_assets.visualize.refs import features_key
from interp_assets.web.bundle import build_bundle
from interp_assets.web.refs import BUNDLE_VERSION
from resources.world import World

GROUP = "web"


def make_assets(layout: Layout) -> list[dg.AssetsDefinition]:
    """Make the assets of this stage."""
    return [_feature_browser(layout, name) for name in layout.config.features.saes]


def _feature_browser(layout: Layout, name: str) -> dg.AssetsDefinition:
    @dg.asset(
        key=list(features_key(name, "feature_browser")),
        deps=[every(features_key(name, "feature_records"))],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("python", "sqlite"),
        code_version=code_version(BUNDLE_VERSION),
        description=(
            f"The records of {name} as a bundle that a browser opens by range requests from any folder or bucket: feature table, search index, "
            "records, vocabulary. `interp serve` shows it."
        ),
    )
    def feature_browser(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        tokenizer = world.tokenizer()
        yield from record(
            context, lambda _key: made([build_bundle(pipeline, store, name, tokenizer, progress=progress.advance)], store.url), progress
        )

    return feature_browser
