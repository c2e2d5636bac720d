"""The documents are true: their Python runs, their commands are accepted, and the files and names they quote exist."""

import ast
import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import finetune
import sdkit
from sdkit.cli.main import make_app
from tests.sdkit.tiny import picture, save_depth_model

ROOT = Path(__file__).parents[1]
UsageError = typer.BadParameter.__mro__[1]  # of the click that typer has inside
FOLDERS = ("", "docs", "finetune", "kernels", "bench", "sdkit/models/tabletop", "sdkit/presets")
DOCUMENTS = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.md"))


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def python_of(document: Path) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands_of(document: Path) -> list[str]:
    """The lines of its indented blocks that are commands, comments left out."""
    lines = re.findall(
        r"^    ((?:sdkit|python -m|make|pytest|\.ci/run)(?: .*)?)$", document.read_text("utf-8"), re.MULTILINE
    )
    return [line.split("  #")[0].strip() for line in lines]


def quoted(document: Path) -> list[str]:
    """What stands in backticks on one line, outside of Python blocks."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


# Python


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the files lie that the documents speak of."""
    root = tmp_path_factory.mktemp("desk")
    for name in ("input.png", "photo.png"):
        picture(64, 64).save(root / name)
    Image.fromarray(np.repeat(np.uint8([[0] * 32 + [255] * 32]), 64, 0)).save(root / "mask.png")
    save_depth_model(root / "stable-diffusion-2-depth")

    sd = sdkit.StableDiffusion.from_pretrained("tabletop")
    sd.save_single_file(root / "v1-5-pruned.safetensors")
    shutil.copytree(ROOT / "sdkit/models/tabletop", root / "path/to/a/diffusers/folder")
    save_file({"emb_params": torch.randn(2, 128)}, root / "my-style.safetensors")

    finetune.add_hypernetwork(sd, finetune.Hypernetwork([sd.unet.config.cross_attention_dim]))
    finetune.save_adapter(sd, root / "mine.pt")
    finetune.remove(sd)
    finetune.add_lora(sd, rank=2)
    finetune.save_adapter(sd, root / "mine.safetensors")
    return root


GIVEN: dict[str, dict[str, Any]] = {
    "docs/README.md": {
        "array": np.ones((32, 32), np.float32),
        "noise": torch.randn(1, 4, 16, 16, dtype=torch.float64),
        "model": lambda x, t: torch.zeros_like(x),
        "redder": lambda x, t: torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1),
    },
    "kernels/README.md": {
        "x": torch.randn(2, 64, 8, 8),
        "weight": torch.ones(64),
        "bias": torch.zeros(64),
        "time": torch.randn(2, 64),
        **dict.fromkeys("qkv", torch.randn(1, 16, 2, 8)),
    },
}
"""What a document's code takes for given: the values of its names."""


@pytest.fixture
def at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(desk)
    yield


@pytest.mark.usefixtures("at_the_desk")
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_of(d)], ids=name_of)
def test_the_python_of_a_document_runs(document: Path):
    names = dict(GIVEN.get(name_of(document), {}))
    for block in python_of(document):
        exec(compile(block, name_of(document), "exec"), names)


# Commands


@pytest.mark.usefixtures("at_the_desk")
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands_of(d)], ids=name_of)
def test_the_commands_of_a_document_are_accepted(document: Path):
    for command in commands_of(document):
        check_command(command)


def check_command(command: str) -> None:
    """Have the program's own parser read a command, or find the file or target that it names; raises otherwise."""
    program, *words = shlex.split(command)
    if program == "sdkit":
        group: Any = typer.main.get_command(make_app())
        assert words[0] in group.commands, command
        group.commands[words[0]].make_context(words[0], words[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words:
            assert word.split("=")[0] in (variables if "=" in word else targets), command
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-")), command
    elif program == ".ci/run":
        assert (ROOT / ".ci/run").is_file() and not words
    else:
        check_module(words[1], words[2:])


def check_module(name: str, arguments: list[str]) -> None:
    """``python -m NAME ARGUMENTS``."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    app = getattr(module, "app", None)
    if callable(parser := getattr(module, "parser", None)):
        parser().parse_args(arguments)
    if app is None and arguments and "parser" not in dir(module):
        app = typer.Typer()
        app.command()(module.main)
    if app is not None:
        typer.main.get_command(app).make_context(name, list(arguments))
    assert "__main__" in Path(module.__file__ or "").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command",
    [
        "sdkit txt2img x --stepz 3",
        "sdkit draw x",
        "make picture",
        "make image PICTURE=x",
        "pytest bench/test_nothing.py",
        "python -m finetune.train_lora --data pictures --output runs/mine --rnk 8",
        "python -m finetune.train_nothing",
    ],
)
def test_a_wrong_command_is_seen(command: str):
    with pytest.raises((AssertionError, ImportError, UsageError)):
        check_command(command)


# Files and names


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_a_document_quotes_exist(document: Path):
    folders = ("kernels", "sdkit", "finetune", "bench", "docs", "tests")
    files = {f"/{file.relative_to(ROOT)}" for folder in folders for file in (ROOT / folder).rglob("*")}
    files |= {f"/{file.name}" for file in ROOT.iterdir()} | {"/bench/results", "/NAME.py", "/finetune/train_NAME.py"}

    words = [word for text in quoted(document) for word in text.split()]
    wanted = [word for word in words if re.fullmatch(r"[\w/.-]+\.py|[\w./-]+/", word)]
    assert [word for word in wanted if not any(file.endswith(f"/{word.strip('/')}") for file in files)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_names_that_a_document_quotes_exist(document: Path):
    names = [m for text in quoted(document) for m in re.findall(r"^(?:sdkit|finetune|sdkernels)(?:\.\w+)+", text)]
    assert [name for name in names if not exists(name)] == []


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{name_of(document)}: {target}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


# What the packages promise


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in (sdkit, finetune) for name in package.__all__]
)
def test_what_is_promised_is_there(package: Any, name: str):
    assert getattr(package, name) is not None and name in dir(package)


@pytest.mark.parametrize("package", [sdkit, finetune])
def test_promises_are_kept_in_one_list(package: Any):
    """The lazy table, the imports for type checkers and ``__all__`` name the same."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    imported = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(package._HOMES) == set(package.__all__) - {"__version__"}
