"""What is typed after `nemo-fp8 launch`, taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.arguments import parse


def test_overrides_and_options_in_any_order() -> None:
    arguments = parse(["--dry-run", "fp8_recipe=mxfp8", "--resume", "launcher=slurm"])
    assert arguments.overrides == ("fp8_recipe=mxfp8", "launcher=slurm")
    assert (arguments.dry_run, arguments.resume, arguments.overwrite) == (True, True, False)
    assert arguments.payload.kind == "train"


def test_what_follows_two_dashes_belongs_to_the_script(in_tmp: Path) -> None:
    (in_tmp / "pretrain.py").write_text("")
    arguments = parse(["fp8_recipe=mxfp8", "--", "pretrain.py", "--resume", "-m", "--", "a b"])
    assert not arguments.resume
    assert not arguments.multirun
    assert arguments.payload.kind == "script"
    assert arguments.payload.target == str(in_tmp / "pretrain.py")
    assert arguments.payload.arguments == ("--resume", "-m", "--", "a b")


def test_a_module_of_the_users() -> None:
    payload = parse(["--", "-m", "my.package", "--x"]).payload
    assert (payload.kind, payload.target, payload.arguments) == ("module", "my.package", ("--x",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dryrun"], "Did you mean --dry-run?"),
        (["--"], "nothing after --"),
        (["--", "missing.py"], "no script missing.py"),
        (["--", "-m"], "names no module"),
        (["--resume", "--overwrite"], "give one"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_error(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        parse(words)
