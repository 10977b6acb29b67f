"""What a file declares is read off it: checked before any code has run, and with names that are near."""

from pathlib import Path
from typing import Any

import pytest
from own_files import HEAD, RELU, SOUND, change, write_file

from interp_assets.errors import ConfigError, OwnCodeError
from interp_assets.planning.config import PipelineConfig, SaeConfig, find_code, load_config, make_config
from interp_assets.planning.own import MAX_BYTES, check_metric, fill_options, hash_code, read_declaration, split_name


def named(architecture: str = "my_sae.py:mine", **fields: Any) -> PipelineConfig:
    """Return a configuration of one SAE."""
    return make_config({"saes": [{"architecture": architecture, **fields}], "features": {"saes": []}})


def test_a_name_is_a_path_and_a_function() -> None:
    """Anything else is a built-in architecture, or a typing error that is answered with the nearest."""
    assert split_name("a/b/my_sae.py:p_anneal") == ("a/b/my_sae.py", "p_anneal")
    assert [split_name(name) for name in ("relu", "my_sae.py", "my_sae.py:", ":f", ".py:f", "a.py:b:c", "a.py:1")] == [None] * 7
    with pytest.raises(ConfigError, match=r"there is no architecture 'rellu'; did you mean 'relu'\? .* your own: my_sae.py:function"):
        named("rellu")


