"""A command line made of dataclasses: options, the TOML file, and errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from finetune.recipe.command_line import command, to_toml
from sdkit.checks import Range
from sdkit.errors import ConfigError, SDKitError
from tests.finetune.commands import call


@dataclass(frozen=True)
class Things:
    needed: Annotated[Path, "Required."]
    many: Annotated[tuple[str, ...], "Repeated."] = ("x",)
    share: Annotated[float | None, "A number or none.", Range(0, 5)] = None


@dataclass(frozen=True)
class More:
    on: Annotated[bool, "A switch."] = False
    text: Annotated[str, "Words."] = 'é "\\ \n'


def parsed(arguments: Sequence[object], status: int = 0) -> tuple[Things, More] | str:
    got: list[tuple[Things, More]] = []
    printed = call(arguments, command(lambda *configs: got.append(configs), {"Things": Things, "More": More}), status)
    return got[0] if status == 0 else printed


def test_options_become_dataclasses():
    assert parsed(["--needed", "p"]) == (Things(Path("p")), More())
    assert parsed(["--needed", "p", "--many", "a", "--many", "b", "--share", "1", "--on"]) == (
        Things(Path("p"), ("a", "b"), 1.0),
        More(True),
    )


def test_the_file_gives_defaults(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('needed = "p"\n[tables]\nmany = ["a", "b"]\n[tables.deep]\non = true\nshare = 2\n')
    assert parsed(["--config", file]) == (Things(Path("p"), ("a", "b"), 2.0), More(True))
    assert parsed(["--share", 3, "--config", file, "--no-on", "--many", "c"]) == (
        Things(Path("p"), ("c",), 3.0),
        More(False),
    )
    every = (Things(Path("q"), (), 0.5), More(True))
    file.write_text(to_toml(*every), encoding="utf-8")
    assert parsed(["--config", file]) == every


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nedeed = 1\nwrong = 2", "unknown options nedeed, wrong"),
        ("a = ", "cannot be read as TOML"),
        ("[a]\non = true\n[b]\non = true", "on is given twice"),
        ("needed = 'p'\nshare = 'x'", "share"),
    ],
)
def test_a_wrong_file_is_a_clear_error(tmp_path: Path, content: str, message: str):
    (tmp_path / "run.toml").write_text(content)
    assert message in " ".join(str(parsed(["--config", tmp_path / "run.toml"], status=2)).replace("│", " ").split())
    assert "Missing option" in str(parsed([], status=2))


def test_errors_of_users_end_with_status_1_and_others_are_raised():
    def fail(error: Exception):
        def run(things: Things) -> None:
            raise error

        return command(run, {"Things": Things})

    assert "error: one line" in call(["--needed", "p"], fail(ConfigError("one line")), status=1)
    assert "error: x" in call(["--needed", "p"], fail(SDKitError("x")), status=1)
    assert "error: p: Permission denied: change its permissions" in call(
        ["--needed", "p"], fail(PermissionError(13, "Permission denied", "p")), status=1
    )
    full = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert "could be written: make room, or write elsewhere" in call(["--needed", "p"], fail(full), status=1)
    assert call(["--needed", "p"], fail(KeyboardInterrupt()), status=130) == "stopped\n"
    for bug in (ZeroDivisionError(), RuntimeError("mat1 and mat2"), ConnectionResetError(104, "x")):
        with pytest.raises(type(bug)):
            call(["--needed", "p"], fail(bug))
