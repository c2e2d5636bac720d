"""A command line made of frozen dataclasses: each field is an option, and a key of the TOML file that --config reads.

@dataclass(frozen=True)
class TrainConfig:
    max_train_steps: Annotated[int, "Optimizer steps.", Range(1)] = 1000
"""

from __future__ import annotations

import inspect
import json
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from finetune.options import declared
from sdkit.errors import ConfigError, SDKitError, file_problem, one_line


def command(run: Callable[..., object], panels: Mapping[str, type[Any]], recipes: Path | None = None) -> typer.Typer:
    """A command line with a panel of options for each dataclass; ``run`` gets one instance of each, in order.

    recipes: a folder of TOML files for --recipe, which names one of them. An option given on the command line wins over
    the file of --config, that over the recipe, and the recipe over the default. An SDKitError, or one about a
    file, ends the program with status 1 and the error on stderr in a line; Ctrl-C with status 130.
    """
    every = [(panel, kind, f) for panel, kind in panels.items() for f in fields(kind)]
    assert len({f.name for *_, f in every}) == len(every), "two dataclasses share an option's name"
    help = (
        "A TOML file with any of these options, tables or not, hyphens or underscores; the command line wins "
        "(--no-NAME switches off what the file has switched on)."
    )
    config = Annotated[Path | None, typer.Option(help=help, is_eager=True, callback=_read_config, metavar="FILE")]
    parameters = [_parameter("config", config, None)]
    if recipes is not None:
        parameters.append(_parameter("recipe", _recipe_option(recipes), None))
    parameters += [_parameter(f.name, _annotation(kind, f, panel), _default(f)) for panel, kind, f in every]

    def main(**values: Any) -> None:
        try:
            run(*(_instance(kind, values) for kind in panels.values()))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None
        except (SDKitError, OSError, RuntimeError) as error:
            problem = str(error) if isinstance(error, SDKitError) else file_problem(error)
            if problem is None:  # a bug of ours
                raise
            print(f"error: {problem}", file=sys.stderr)
            raise typer.Exit(1) from None

    main.__doc__ = run.__doc__
    main.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    main.__annotations__ = {p.name: p.annotation for p in parameters}

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})(main)
    return app


class Command(TyperCommand):
    """A command whose help shows of a switch the name that changes something: both in a row would be clipped."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        switches = [parameter for parameter in self.params if parameter.secondary_opts]
        names = [(switch.opts, switch.secondary_opts) for switch in switches]
        for switch, (on, off) in zip(switches, names, strict=True):
            switch.opts, switch.secondary_opts = off if switch.default else on, []
        try:
            super().format_help(ctx, formatter)
        finally:
            for switch, (on, off) in zip(switches, names, strict=True):
                switch.opts, switch.secondary_opts = on, off


def to_toml(*configs: Any) -> str:
    """The TOML file that --config reads to get these dataclasses again; options that are None are left out."""
    values = {f.name: getattr(config, f.name) for config in configs for f in fields(config)}
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    # A JSON string with its characters as they are is a basic string of TOML.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(kind: type[Any], f: Field[Any], panel: str) -> Any:
    option = declared(kind)[f.name]
    hint, help = option.type, option.help if option.range is None else f"{option.help} A number {option.range}."
    if get_origin(hint) is tuple:  # typer repeats an option for a list
        hint = list[get_args(hint)[0]]
    shown: dict[str, Any] = {"show_default": False} if isinstance(f.default, bool) else {}
    if option.choices:
        help, shown["metavar"] = f"{help} One of {', '.join(map(str, option.choices))}.", "NAME"
    elif option.number is not None:
        shown["metavar"] = "N" if option.number is int else "X"
    elif f.default is True:
        help = f"{help} It is on; this switches it off."
    elif hint not in (bool, bool | None):
        shown["metavar"] = "FILE" if Path in (hint, *get_args(hint)) else "TEXT"
    return Annotated[hint, typer.Option(help=help, rich_help_panel=panel, **shown)]


def _default(f: Field[Any]) -> Any:
    if f.default is MISSING:
        return inspect.Parameter.empty
    return list(f.default) if isinstance(f.default, tuple) else f.default


def _instance(kind: type[Any], values: Mapping[str, Any]) -> Any:
    own = {f.name: values[f.name] for f in fields(kind)}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in own.items()})


def _recipe_option(folder: Path) -> Any:
    """An option that takes the name of one of the folder's files."""
    files = {file.stem: file for file in sorted(folder.glob("*.toml"))}

    def read(context: typer.Context, name: str | None) -> str | None:
        if name is not None and name not in files:
            raise typer.BadParameter(f"expected one of {', '.join(files)}, found {name!r}")
        if name is not None:
            context.default_map = _defaults(context, files[name]) | dict(context.default_map or {})
        return name

    help = f"Options that go together, of which every one may be given beside it. One of {', '.join(files)}."
    return Annotated[str | None, typer.Option(help=help, is_eager=True, callback=read, metavar="NAME")]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the options that follow."""
    if path is not None:
        context.default_map = dict(context.default_map or {}) | _defaults(context, path)
    return path


def _defaults(context: typer.Context, path: Path) -> dict[str, Any]:
    """The values in a file, by the names of options. Raises BadParameter for what is none."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        values = _flat(content, path)
        known = {str(parameter.name) for parameter in context.command.params} - {"config", "recipe", "help"}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ConfigError(f"{path}: unknown options {', '.join(unknown)}")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path}: cannot be read as TOML ({one_line(error)})") from None
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return values


def _flat(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Options of all tables together, with underscores."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        inner = _flat(value, path) if isinstance(value, dict) else {key.replace("-", "_"): value}
        twice = values.keys() & inner.keys()
        if twice:
            raise ConfigError(f"{path}: {', '.join(sorted(twice))} is given twice")
        values |= inner
    return values
