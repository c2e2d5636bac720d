"""The folders import each other in one direction only: sdkernels, sdkit, finetune, bench, tests."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
