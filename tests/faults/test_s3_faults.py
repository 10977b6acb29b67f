"""An S3 server that refuses, resets, truncates, stalls and flips bytes: right bytes or a clear error, and never a wrong artifact."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import Action, FaultProxy, Rule
from fault_tally import Tally
from road_world import Finished, RowCount, assert_as_if_nothing_happened, make_road_config
from s3_server import S3Server, start_s3_server

from interp_assets.compute.seeds import stream
from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import make_token_shard
from interp_assets.errors import ArtifactCorruptError, InterpError
from interp_assets.garcon.subject import load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.harvest.activations import harvest_shard
from interp_assets.planning.config import PipelineConfig
from interp_assets.shuffle.certificate import certify
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.plan import make_shuffle_plan
from interp_assets.shuffle.split import split_shard
from interp_assets.storage.store import Store, open_store

pytestmark = [pytest.mark.s3]
POINT = "resid_post.0"
NAMES = ("token_shards", "activations", "shuffle_plan", "shuffle_pass_1", "mixed_shards", "shuffle_certificate")
SOMETIMES = 0.08
WORDS: dict[Action, str] = {
    "refuse": "refused with 503",
    "reset_request": "reset in the middle of the request",
    "reset_answer": "reset in the middle of the answer",
    "truncate": "answer cut short",
    "slow": "slow answer",
}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultProxy, S3Server]]:
    """Run one server and a proxy in front of it."""
    server = start_s3_server(tmp_path_factory.mktemp("s3"))
    with FaultProxy(server.endpoint) as proxy:
        yield proxy, server
    server.stop()


def open_bucket(server: S3Server, endpoint: str, prefix: str) -> Store:
    """Open a prefix through an endpoint."""
    options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
    return open_store(f"s3://test/{prefix}", s3={**options, "aws_endpoint": endpoint})


def walk(config: PipelineConfig, store: Store) -> None:
    """Go from text to a certified shuffle with the stages' own functions."""
    pipeline = plan_corpus(config, store)
    tokenizer, model = load_tokenizer(config.model), load_subject_model(config.model, config.execution)
    for index in pipeline.shard_indices:
        make_token_shard(pipeline, store, tokenizer, index)
        harvest_shard(pipeline, store, model, index)
    make_shuffle_plan(pipeline, store)
    for index in pipeline.train_indices:
        split_shard(pipeline, store, POINT, index)
    for bucket in range(2):
        gather_bucket(pipeline, store, POINT, bucket)
    certify(pipeline, store, POINT)


def look(config: PipelineConfig, store: Store, finished: Finished) -> RowCount:
    """Every partition has the digest that it has without faults."""
    return assert_as_if_nothing_happened(config, finished, store, NAMES)


@pytest.mark.parametrize("action", ["refuse", "reset_request", "reset_answer", "truncate", "slow"])
def test_a_bad_network_costs_time_and_no_row(
    action: Action, proxy: tuple[FaultProxy, S3Server], finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally
) -> None:
    """One request in twelve fails, all the way: either the client tries again, or the run says so and the next one goes on."""
    faults, server = proxy
    config = make_road_config(tiny_world, tmp_path / "unused")
    draws = stream(0, "faults", "s3", action)
    rule = Rule(action, lambda _request: draws.uniform() < SOMETIMES)
    faults.rules = [rule]
    store = open_bucket(server, faults.endpoint, action)
    said: list[str] = []
    for _ in range(12):
        try:
            walk(config, store)
        except InterpError as error:
            said.append(str(error))
            continue
        break
    else:
        pytest.fail("twelve runs did not get through")
    assert all("s3://test" in text for text in said), said
    faults.rules = []
    assert rule.hits >= 5
    tally.fault(f"requests to a bucket: {WORDS[action]}", rule.hits)
    tally.right(look(config, open_bucket(server, server.endpoint, action), finished), n_refused=len(said))


def test_a_flipped_byte_in_a_range_is_found(
    proxy: tuple[FaultProxy, S3Server], finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally
) -> None:
    """No client notices it: our block checksums do, nothing is published from it, and the next run is right."""
    faults, server = proxy
    config = make_road_config(tiny_world, tmp_path / "unused")
    n_found = 0
    for nth in range(0, 40, 4):
        store = open_bucket(server, faults.endpoint, f"corrupt-{nth}")
        seen = iter(range(1 << 20))
        rule = Rule("corrupt", lambda request, seen=seen, nth=nth: request.method == "GET" and request.has_range and next(seen) == nth)
        faults.rules = [rule]
        try:
            walk(config, store)
        except ArtifactCorruptError as error:
            n_found += "is damaged in block" in str(error)
        faults.rules = []
        assert rule.hits == 1
        tally.fault("bytes flipped in a ranged read", rule.hits)
        if nth % 20 == 0:
            walk(config, open_bucket(server, server.endpoint, f"corrupt-{nth}"))
            tally.right(look(config, open_bucket(server, server.endpoint, f"corrupt-{nth}"), finished), n_refused=1)
    assert n_found == 10
