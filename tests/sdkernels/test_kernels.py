"""Every kernel against its definition in float64: no worse than eager PyTorch in the same dtype, forward and backward.

On a CPU the kernels run in Triton's interpreter (float32 and float16; its bfloat16 is wrong), on a GPU as they are.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sdkernels
from sdkernels import reference, registry
from sdkernels.agreement import compare, disagreements, fresh
from sdkernels.backend import simulate
from sdkernels.op_spec import Case, Inputs, OpSpec

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in registry.OPS.values() for case in spec.odd]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Let torch.empty give NaN, so that an element which a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert torch.utils.deterministic.fill_uninitialized_memory and bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def check(spec: OpSpec, inputs: Inputs, dtype: torch.dtype, package: Any = sdkernels) -> None:
    """Outputs and gradients of the kernel are no worse than those of eager PyTorch."""
    assert disagreements(spec, inputs, dtype, package) == []


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_single_wrong_element_is_seen(wrong: float) -> None:
    """Among 20,000 in float16, of which 0.1 moves the root-mean-square error by less than it may."""
    truth = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eager = truth.half()
    assert compare("right", eager, eager, truth) == []
    ours = eager.clone()
    ours[7] += wrong
    found = compare("wrong", ours, eager, truth)
    assert found and "largest" in found[-1] and len(found) == (1 if wrong == 0.1 else 2)
    assert compare("dtype", ours.float(), eager, truth) and compare("shape", ours[1:], eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_errors_are_no_worse_than_eagers(spec: OpSpec, case: Case, mean: float, dtype: torch.dtype) -> None:
    check(spec, spec.inputs(case, dtype, DEVICE, seed=len(case.name), mean=mean), dtype)


def spread(x: Any) -> Any:
    """The same values in memory that is neither contiguous nor aligned to 16 bytes."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    room = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan") if x.is_floating_point() else -1).to(x)
    view = room[..., 1::2]
    view.copy_(x)
    return view


@pytest.mark.parametrize("spec", registry.OPS.values(), ids=lambda s: s.name)
def test_inputs_need_not_be_contiguous_nor_aligned(spec: OpSpec) -> None:
    for case in spec.odd[1:4]:
        inputs = {k: spread(v) for k, v in spec.inputs(case, torch.float32, DEVICE).items()}
        check(spec, inputs, torch.float32)


@pytest.mark.parametrize("spec", [spec for spec in registry.OPS.values() if spec.gradients], ids=lambda s: s.name)
def test_a_second_derivative_is_refused(spec: OpSpec) -> None:
    """The kernels of a backward pass have none: their results must not pass for constants."""
    leaves = fresh(spec.inputs(spec.odd[1], torch.float32, DEVICE), spec.gradients)
    with sdkernels.backend("triton"):
        out = getattr(sdkernels, spec.name)(**leaves)
    total = (out[0] if isinstance(out, tuple) else out).square().sum()

    first, *_ = [leaves[name] for name in spec.gradients if isinstance(leaves.get(name), Tensor)]
    (gradient,) = torch.autograd.grad(total, first, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_a_large_sample_has_a_grid_within_cudas_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first dimension alone may a grid have more than 65,535 programs."""
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(sys.modules["sdkernels.add_noise"], "add_noise_forward_kernel", Kernel())
    x = torch.empty(2, 70_000 << 10, device="meta")
    t, table = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(9, device="meta")
    with simulate(90), sdkernels.backend("triton"):
        sdkernels.add_noise(x, x, t, table, "epsilon")
    assert grids == [(140_000,)]


@pytest.mark.parametrize("spec", registry.OPS.values(), ids=lambda s: s.name)
def test_torch_compile_sees_one_graph(spec: OpSpec) -> None:
    """fullgraph: a graph break is an error. The results are those without it, gradients included."""
    inputs = spec.inputs(spec.odd[1], torch.float32, DEVICE)
    op = getattr(sdkernels, spec.name)
    wanted = [k for k in spec.gradients if isinstance(inputs.get(k), Tensor)]

    def total(**tensors: Any) -> Tensor:
        out = op(**tensors)
        return sum((o.float().square().sum() for o in (out if isinstance(out, tuple) else (out,))), torch.zeros(()))

    for backend in ("eager", "triton"):
        with sdkernels.backend(backend):
            results: list[list[Tensor]] = []
            for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
                leaves = fresh(inputs, spec.gradients)
                value = function(**leaves)
                grads = torch.autograd.grad(value, [leaves[k] for k in wanted]) if wanted else ()
                results.append([value.detach(), *grads])
        torch._dynamo.reset()
        for plain, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", registry.OPS.values(), ids=lambda s: s.name)
def test_every_op_has_twelve_odd_cases_and_a_definition(spec: OpSpec) -> None:
    assert len(spec.odd) >= 12 and hasattr(reference, spec.name)
    assert len({case.name for case in (*spec.odd, *spec.hot)}) == len(spec.odd) + len(spec.hot)
