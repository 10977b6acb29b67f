"""A configuration is checked before any work, and names what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from interp_assets.errors import ConfigError
from interp_assets.planning.config import PipelineConfig, load_config, make_config
from interp_assets.planning.demo import demo_config


def test_the_demo_needs_no_file() -> None:
    """One command on a laptop."""
    config = demo_config()
    assert config.corpus.source == "stdlib"
    assert config.sae("demo").hook_point in config.harvest.hook_points
    assert config.heads
    assert config.heads.max_shards < config.corpus.max_shards
    assert set(config.heads.prompts) == {"repeated", "renamed"}


def test_a_yaml_file_becomes_a_configuration(tmp_path: Path) -> None:
    """What `interp run --config` reads; keys that are absent keep their defaults."""
    path = tmp_path / "p.yaml"
    path.write_text("name: mine\ncorpus: {source: files, path: texts}\nsaes:\n  - {name: a, d_sae: 64, k: 8}\nfeatures: {saes: [a]}\n")
    config = load_config(path, overrides={"root": "s3://bucket/x"})
    assert (config.name, config.corpus.path, config.sae("a").d_sae, config.root) == ("mine", "texts", 64, "s3://bucket/x")


def test_all_wrong_fields_are_named_at_once() -> None:
    """One run, one list: nobody wants to find five typos in five runs."""
    with pytest.raises(ConfigError) as caught:
        make_config({"corpus": {"context_length": 1, "souce": "files"}, "shuffle": {"passes": 0}}, where="p.yaml")
    text = str(caught.value)
    assert "p.yaml has 3 wrong fields" in text
    for part in ("corpus.context_length", "corpus.souce", "shuffle.passes", "(got 0)"):
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"saes": [{"name": "a"}, {"name": "a"}]}, "two SAEs have one name"),
        ({"saes": [{"name": "a"}]}, "features.saes names 'demo', but the SAEs are"),
        ({"saes": [{"hook_point": "resid_post.9"}]}, "reads 'resid_post.9', but harvest.hook_points are"),
        ({"saes": [{"k": 64, "d_sae": 32}]}, "k = 64 active latents of d_sae = 32"),
        ({"harvest": {"hook_points": ["resid_post.2", "resid_post.2"]}}, "names one twice"),
        ({"shuffle": {"passes": 6, "fan_out": 64}}, "mixed shards, at most 100,000"),
        ({"name": "../up"}, "is no name"),
        ({"saes": [{"name": "a/b"}]}, "is no name"),
    ],
)
def test_references_and_names_are_checked(content: dict, message: str) -> None:
    """Names become folders and partitions; a wrong reference would fail an hour later."""
    with pytest.raises(ConfigError) as caught:
        make_config(content)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("name: x\n bad: [\n", r"is not YAML: line 2, column 5: mapping values are not allowed here\. Mend it"), ("- 1", "must hold keys and values")],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    """The file's name must be in the message."""
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"broken.yaml {message}"):
        load_config(path)


def test_a_missing_file_says_how_to_get_one() -> None:
    """A next step in every message."""
    with pytest.raises(ConfigError, match=r"Cannot read the configuration nowhere.yaml.*`interp init` writes one"):
        load_config("nowhere.yaml")


def test_a_configuration_never_changes() -> None:
    """Ids are derived from it."""
    with pytest.raises(ValidationError, match="frozen"):
        demo_config().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_has_a_sentence() -> None:
    """The docstring under a field is its help text."""
    for model in [PipelineConfig, *[type(getattr(demo_config(), name)) for name in PipelineConfig.model_fields if name != "saes"]]:
        for name, field in getattr(model, "model_fields", {}).items():
            if name not in ("corpus", "model", "harvest", "shuffle", "saes", "features", "retrain", "execution"):
                assert field.description, f"{model.__name__}.{name} has no sentence"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"saes": [{"d_sea": 1024}]}, r"saes\.0\.d_sea: there is no such field; did you mean 'd_sae'\? \(got 1024\)"),
        ({"corpsu": {}}, r"corpsu: there is no such field; did you mean 'corpus'\?"),
        ({"corpus": {"nothing_like_it": 1}}, r"corpus\.nothing_like_it: there is no such field \(got 1\)"),
        (
            {"saes": [{"hook_point": "resid_post.9"}]},
            r"pipeline: SAE 'demo' reads 'resid_post\.9', but harvest\.hook_points are \['resid_post\.2'\]$",
        ),
    ],
)
def test_a_wrong_field_is_said_in_our_words(content: dict[str, Any], message: str) -> None:
    """A typing slip is the commonest error of all; pydantic's own words and the whole configuration after it do not help."""
    with pytest.raises(ConfigError, match=message):
        make_config(content)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("batch_topk", {"decay_shar": 0.1}, "there is no option 'decay_shar'; did you mean 'decay_share'?"),
        ("relu", {"auxk_weight": 0.1}, "the option 'auxk_weight' decides nothing for relu: it is one of topk, batch_topk, matryoshka_batch_topk"),
        ("relu", {"betas": [0.9]}, "the option 'betas' is 2 numbers from 0, at most 1 (got (0.9,))"),
        ("relu", {"decay_share": [0.1, 0.2]}, "the option 'decay_share' is a number from 0, at most 1"),
        ("relu", {"decay_share": float("nan")}, "the option 'decay_share' is a number from 0, at most 1 (got nan)"),
        ("relu", {"p": 0}, "the option 'p' is a number above 0, at most 2"),
        ("matryoshka_batch_topk", {"groups": [0.5, 0.25]}, "the option 'groups' is numbers whose sum is 1"),
        ("matryoshka_batch_topk", {"groups": []}, "the option 'groups' is a list of numbers above 0"),
        ("relu", {"p": "big"}, "saes.0.options.p"),
    ],
)
def test_options_are_checked_against_their_architecture(architecture: str, options: dict, message: str) -> None:
    """An option that nothing reads would look like a result."""
    with pytest.raises(ConfigError) as caught:
        make_config({"saes": [{"name": "demo", "architecture": architecture, "options": options}]})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({}, "but corpus.source is not said, and so stdlib, which reads no path: write `source: files`"),
        ({"source": "stdlib"}, "but corpus.source is stdlib, which reads no path"),
        ({"source": "planted", "context_length": 64}, "but corpus.source is planted, which reads no path"),
    ],
)
def test_a_path_that_nothing_would_read_is_refused(corpus: dict[str, Any], message: str) -> None:
    """Whoever names a folder of texts and no source would get Python's own sources."""
    with pytest.raises(ConfigError, match=f"corpus.path is 'texts', {message}"):
        make_config({"name": "p", "corpus": {"path": "texts", **corpus}})
