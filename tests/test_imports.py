"""Imports run in one direction: between packages, between the rooms of a package, and never in a circle."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house import ROOT, arrows_up, blank_shares, circles, counts, import_graph, rooms, unstaged_kernels

FOLDERS = {name: name for name in ("sdkit", "finetune", "bench", "tests")} | {"sdkernels": "kernels/sdkernels"}
ALLOWED = {
    "sdkernels": {"sdkernels"},
    "sdkit": {"sdkit", "sdkernels"},
    "finetune": {"finetune", "sdkit", "sdkernels"},
    "bench": {"bench", "finetune", "sdkit", "sdkernels"},
    "tests": {"tests", "finetune", "sdkit", "sdkernels", "bench"},
}
# The kernel folder can be loaded by itself under another name, so nothing but these may be named in it.
KERNEL_IMPORTS = {"torch", "triton"} | set(sys.stdlib_module_names)


def imports(file: Path, depth: int) -> list[tuple[int, str]]:
    """(line, dotted name) of the imports in a file that lies ``depth`` folders deep in its package.

    Left out are relative imports that stay inside the package; one that leaves it is given as '..name'.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            found.append((node.lineno, f"..{node.module or ''}"))
    return found


def forbidden(package: str, file: Path, name: str) -> bool:
    """Whether ``file`` of ``package`` may not import ``name``."""
    top = name.split(".")[0]
    if package == "sdkernels":
        return top not in KERNEL_IMPORTS
    if name.startswith(".."):
        return True
    if package == "sdkit" and top == "diffusers":
        return file.name != "diffusers_compat.py"
    return top in ALLOWED and top not in ALLOWED[package]


def violations(root: Path) -> list[str]:
    """Every import under ``root`` that runs against the arrows, as 'file:line imports name'."""
    return [
        f"{file.relative_to(root)}:{line} imports {name}"
        for package, folder in FOLDERS.items()
        for file in sorted((root / folder).rglob("*.py"))
        for line, name in imports(file, depth=len(file.relative_to(root / folder).parts))
        if forbidden(package, file, name)
    ]


def test_no_arrow_runs_back():
    assert sorted((ROOT / "kernels/sdkernels").glob("*.py")), "the folders were not found"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "seen"),
    [
        ("kernels/sdkernels/a.py", "import sdkit.unet", "sdkit.unet"),
        ("kernels/sdkernels/a.py", "from sdkernels.reference import x", "sdkernels.reference"),
        ("kernels/sdkernels/a.py", "import numpy", "numpy"),
        ("kernels/sdkernels/a.py", "from ..sdkit import x", "..sdkit"),
        ("sdkit/deep/a.py", "def f():\n    from finetune.lora import x", "finetune.lora"),
        ("sdkit/unet.py", "import diffusers", "diffusers"),
        ("sdkit/unet.py", "from tests.conftest import draw", "tests.conftest"),
        ("finetune/pretrain/a.py", "import torch, bench", "bench"),
        ("finetune/a.py", "import tests", "tests"),
        ("finetune/pretrain/a.py", "from ...bench import x", "..bench"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path: Path, file: str, line: str, seen: str):
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line + "\n")
    assert violations(tmp_path) == [f"{file}:{len(line.splitlines())} imports {seen}"]


