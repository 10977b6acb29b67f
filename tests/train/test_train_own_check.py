"""The kit for architectures of one's own: a sound one passes, and each check can fail."""

from pathlib import Path

import pytest
from own_files import HEAD, RELU, SOUND, change, write_file
from typer.testing import CliRunner

from interp_assets.planning.config import SaeConfig, find_code, make_config
from interp_assets.terminal.cli import app
from interp_assets.train.own.check import _CHECKS, SIZES, Finding, _Case, check_architecture


def configure(folder: Path, source: bytes, function: str = "mine", **fields: int) -> SaeConfig:
    """Write a file and return the SAE that is checked."""
    write_file(folder, source.decode())
    saes = [{"name": "checked", "architecture": f"my_sae.py:{function}", **SIZES, **fields}]
    return find_code(make_config({"saes": saes, "features": {"saes": []}}), folder).saes[0]


def test_p_anneal_passes_all_checks(tmp_path: Path) -> None:
    """What a person sees in seconds, before a training of hours."""
    config = configure(tmp_path, SOUND.encode(), "p_anneal", n_rows=40_000)
    found = {item.check: item for item in check_architecture(SOUND.encode(), config)}
    assert list(found) == list(_CHECKS)
    assert [item for item in found.values() if not item.is_sound] == []
    assert found["declared"].said == "kind relu; p_end=0.5"
    assert found["resume"].said == "equal bits after a checkpoint"
    assert "times the CPU of a step of relu" in found["time"].said


SPOILED = {
    "gradients": (change("penalty=penalty", "penalty=penalty.detach() + f.mean() * 0"), "is off by"),
    "resume": (change("    penalty = ", "    f = f * (0.9 + 0.1 * torch.rand(()))\n    penalty = "), "have other bits"),
    "ranks": (change("    penalty = ", "    penalty = 10 * (f.sum(1).mean() - 1) ** 2 + "), "a term is no mean over rows. Declare whole_batch=True"),
    "found": (change("    f = torch", "    f = 0.001 * torch"), r"of 24 directions in 59 steps \(relu"),
    "folded": (change("    penalty = ", "    f = f * (f > 0.2)\n    penalty = "), "the saved relu SAE reconstructs otherwise than training did"),
}


@pytest.mark.parametrize("check", list(SPOILED))
def test_each_check_can_fail(tmp_path: Path, check: str) -> None:
    """One that cannot is no check."""
    source, message = SPOILED[check]
    config = configure(tmp_path, source, n_rows=15_000)
    with pytest.raises(Exception, match=message):
        _CHECKS[check](_Case(source, config))


def test_what_looks_at_a_whole_batch_says_so(tmp_path: Path) -> None:
    """BatchTopK by hand: not sliceable, calibrated, and saved with one threshold."""
    text = (
        (HEAD + RELU)
        .replace('kind="relu"', 'kind="batch_topk"')
        .replace(
            "    penalty = step.coefficient * (f * step.norms(w)).sum(1).mean()\n",
            "    f = f * (f >= f.flatten().topk(step.k * len(x)).values[-1])\n",
        )
    )
    source = text.replace(", penalty=penalty", "").encode()
    case = _Case(source, configure(tmp_path, source, n_rows=15_000))
    assert _CHECKS["ranks"](case).startswith("not sliceable (whole_batch)")
    assert _CHECKS["folded"](case).startswith("jump_relu, as in training")
    assert "L0 2.0" in _CHECKS["found"](case)


def test_a_file_that_cannot_be_executed_has_one_finding(tmp_path: Path) -> None:
    """And its line."""
    source = change("import torch\n", "import torch\nnowhere\n")
    found = list(check_architecture(source, configure(tmp_path, source)))
    assert [item._replace(said="") for item in found] == [Finding("declared", is_sound=False, said="")]
    assert "my_sae.py, line 2, `nowhere`: NameError" in found[0].said


def test_the_command_fails_where_a_check_does(tmp_path: Path) -> None:
    """Exit code 1 and the line; a wrong name is told without PyTorch."""
    write_file(Path(), change("f = torch", "f = = torch").decode())
    done = CliRunner().invoke(app, ["check", "my_sae.py:mine"])
    assert done.exit_code == 1
    assert (
        done.stdout
        == 'FAILED  declared  my_sae.py, line 6: it is no Python: invalid syntax (\'f = = torch.relu(x @ w["W_enc_T"].T + w["b_enc"])\').\n'
    )
    assert "names no function in a file" in str(CliRunner().invoke(app, ["check", "relu"]).exception)
