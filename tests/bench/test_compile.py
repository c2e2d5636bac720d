"""Kernels compiled before a GPU is there: a cache that may be carried elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compile
from sdkernels import registry

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    """What Python prints last, with Triton's compiler in place of its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def compiled(cache: Path) -> str:
    """Compile the kernels of geglu into a cache."""
    what = ("--op", "geglu", "--purposes", "hot", "--jobs", "2", "--pack")
    return run("-m", "bench.compile", "--cache", str(cache), *what)


def test_a_cache_that_was_carried_names_the_files_that_lie_there(tmp_path: Path) -> None:
    entry = tmp_path / "KEY"
    entry.mkdir()
    group = entry / "__grp__kernel.json"
    group.write_text(json.dumps({"child_paths": {"kernel.cubin": "/elsewhere/KEY/kernel.cubin"}}))
    compile.settle(tmp_path)
    assert json.loads(group.read_text()) == {"child_paths": {"kernel.cubin": str(entry / "kernel.cubin")}}


def test_what_is_needed_first_is_compiled_first() -> None:
    code = (
        "from bench.compile import wanted; found = wanted(['tests', 'hot'], ['geglu', 'layer_norm'], 90);"
        "print([found[0].op, found[0].dtype, len(found) == len({one.binary for one in found}), found[-1].dtype])"
    )
    assert run("-c", code) == "['geglu', 'float16', True, 'float32']"


def test_hot_cases_of_one_picture() -> None:
    """A word of the name tells: neither b256 nor b8, but a decoder's b1."""
    for spec in registry.OPS.values():
        words = [set(case.name.split()) for case in spec.one_picture]
        assert words and all({"b1", "b2"} & own and not {"b4", "b8", "b256", "b512"} & own for own in words), spec.name
    assert any("vae" in case.name for case in registry.GROUP_NORM.one_picture)


@pytest.mark.slow
def test_the_networks_launch_what_no_case_has_and_training_steps_too() -> None:
    code = (
        "from bench.compile import wanted; found = wanted(['networks'], [], 90); names = {one.name for one in found};"
        "print(len(found) > 100, {'group_norm_backward_kernel', 'lora_linear_forward_kernel'} <= names)"
    )
    assert run("-c", code) == "True True"


@pytest.mark.slow
def test_a_cache_holds_machine_code_alone_and_is_valid_elsewhere(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert compiled(first).startswith("4 of 4 launches compiled, 0 problems")
    assert {file.suffix for file in first.glob("*/*")} <= {".cubin", ".json", ".source"}
    carried = {file.parent.name: file.read_bytes() for file in first.glob("*/*.cubin")}
    shutil.rmtree(first)
    compile.archive_of(first).rename(compile.archive_of(second))

    compile.settle(second)
    times = {file.parent.name: file.stat().st_mtime_ns for file in second.glob("*/*.cubin")}
    assert carried == {file.parent.name: file.read_bytes() for file in second.glob("*/*.cubin")}
    compiled(second)
    assert times == {file.parent.name: file.stat().st_mtime_ns for file in second.glob("*/*.cubin")}


def test_under_the_interpreter_nothing_can_be_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            compile.main(["--cache", str(tmp_path)])
        assert "unset it" in capsys.readouterr().err
