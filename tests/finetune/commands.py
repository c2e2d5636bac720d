"""Calling a training script as a command line does."""

from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner

from finetune.train_lora import app


def call(arguments: Sequence[object], program=app, status: int = 0) -> str:
    """Run the command line; everything that it printed."""
    result = CliRunner().invoke(program, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def flag(f: Field[Any]) -> str:
    """The option of a dataclass' field as the help shows it: of a switch that is on, what switches it off."""
    return f"--{'no-' if f.default is True else ''}{f.name.replace('_', '-')} "


def two_pictures(folder: Path) -> Path:
    """Two pictures with captions, written into a new folder; returns it."""
    folder.mkdir()
    for name, size, colour in (("a", (64, 64), "red"), ("b", (48, 80), "blue")):
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} cube")
    return folder
