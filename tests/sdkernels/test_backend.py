"""Choosing the implementation: the context manager, the environment variable, and what "triton" refuses."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sdkernels
from sdkernels import reference
from tests.conftest import draw

FOLDER = Path(sdkernels.__file__).parent

CALLS: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
    "group_norm": (reference.group_norm, (draw("x", (2, 4, 3, 3)), 2, None, None)),
    "self_attention": (reference.self_attention, tuple(draw(n, (1, 3, 2, 4)) for n in "qkv")),
    "cross_attention": (reference.cross_attention, tuple(draw(n, (1, 3, 2, 4)) for n in "qkv")),
    "cross_attention_block": (
        reference.cross_attention_block,
        (draw("x", (1, 3, 6)), draw("w", (8, 6)), *(draw(n, (1, 5, 2, 4)) for n in "kv"), draw("o", (6, 8)), None),
    ),
    "geglu": (reference.geglu, (draw("x", (2, 6)),)),
    "layer_norm": (reference.layer_norm, (draw("x", (2, 6)), None, None)),
    "lora_linear": (
        reference.lora_linear,
        (draw("x", (2, 4)), draw("w", (3, 4)), None, draw("a", (2, 4)), draw("b", (3, 2)), 0.5),
    ),
    "add_noise": (
        reference.add_noise,
        (draw("x", (1, 4)), draw("n", (1, 4)), torch.tensor([1]), torch.tensor([0.9, 0.5]), "epsilon"),
    ),
    "sampler_step": (
        reference.sampler_step,
        (draw("r", (1, 1, 4)), None, draw("c", (1, 4)), None, draw("k", (1, 1, 3)), 0),
    ),
}


def in_a_new_process(code: str, value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "SDKERNELS_BACKEND"}
    environment |= {"PYTHONPATH": str(FOLDER.parent)} | ({} if value is None else {"SDKERNELS_BACKEND": value})
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["auto", "triton", "eager"])
def test_the_context_manager_sets_and_restores(name: str):
    before = sdkernels.current()
    with sdkernels.backend(name):
        assert sdkernels.current() == name
        with sdkernels.backend("eager"):
            assert sdkernels.current() == "eager"
        assert sdkernels.current() == name
    assert sdkernels.current() == before


def test_the_context_manager_restores_after_an_error():
    before = sdkernels.current()
    with pytest.raises(KeyError), sdkernels.backend("triton"):
        raise KeyError
    assert sdkernels.current() == before


def test_an_unknown_name_is_refused_and_changes_nothing():
    before = sdkernels.current()
    with pytest.raises(ValueError, match="auto, triton, eager, found 'cuda'"), sdkernels.backend("cuda"):
        pytest.fail("the block ran")
    assert sdkernels.current() == before


@pytest.mark.parametrize(("value", "expected"), [(None, "auto"), ("eager", "eager"), ("triton", "triton")])
def test_the_environment_variable(value: str | None, expected: str):
    result = in_a_new_process("import sdkernels; print(sdkernels.current())", value)
    assert result.stdout.strip() == expected, result.stderr


def test_an_unknown_environment_variable_is_refused():
    result = in_a_new_process("import sdkernels; sdkernels.current()", "fast")
    assert result.returncode != 0
    assert "SDKERNELS_BACKEND: expected one of auto, triton, eager, found 'fast'" in result.stderr


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_without_a_kernel_the_definition_runs(op: str, name: str):
    definition, arguments = CALLS[op]
    with sdkernels.backend(name):
        torch.testing.assert_close(getattr(sdkernels, op)(*arguments), definition(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("op", CALLS)
def test_triton_refuses_what_it_has_no_kernel_for(op: str):
    with sdkernels.backend("triton"), pytest.raises(sdkernels.UnsupportedError, match=op):
        getattr(sdkernels, op)(*CALLS[op][1])


def test_every_public_op_is_exercised_here():
    others = {"BACKENDS", "UnsupportedError", "backend", "current", "reference"}
    assert set(sdkernels.__all__) - others == set(CALLS)


def test_the_folder_loads_by_itself_under_another_name():
    spec = importlib.util.spec_from_file_location(
        "loaded_elsewhere", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loaded_elsewhere"] = module
    try:
        spec.loader.exec_module(module)
        x = draw("x", (2, 6))
        assert torch.equal(module.geglu(x), sdkernels.geglu(x))
        assert module.reference is not sdkernels.reference
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "loaded_elsewhere"]:
            del sys.modules[name]
