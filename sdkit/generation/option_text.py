"""Options as one writes them: their names on the command line, and values as text."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from sdkit.checks import expect
from sdkit.errors import ConfigError
from sdkit.generation.options import Option, Settings, TaskKind, declarations, is_whole


def argument_names(task: TaskKind) -> dict[str, str]:
    """Of the options of a task's command, as Python has them, the arguments of the task's method that they are."""
    names = {"prompt": "prompt", "negative": "negative_prompt"}
    names |= {python_name(argument.option): argument.name for argument in task.arguments}
    flagged = {name: declared for name, declared in declarations(Settings).items() if declared.flag is not None}
    return names | {python_name(declared): name for name, declared in flagged.items()}


def python_name(declared: Option) -> str:
    """The parameter that typer makes ``--FLAG`` of."""
    return (declared.flag or "").replace("-", "_")


def read_interval(text: str) -> tuple[float, float]:
    """LOW:HIGH; HIGH left out is infinity. Raises ConfigError."""
    low, _, high = text.partition(":")
    try:
        return float(low or 0), float(high) if high else math.inf
    except ValueError:
        raise ConfigError(f"--interval: expected LOW:HIGH, two noise levels, found {text!r}") from None


def read_value(task: TaskKind, name: str, text: str) -> Any:
    """The value of an argument of a task, written as on the command line. Raises ConfigError."""
    types: dict[str, Any] = {f.name: f.type for f in fields(Settings)}
    types |= {argument.name: argument.type for argument in task.arguments}
    if name == "guidance_interval":
        return read_interval(text)

    kind = str(types.get(name, "str"))
    whole, switch = is_whole(kind), {"true": True, "false": False}.get(text.strip().lower())
    if "bool" in kind:
        expect(switch is not None, name, "true or false", text)
        return switch
    if whole is None:
        return text
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a {'whole ' if whole else ''}number, found {text!r}") from None
