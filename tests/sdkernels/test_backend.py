"""Choosing the implementation: the context manager, threads, torch.compile, the environment variable, refusals."""

import asyncio
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import sdkernels
from sdkernels import in_force, reference
from sdkernels.backend import Device, device_of, simulate
from tests.conftest import draw
from tests.sdkernels.test_kernels import DEVICE

BACKEND: Any = sys.modules["sdkernels.backend"]
R = TypeVar("R")
FOLDER = Path(sdkernels.__file__).parent

CALLS: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
    "group_norm": (reference.group_norm, (draw("x", (2, 4, 3, 3)), 2, None, None)),
    "group_norm_of_sum": (
        reference.group_norm_of_sum,
        (draw("x", (2, 4, 3, 3)), None, draw("s", (4,)), draw("y", (2, 2, 3, 3)), 2, None, None),
    ),
    "self_attention": (reference.self_attention, tuple(draw(n, (1, 3, 2, 4)) for n in "qkv")),
    "cross_attention": (reference.cross_attention, tuple(draw(n, (1, 3, 2, 4)) for n in "qkv")),
    "cross_attention_block": (
        reference.cross_attention_block,
        (draw("x", (1, 3, 6)), draw("w", (8, 6)), *(draw(n, (1, 5, 2, 4)) for n in "kv"), draw("o", (6, 8)), None),
    ),
    "geglu": (reference.geglu, (draw("x", (2, 6)),)),
    "linear_geglu": (reference.linear_geglu, (draw("x", (2, 6)), draw("w", (8, 6)), None)),
    "layer_norm": (reference.layer_norm, (draw("x", (2, 6)), None, None)),
    "lora_linear": (
        reference.lora_linear,
        (draw("x", (2, 4)), draw("w", (3, 4)), None, draw("a", (2, 4)), draw("b", (3, 2)), 0.5),
    ),
    "add_noise": (
        reference.add_noise,
        (draw("x", (1, 4)), draw("n", (1, 4)), torch.tensor([1]), torch.tensor([0.9, 0.5]), "epsilon"),
    ),
    "prepare_step": (
        reference.prepare_step,
        (draw("x", (1, 1, 4)), None, torch.tensor([0, 0]), draw("s", (2,)), draw("t", (2, 3)), 1),
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


def test_nested_blocks_restore_after_errors():
    before = sdkernels.current()
    with sdkernels.backend("triton"):
        with pytest.raises(KeyError), sdkernels.backend("eager"), sdkernels.backend("auto"):
            raise KeyError
        assert sdkernels.current() == "triton"
    assert sdkernels.current() == before


def in_a_thread(function: Callable[[], R]) -> R:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_new_thread_starts_with_the_default():
    default = sdkernels.current()
    with sdkernels.backend("eager" if default != "eager" else "triton"):
        assert in_a_thread(sdkernels.current) == default


def test_overlapping_blocks_of_two_threads_neither_see_nor_restore_each_other():
    """One enters, the other enters, the one leaves, the other leaves."""
    default, turns = sdkernels.current(), threading.Barrier(2, timeout=60)

    def use(name: str, enters: int, leaves: int) -> list[str]:
        """The backend that this thread sees after each of four turns, which both threads have taken."""
        seen: list[str] = []
        with ExitStack() as stack:
            for turn in range(4):
                turns.wait()
                if turn == enters:
                    stack.enter_context(sdkernels.backend(name))
                if turn == leaves:
                    stack.close()
                turns.wait()
                seen.append(sdkernels.current())
        return seen

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(use, "eager", 0, 2), pool.submit(use, "triton", 1, 3)
        assert one.result() == ["eager", "eager", default, default]
        assert other.result() == [default, "triton", "triton", default]
    assert sdkernels.current() == default


def test_the_tasks_of_one_thread_have_their_own_backend():
    async def use(name: str, turns: list[asyncio.Event]) -> str:
        with sdkernels.backend(name):
            turns[0].set()
            await turns[1].wait()
            return sdkernels.current()

    async def both() -> tuple[str, str]:
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(use("eager", [a, b]), use("triton", [b, a]))

    assert tuple(asyncio.run(both())) == ("eager", "triton")


def test_a_simulated_gpu_is_one_threads_alone():
    x = torch.empty(1)
    real = device_of(x)
    with simulate(80):
        assert device_of(x) == Device(80, 108) and in_a_thread(lambda: device_of(x)) == real
        with pytest.raises(KeyError), simulate(120):
            raise KeyError
        assert device_of(x).capability == 80
    assert device_of(x) == real


def test_what_is_in_force_has_two_attributes():
    assert (in_force.backend, in_force.device) == (None, None)
    with pytest.raises(AttributeError, match="no attribute 'current'"):
        _ = in_force.current


def test_a_backward_pass_in_another_thread_takes_the_forwards_kernels(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where PyTorch runs it in a thread of its own, outside of the block that chose the kernels."""
    module, launched = sys.modules["sdkernels.geglu"], list[int]()
    launch = module.geglu_backward
    monkeypatch.setattr(module, "geglu_backward", lambda x, dy: launched.append(threading.get_ident()) or launch(x, dy))
    x = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    with sdkernels.backend("triton"):
        y = sdkernels.geglu(x).sum()
    with sdkernels.backend("eager"):
        in_a_thread(y.backward)
    assert len(launched) == 1 and launched[0] != threading.get_ident() and x.grad is not None


class Graphs:
    """A backend for torch.compile that runs each graph as it is, and keeps whether it launches geglu's kernel."""

    def __init__(self) -> None:
        self.launch: list[bool] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        self.launch.append("geglu_forward" in str(graph.graph))
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def test_a_compiled_function_is_compiled_anew_under_another_backend(graphs: Graphs):
    compiled, x = torch.compile(sdkernels.geglu, fullgraph=True, backend=graphs), torch.ones(2, 4, device=DEVICE)

    def kernels(name: str) -> list[bool]:
        """Whether the graphs so far launch a kernel, after a call under this backend."""
        with sdkernels.backend(name):
            torch.testing.assert_close(compiled(x), reference.geglu(x))
        return list(graphs.launch)

    assert kernels("eager") == [False]
    assert kernels("triton") == [False, True]
    assert kernels("eager") == [False, True]  # what is there is used again

    # Another thread has its own backend, and so its own of the two graphs.
    with sdkernels.backend("eager"):
        assert in_a_thread(lambda: kernels("triton")) == [False, True]
        assert in_a_thread(lambda: kernels("eager")) == [False, True]


@pytest.mark.parametrize("inner", ["eager", "triton"])
def test_a_block_inside_of_a_compiled_function(graphs: Graphs, inner: str):
    def call(x: torch.Tensor) -> torch.Tensor:
        with sdkernels.backend(inner):
            return sdkernels.geglu(x)

    x, outer = torch.ones(2, 4, device=DEVICE), "triton" if inner == "eager" else "eager"
    with sdkernels.backend(outer):
        for _ in range(2):
            torch.testing.assert_close(torch.compile(call, fullgraph=True, backend=graphs)(x), reference.geglu(x))
            assert sdkernels.current() == outer
    assert graphs.launch == [inner == "triton"]


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
    others = {"BACKENDS", "UnsupportedError", "backend", "current", "fuses", "reference"}
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


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    """The forward pass alone runs; a gradient, and a tangent, which is refused and not dropped, reach autograd."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
            ctx.save_for_backward(x)
            ctx.factor = factor
            return factor * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return ctx.factor * dy, None

    x, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert BACKEND.apply(Double, x, 2.0).tolist() == [2, 2]
    assert BACKEND.apply(Double, leaf, 2.0).grad_fn.name() == "DoubleBackward"
    with torch.no_grad():
        assert not BACKEND.apply(Double, leaf, 2.0).requires_grad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        BACKEND.apply(Double, forward_ad.make_dual(x, x), 2.0)


def test_a_launch_has_its_tensors_gpu_as_current_device_compiled_or_not(monkeypatch: pytest.MonkeyPatch):
    entered: list[str] = []

    @contextmanager
    def enter(device: torch.device) -> Generator[None]:
        entered.append(device.type)
        yield

    @BACKEND.opaque(torch.empty_like)
    def launched_somewhere(x: Tensor) -> Tensor:
        assert entered, "the launch came before its device"
        return x + 1

    monkeypatch.setattr(BACKEND, "_current_device", enter)
    for function in (launched_somewhere, torch.compile(launched_somewhere, fullgraph=True, backend="eager")):
        entered.clear()
        assert function(torch.zeros(2)).tolist() == [1, 1] and entered == ["cpu"]
