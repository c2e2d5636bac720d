"""The command that draws one prompt over the values of up to three options, as a labelled sheet: ``sdkit grid``."""

from __future__ import annotations

import inspect
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdkit.adapter_kinds import adapter_kinds
from sdkit.cli.options import Given, ModelOptions, picture_command
from sdkit.cli.output import destinations
from sdkit.errors import ConfigError
from sdkit.generation.axes import PROMPT, SIDE, Axis, grid_sheet, read_axes
from sdkit.generation.option_text import argument_names
from sdkit.generation.options import TASKS

if TYPE_CHECKING:
    from PIL import Image

    from sdkit.stable_diffusion import StableDiffusion

USELESS = ("strip", "attention_map", "preview_every")
"""Parameters of a picture that a sheet has no use for."""

Vary = Annotated[
    list[str],
    typer.Option(
        help="OPTION=VALUE,VALUE,… (or ; between them), or OPTION=FIRST..LAST; once for columns, rows and sheets. "
        "prompt=WORD,OTHER,… puts others in the word's place.",
        rich_help_panel="Output",
    ),
]


def grid_command() -> Callable[..., None]:
    """The command, as typer takes it: all options of txt2img, and --vary."""
    default: list[str] = []
    vary = inspect.Parameter("vary", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Vary)
    command = picture_command(TASKS["text_to_image"], draw_grid, {"vary": vary}, USELESS)
    command.__name__ = "grid"
    command.__doc__ = "Draw a prompt over the values of options, as a labelled sheet; or --num pictures as one."
    return command


def draw_grid(given: Given, vary: Sequence[str]) -> None:
    """Draw all cells; the sheet is written anew after every picture."""
    from tqdm import tqdm

    axes, given = _axes(given, vary)
    places = destinations("grid.png" if given.output.out == "out.png" else given.output.out, 1)
    cells = {place: _cell(given, axes, place) for place in product(*(range(len(axis.values)) for axis in axes))}

    for cell in cells.values():
        cell.check_early()

    images: dict[tuple[int, ...], Image.Image] = {}
    shown = given.arguments["progress"] and sys.stderr.isatty()
    with places.taken() as (path,), tqdm(total=len(cells), unit="picture", disable=not shown) as bar:
        for sd, place, cell in _by_model(cells):
            arguments = cell.arguments | {"num_images_per_prompt": 1, "preview_every": 0, "progress": False}
            images[place] = getattr(sd, cell.task.method)(**arguments).images[0]
            _write(images, axes, path, given, vary)
            bar.update()
    print(path)


# What is drawn


def _axes(given: Given, vary: Sequence[str]) -> tuple[list[Axis], Given]:
    """The axes, columns first, and what is given beside them. Raises ConfigError for what has no place in a grid."""
    num = given.arguments.pop("num_images_per_prompt")
    if not vary and num == 1:
        raise ConfigError("--vary: expected OPTION=VALUE,… or --num above 1, found neither")
    if vary and num != 1:
        raise ConfigError(f"--num: not beside --vary; --vary seed=1..{num} draws as many")

    if given.arguments.get("seed") is None:  # one for all cells
        given = replace(given, arguments=given.arguments | {"seed": secrets.randbelow(2**31)})
    first = given.arguments["seed"]
    return read_axes(vary, "--vary") or [Axis("seed", tuple(str(first + k) for k in range(num)))], given


def _cell(given: Given, axes: Sequence[Axis], place: Sequence[int]) -> Given:
    """What is given, with each axis' value in it."""
    for axis, k in zip(axes, place, strict=True):
        given = _with(given, axis, axis.values[k])
    return given


def _with(given: Given, axis: Axis, value: str) -> Given:
    """What is given, with another value of one option, read as the command line reads it."""
    if axis.option == PROMPT:
        return replace(given, arguments=given.arguments | {PROMPT: axis.in_prompt(given.arguments[PROMPT], value)})

    name = axis.option.replace("-", "_")
    names, kinds = argument_names(given.task), [kind.name for kind in adapter_kinds()]
    on_model = [field.name for field in fields(ModelOptions)]
    if name not in (*names, *kinds, *on_model) or name in ("num", "progress", "preview_every"):
        raise ConfigError(f"--vary: expected an option of sdkit txt2img, or prompt, found {axis.option!r}")

    read = _read(axis.option, value)
    if name in kinds:
        return replace(given, adapters=given.adapters | {name: read.adapters[name]})
    if name in on_model:
        return replace(given, model=replace(given.model, **{name: getattr(read.model, name)}))
    return replace(given, arguments=given.arguments | {names[name]: read.arguments.get(names[name])})


@cache
def _read(option: str, value: str) -> Given:
    """What txt2img makes of one option."""
    caught: list[Given] = []
    app = typer.Typer(add_completion=False)
    app.command()(picture_command(TASKS["text_to_image"], caught.append))
    switch = {"true": f"--{option}", "false": f"--no-{option}"}.get(value.lower())
    arguments = ["", switch] if switch else ["", f"--{option}", value]
    typer.main.get_command(app).main(args=arguments, standalone_mode=False)
    return caught[0]


# How it is drawn


def _by_model(
    cells: dict[tuple[int, ...], Given],
) -> Iterator[tuple[StableDiffusion, tuple[int, ...], Given]]:
    """The cells with their models, which are loaded one after the other, each once."""

    def key(cell: Given) -> str:
        return repr((cell.model, sorted(cell.adapters.items())))

    for own in dict.fromkeys(map(key, cells.values())):
        those = {place: cell for place, cell in cells.items() if key(cell) == own}
        model, adapters = (first := next(iter(those.values()))).model, first.adapters
        sd = model.load(adapters)
        for place, cell in those.items():
            yield sd, place, cell


def _write(
    drawn: dict[tuple[int, ...], Image.Image], axes: Sequence[Axis], path: Path, given: Given, vary: Sequence[str]
) -> None:
    """The sheet of what there is so far."""
    from sdkit.generation.png import write_png
    from sdkit.images.sheet import contact_sheet, enlarged

    if vary:
        sheet = grid_sheet(drawn, axes)
    else:
        places = sorted(drawn)
        images, labels = [enlarged(drawn[place], SIDE) for place in places], [axes[0].labels[p[0]] for p in places]
        sheet = contact_sheet(images, round(len(axes[0].values) ** 0.5), labels)
    said = {name: given.arguments[name] for name in (PROMPT, "seed")}
    write_png(sheet, path, said | {"vary": list(vary), "model": given.model.model})
