"""A command line made of dataclasses: options, the TOML file, and errors."""

import importlib
import re
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
    use_a_rather_long_name: Annotated[bool, "Another switch."] = True
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
        More(on=True),
    )


def test_help_shows_what_a_switch_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(["--help"], command(print, {"Things": Things, "More": More}))
    assert "--no-use-a-rather-long-name " in shown and " --use-a" not in shown
    assert "--on " in shown and "--no-on" not in shown
    assert "It is on; this switches it off." in " ".join(shown.replace("│", " ").split())
    assert parsed(["--needed", "p", "--no-use-a-rather-long-name", "--no-on"])[1] == More(False)
    assert parsed(["--needed", "p", "--use-a-rather-long-name"])[1] == More()


def test_the_file_gives_defaults(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('needed = "p"\n[tables]\nmany = ["a", "b"]\n[tables.deep]\non = true\nshare = 2\n')
    assert parsed(["--config", file]) == (Things(Path("p"), ("a", "b"), 2.0), More(on=True))
    assert parsed(["--share", 3, "--config", file, "--no-on", "--many", "c"]) == (
        Things(Path("p"), ("c",), 3.0),
        More(on=False),
    )
    every = (Things(Path("q"), (), 0.5), More(on=True))
    file.write_text(to_toml(*every), encoding="utf-8")
    assert parsed(["--config", file]) == every


def test_a_recipe_gives_defaults_below_those_of_the_file(tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.toml").write_text('share = 1.0\nmany = ["r"]\ntext = "r"')
    file = tmp_path / "run.toml"
    file.write_text('needed = "p"\nmany = ["f"]')
    got: list[tuple[Things, More]] = []
    app = command(lambda *configs: got.append(configs), {"Things": Things, "More": More}, tmp_path / "recipes")

    call(["--recipe", "one", "--needed", "p"], app)
    call(["--recipe", "one", "--config", file], app)
    call(["--text", "c", "--config", file, "--recipe", "one"], app)  # in any order
    assert got == [
        (Things(Path("p"), ("r",), 1.0), More(text="r")),
        (Things(Path("p"), ("f",), 1.0), More(text="r")),
        (Things(Path("p"), ("f",), 1.0), More(text="c")),
    ]
    said = " ".join(call(["--recipe", "two", "--needed", "p"], app, status=2).replace("│", " ").split())
    assert "expected one of one, found 'two'" in said
    (tmp_path / "recipes" / "one.toml").write_text("wrong = 1")
    assert "unknown options wrong" in call(["--recipe", "one", "--needed", "p"], app, status=2)
    assert "No such option: --recipe" in str(parsed(["--recipe", "one", "--needed", "p"], status=2))


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


@pytest.mark.parametrize("name", ["lora", "hypernetwork", "textual_inversion", "unet", "vae_decoder"])
def test_no_name_is_clipped_in_the_scripts_help(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(["--help"], importlib.import_module(f"finetune.train_{name}").app)
    assert "--max-train-steps " in shown and not re.search(r"--\S*…", shown)