def test_a_declaration_is_read_without_executing_it() -> None:
    """Kind, constants and options; what is not stated follows from the kind."""
    found = read_declaration(change('kind="relu"', 'kind="jump_relu", betas=[0.5, 0.9], unit_norm=True'), "my_sae.py", "mine")
    assert (found.kind, found.constants, found.options) == ("jump_relu", {"betas": (0.5, 0.9)}, {"extra": 0.0, "n": 1})
    assert (found.error, found.unit_norm, found.whole_batch, found.surrogate_gradient) == ("mean", True, True, False)
    relu = read_declaration(SOUND.encode(), "my_sae.py", "p_anneal")
    assert (relu.error, relu.unit_norm, relu.whole_batch, relu.functions) == ("sum", None, False, {})
    assert fill_options({"a": 1, "b": 0.5, "c": (1.0,), "d": True}, {"a": 2.0, "b": 3.0, "d": 0.0}) == {"a": 2, "b": 3.0, "c": (1.0,), "d": False}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('kind="relu"', 'kind="relu", warmup_step=3', r"line 4: a declaration has no 'warmup_step'; did you mean 'warmup_steps'\?"),
        ('kind="relu"', 'kind="relu", zzz=3', r"line 4: a declaration has no 'zzz'\. It has "),
        ('kind="relu"', 'kind="zzz"', r"line 5: kind is 'zzz'\. It is the built-in architecture"),
        ('kind="relu"', 'kind="relu", betas=(1, 2)', r"line 4: betas is 2 numbers from 0, at most 1"),
        ('kind="relu"', "kind=KIND", r"line 4: kind has to be written out"),
        ('kind="relu"', 'kind="relu", whole_batch=1', r"line 4: whole_batch is True or False"),
        ('kind="relu"', 'kind="relu", fold=lambda w: w', r"line 4: fold is the name of a function of the same file"),
        ('@architecture(kind="relu")', "@architecture", r"line 5: mine is declared by @lab.architecture\(kind="),
        ('@architecture(kind="relu")', "", r"line 5: mine is declared by"),
        ("extra: float = 0.0", "extra: str = 'a'", r"line 5: 'extra' is 'a': options are numbers"),
        ("extra: float = 0.0", "betas: float = 0.0", r"line 5: 'betas' is an option of every architecture"),
        ("step, *,", "*,", r"line 5: mine takes \(w, x, y, step, \*, options\)"),
        ("n: int = 1", "**more", r"line 5: mine takes"),
    ],
)
def test_a_wrong_declaration_names_its_line(before: str, after: str, message: str) -> None:
    """As an editor would."""
    with pytest.raises(OwnCodeError, match=f"my_sae.py, {message}"):
        read_declaration(change(before, after), "my_sae.py", "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extr": 1.0}, r"there is no option 'extr'; did you mean 'extra'\? \(my_sae.py:mine has extra, n, warmup_steps"),
        ({"p": 0.5}, r"the option 'p' decides nothing for my_sae.py:mine"),
        ({"n": 1.5}, r"the option 'n' is a whole number"),
        ({"extra": [1.0, 2.0]}, r"the option 'extra' is a number"),
        ({"betas": 0.5}, r"the option 'betas' is 2 numbers"),
    ],
)
def test_options_are_those_of_the_function_and_of_the_trainer(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """An option that is accepted and read by nobody would look like a result."""
    write_file(tmp_path, HEAD + RELU)
    with pytest.raises(ConfigError, match=f"SAE 'demo': {message}"):
        find_code(named(options=options), tmp_path)


def test_an_option_without_a_default_has_to_be_given(tmp_path: Path) -> None:
    """Python would say so in the middle of a training."""
    write_file(tmp_path, (HEAD + RELU).replace("extra: float = 0.0", "extra: float"))
    with pytest.raises(ConfigError, match=r"my_sae.py:mine needs the option 'extra', which has no default"):
        find_code(named(), tmp_path)
    assert find_code(named(options={"extra": 2.0}), tmp_path).saes[0].code is not None


def test_the_file_lies_beside_the_configuration_and_nowhere_else(tmp_path: Path) -> None:
    """Whoever may write into a working directory would run code in everybody's trainings."""
    write_file(tmp_path / "project" / "archs")
    (tmp_path / "project" / "p.yaml").write_text("saes: [{architecture: 'archs/my_sae.py:p_anneal'}]\nfeatures: {saes: []}\n")
    (sae,) = load_config(tmp_path / "project" / "p.yaml").saes
    assert (sae.architecture, sae.code.digest) == ("my_sae.py:p_anneal", hash_code(SOUND.encode()))
    assert sae.code.path == str(tmp_path / "project" / "archs" / "my_sae.py")
    (tmp_path / "p.yaml").write_text((tmp_path / "project" / "p.yaml").read_text())
    with pytest.raises(ConfigError, match=rf"{tmp_path}/archs/my_sae.py cannot be read \(No such file .* Its path is relative to {tmp_path}"):
        load_config(tmp_path / "p.yaml")
    write_file(tmp_path, "x" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="more than 1,048,576 bytes"):
        find_code(named(), tmp_path)
    write_file(tmp_path)
    with pytest.raises(ConfigError, match=r"has no function 'p_aneal'; did you mean 'p_anneal'\? It has"):
        find_code(named("my_sae.py:p_aneal"), tmp_path)
    with pytest.raises(ConfigError, match=r"has no function 'zzz'\. It has "):
        find_code(named("my_sae.py:zzz"), tmp_path)


def test_a_stated_hash_is_taken_and_the_file_not_looked_at(tmp_path: Path) -> None:
    """A machine that has the pipeline and not the file: what `interp config` prints is enough."""
    code = {"digest": "0" * 64}
    (sae,) = find_code(named("archs/my_sae.py:mine", code=code), tmp_path).saes
    assert (sae.architecture, sae.code.digest) == ("my_sae.py:mine", "0" * 64)
    with pytest.raises(ConfigError, match="code belongs to an architecture of one's own, and 'relu' is built in"):
        named("relu", code=code)
    with pytest.raises(ConfigError, match=r"saes.0.code.digest"):
        named(code={"digest": "../x"})


def test_metrics_are_functions_of_files_too(tmp_path: Path) -> None:
    """By name in the YAML; the ids of trainings know nothing of them."""
    write_file(tmp_path, "def half_norm(sae, blocks):\n    return {}\n", "my.py")
    config = find_code(make_config({"metrics": ["my.py:half_norm"]}), tmp_path)
    (metric,) = config.metrics
    assert (metric.function, metric.prefix, metric.code.path) == ("my.py:half_norm", "my", str(tmp_path / "my.py"))
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
    assert "metrics" not in make_config({}).model_dump()
    with pytest.raises(ConfigError, match=r"my.py has no function 'halfnorm'; did you mean 'half_norm'\? It has"):
        find_code(make_config({"metrics": ["my.py:halfnorm"]}), tmp_path)
    with pytest.raises(ConfigError, match=r"metrics.0: 'my.py' names no function in a file"):
        make_config({"metrics": ["my.py"]})
    with pytest.raises(OwnCodeError, match=r"my.py, line 1: a metric takes \(sae, blocks\)"):
        check_metric(b"def f(sae): pass", "my.py", "f")


def test_the_hash_is_identity_and_the_path_is_not(tmp_path: Path) -> None:
    """And the ids of built-in architectures have neither."""
    write_file(tmp_path)
    (sae,) = find_code(named("my_sae.py:p_anneal"), tmp_path).saes
    assert sae.identity()["code"] == {"digest": hash_code(SOUND.encode())}
    assert SaeConfig.model_validate(sae.identity()).identity() == sae.identity(), "as it is read back from a manifest"
    assert str(tmp_path) not in str(sae.identity())
    assert "code" not in SaeConfig().identity()
    again = PipelineConfig.model_validate_json(find_code(named("my_sae.py:p_anneal"), tmp_path).model_dump_json())
    assert again.saes[0] == sae
