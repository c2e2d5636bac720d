"""The ``sdkit`` command: make pictures, show ideas, look into files, convert checkpoints.

Everything that needs torch is imported inside the commands, so that ``sdkit --help`` answers at once. A mistake
of the user's ends in one line on stderr: exit status 2 for a wrong command line, 1 for everything else.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from sdkit.cli.files import convert, inspect
from sdkit.cli.grid import grid_command
from sdkit.cli.options import picture_command, with_adapters
from sdkit.cli.pictures import make_pictures, reproduce
from sdkit.cli.show import show
from sdkit.cli.ui import ui
from sdkit.errors import SDKitError, file_problem, printable
from sdkit.generation.options import TASKS
from sdkit.version import __version__

EXAMPLES = {
    "txt2img": (
        '"a red cube and a blue sphere" --seed 3 --num 4 --out pictures/',
        '"a portrait" --model v1-5-pruned.safetensors --sampler dpmpp_2m --sigmas karras --steps 20',
        '"a star" --lora stars.safetensors:0.8 --strip --attention-map',
    ),
    "img2img": ('"a cyan sphere" --image input.png --strength 0.5',),
    "inpaint": ('"an orange cylinder" --image input.png --mask mask.png --mask-blur 2',),
    "depth2img": ('"a marble statue" --model stable-diffusion-2-depth --image photo.png --strength 0.8',),
    "grid": (
        '"a red cube" --vary guidance=1,4,7.5 --vary seed=1..4',
        '"a red cube" --vary prompt=red,green --vary sampler=ddim,dpmpp_2m --seed 3',
        '"a red cube" --num 9',
    ),
    "reproduce": ("picture.png again.png", "photo.png again.png --model v1-5-pruned.safetensors"),
    "show": ("forward --image input.png", 'guidance --prompt "a blue cube" --out scales.png'),
    "ui": ("", "--model v1-5-pruned.safetensors --networks my-loras/"),
    "convert": ("v1-5-pruned.safetensors folder/", "stars.safetensors kohya.safetensors --format kohya"),
    "inspect": ("v1-5-pruned.safetensors", "stars.safetensors"),
}
"""Of each command: what may stand behind it."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (``sys.argv`` by default) and exit: 0, 1 error, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = _warning_line
    try:
        status = make_app()(args=arguments or ["--help"], prog_name="sdkit", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        message, status = _explain(error)
        if message is None:
            raise
        print(f"sdkit: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def make_app() -> typer.Typer:
    """The commands, with the options of the tasks and of the adapters that there are now."""
    app = typer.Typer(
        help="Latent diffusion from the command line.",
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    app.callback(invoke_without_command=True)(_root)
    commands = [picture_command(task, make_pictures) for task in TASKS.values()]
    for command in (*commands, grid_command(), with_adapters(reproduce), show, ui, convert, inspect):
        app.command(epilog=_examples(command.__name__))(command)
    return app


def _examples(command: str) -> str:
    """What stands below the help of a command, a paragraph for each."""
    return "\n\n".join(f"sdkit {command} {arguments}".strip() for arguments in EXAMPLES[command])


def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"sdkit {__version__}")


def _warning_line(message: Warning | str, *_where: object, **_more: object) -> str:
    """A warning in one line, without the place in our code."""
    return f"sdkit: warning: {printable(' '.join(str(message).split()))}\n"


def _explain(error: Exception) -> tuple[str | None, int]:
    """The message and exit status for an error of the user's; no message for a bug of ours."""
    usage_message = getattr(error, "format_message", None)  # the parser's own errors
    if usage_message is not None:
        return usage_message() + " (see sdkit --help)", 2
    if isinstance(error, SDKitError):
        return str(error) or type(error).__name__, 1
    if (problem := file_problem(error)) is not None:
        return problem, 1
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", str(error)):
        detail = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return f"not enough memory: use a smaller --width, --height or --num{detail}", 1
    return None, 1