def test_the_allowed_arrows_pass(tmp_path: Path):
    for file, text in {
        "kernels/sdkernels/a.py": "import math\nimport torch\nimport triton.language as tl\nfrom . import reference\n",
        "sdkit/a.py": "import sdkernels\nimport sdkit.unet\nimport transformers\n",
        "sdkit/diffusers_compat.py": "import diffusers\n",
        "finetune/pretrain/a.py": "from ..lora import x\n",
        "finetune/a.py": "from sdkit.unet import UNet2DConditionModel\n",
        "bench/a.py": "import finetune\nimport diffusers\n",
        "tests/a.py": "import bench\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


# Inside the packages


def test_no_circle_and_no_arrow_up():
    """Among files and among rooms; imports for types alone count."""
    graph = import_graph()
    assert circles(graph) == []
    assert [circles(rooms(graph, package)) for package in ("sdkit", "finetune")] == [[], []]
    assert arrows_up(graph) == []


@pytest.mark.parametrize(
    ("lower", "line"),
    [
        ("sdkit/errors.py", "from sdkit.networks import unet"),
        ("sdkit/errors.py", "def f():\n    import sdkit.networks.unet"),
        ("sdkit/errors.py", "if TYPE_CHECKING:\n    from sdkit.networks.unet import UNet"),
        ("sdkit/errors.py", "from .networks.unet import UNet"),
        ("sdkit/errors.py", "import sdkit.networks"),
    ],
)
def test_a_planted_circle_and_arrow_up_are_found(tmp_path: Path, lower: str, line: str):
    for file, text in {
        lower: line + "\n",
        "sdkit/networks/__init__.py": "from .unet import UNet\n",
        "sdkit/networks/unet.py": "from sdkit.errors import ConfigError\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)

    graph = import_graph(tmp_path)
    assert any(lower in circle for circle in circles(graph))
    assert circles(rooms(graph, "sdkit")) == [["errors", "networks"]]
    assert arrows_up(graph) == ["sdkit/errors imports networks"]


def private_imports(root: Path) -> list[str]:
    """Every import of a name that begins with an underscore, as 'file:line imports name'."""
    return [
        f"{file.relative_to(root)}:{node.lineno} imports {alias.name}"
        for folder in FOLDERS.values()
        if folder != "tests"
        for file in sorted((root / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.level > 0 or (node.module or "").split(".")[0] in FOLDERS)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]


def test_private_names_stay_in_their_files(tmp_path: Path):
    assert private_imports(ROOT) == []
    (tmp_path / "sdkit").mkdir()
    (tmp_path / "sdkit" / "a.py").write_text(
        "from os import _exit\nfrom sdkit.errors import _name\nfrom .b import _c\n"
    )
    assert private_imports(tmp_path) == ["sdkit/a.py:2 imports _name", "sdkit/a.py:3 imports _c"]


def test_files_that_a_newcomer_opens_are_few_and_counted_truly():
    """CONTRIBUTING.md has the numbers of `tests.house.counts`."""
    table = dict(
        re.findall(r"^\| ([a-z ]+) \| (\d[\d+ a-z]*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    )
    found = {purpose.partition(" (")[0]: len(files) for purpose, files in counts().items()}
    said = {purpose: sum(map(int, re.findall(r"\d+", number))) for purpose, number in table.items()}
    assert said == found
    most = [15, 1, 3, 2, 2]
    assert all(number <= limit for number, limit in zip(found.values(), most, strict=True))


# Air


def test_functions_have_air():
    """The median share of blank lines is 4 % at least, and the stages of long kernels are named."""
    shares = blank_shares()
    assert len(shares) > 200
    for package in ("kernels", "sdkit", "finetune", "bench"):
        assert statistics.median(share for file, share in shares.items() if file.startswith(package)) >= 0.04
    assert unstaged_kernels() == []


# Packaging


def test_wheels_hold_every_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        ".".join((name, *file.parent.relative_to(ROOT / FOLDERS[name]).parts))
        for name in ("sdkernels", "sdkit", "finetune")
        for file in (ROOT / FOLDERS[name]).rglob("*.py")
    }
    assert found == set(setuptools["packages"])


def test_importing_sdkit_is_light():
    heavy = ("transformers", "diffusers", "matplotlib", "accelerate", "peft", "finetune")
    code = f"import sys, sdkit; print([name for name in {heavy} if name in sys.modules])"
    paths = [str(ROOT), str(ROOT / "kernels")]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"], capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_kernels_distribution_beside_us_is_not_hidden(tmp_path: Path):
    """Hugging Face's ``kernels`` owns that import name; our folder of that name, first on the path, leaves it be."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    paths = [str(ROOT), str(ROOT / "kernels"), str(tmp_path)]
    code = f"import sys; sys.path[:0] = {paths}; import kernels, sdkernels; print(kernels.theirs, sdkernels.current())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path.parent)
    assert result.stdout.split() == ["True", "auto"], result.stdout + result.stderr


def test_the_kernel_folder_needs_nothing_of_ours(tmp_path: Path):
    """It imports and runs with itself alone on the path."""
    code = "import sys, sdkernels; print([m for m in sys.modules if m.split('.')[0] in ('sdkit', 'finetune')])"
    folder = str(ROOT / "kernels")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": folder}
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_what_the_wheels_carry_is_there():
    """A wheel leaves a missing file out without a word."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("sdkernels", "sdkit", "finetune"):
        assert "py.typed" in data[package] and (ROOT / FOLDERS[package] / "py.typed").is_file()
    model = ROOT / "sdkit" / "models" / "tabletop"
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert (model / f"{name}.safetensors").is_file()
    assert (ROOT / "finetune" / "pretrain" / "probe.safetensors").is_file()
    assert (ROOT / "sdkit" / "presets" / "clip_merges.txt.gz").is_file()
