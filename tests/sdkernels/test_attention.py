"""Attention beyond the registry's cases: layouts, large scores, probabilities, programs that take several blocks."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sdkernels
from sdkernels import UnsupportedError, head_tiles, reference
from sdkernels.backend import Device, simulate
from sdkernels.op_spec import Case
from sdkernels.registry import OPS
from tests.sdkernels.test_kernels import DEVICE, check

SELF, CROSS = sys.modules["sdkernels.self_attention"], sys.modules["sdkernels.cross_attention"]
BACKWARD = sys.modules["sdkernels.attention_backward"]
LAYOUTS = ("contiguous", "heads first", "tokens first", "part of a row", "gaps", "one sample for all")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x [B, N, H, D] in another memory layout ("one sample for all" repeats the first)."""
    b, n, h, d = x.shape
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    # Views into a larger tensor of NaN.
    if layout == "part of a row":
        row = torch.full((b, n, 3 * h * d + 1), float("nan")).to(x)
        row[..., h * d : 2 * h * d] = x.flatten(2)
        return row[..., h * d : 2 * h * d].unflatten(-1, (h, d))
    if layout == "gaps":
        room = torch.full((b, n, h, 2 * d + 1), float("nan")).to(x)
        room[..., 1::2] = x
        return room[..., 1::2]

    return x[:1].expand(b, n, h, d) if layout == "one sample for all" else x.contiguous()


def agrees(op: str, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, **options: Any) -> None:
    """Outputs and gradients of the kernel are those of the definition in float64."""
    results: list[list[Tensor]] = []
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]  # a cast to its own dtype keeps the layout
        with sdkernels.backend(backend):
            out = getattr(sdkernels, op)(*leaves, **options)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outs[0], leaves, upstream.to(dtype))
        results.append([o.detach() for o in outs] + list(grads))
    for ours, truth in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


shapes = st.fixed_dictionaries(
    {
        "b": st.integers(1, 2),
        "n": st.integers(1, 36),
        "m": st.integers(1, 90),
        "h": st.integers(1, 3),
        "d": st.integers(1, 90),
        "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
        "scale": st.sampled_from([None, 0.1, 0.7]),
        "probabilities": st.booleans(),
    }
)


def any_cross_attention(size: dict[str, Any]) -> None:
    b, n, m, h, d = (size[name] for name in "bnmhd")
    generator = torch.Generator().manual_seed(n * m + d)
    tensors = [torch.randn(b, rows, h, d, generator=generator).to(DEVICE) for rows in (n, m, m, n)]
    q, k, v, upstream = (lay_out(x, layout) for x, layout in zip(tensors, size["layouts"], strict=True))
    agrees("cross_attention", q, k, v, upstream, scale=size["scale"], probabilities=size["probabilities"])


@given(shapes)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_cross_attention_of_some_shapes_and_strides(size: dict[str, Any]) -> None:
    any_cross_attention(size)


@pytest.mark.slow
@given(shapes)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_cross_attention_of_any_shapes_and_strides(size: dict[str, Any]) -> None:
    any_cross_attention(size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["self_attention", "cross_attention"])
def test_layouts(op: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 19, 2, 24, generator=generator).to(DEVICE) for _ in range(4)]
    agrees(op, *(lay_out(x, layout) for x in tensors))


def test_the_layouts_of_a_network_take_no_copy() -> None:
    x = torch.randn(2, 5, 3 * 2 * 40)
    fused = [part.unflatten(-1, (2, 40)) for part in x.chunk(3, dim=-1)]
    assert all(head_tiles.strided(view) is view for view in (*fused, lay_out(x[..., None, :], "heads first")))
    assert head_tiles.head_constants(*fused)["ALIGN"] == 8
    assert head_tiles.head_constants(torch.ones(1, 2, 3, 7))["ALIGN"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["self_attention", "cross_attention"])
def test_large_scores_neither_overflow_nor_lose_their_row(op: str, dtype: torch.dtype) -> None:
    """Scores of some 1e4, where exp overflows without the maximum; and rows whose scores are all far below zero."""
    rows = {"tokens": 37} if op == "self_attention" else {"queries": 19, "keys": 37}
    inputs = OPS[op].inputs(Case("large", {"batch": 1, "heads": 1, "width": 40, **rows}), dtype, DEVICE)
    check(OPS[op], inputs | {"q": 50 * inputs["q"], "k": 50 * inputs["k"]}, dtype)
    low = {"q": inputs["q"].abs() + 1, "k": -50 - inputs["k"]}
    check(OPS[op], inputs | low, dtype)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("keys", [20, 77])
def test_a_program_takes_several_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, keys: int, capability: int) -> None:
    """On a GPU of one multiprocessor each head is one program, or a few of many blocks."""
    for module in (SELF, BACKWARD, CROSS, head_tiles):
        monkeypatch.setattr(module, "device_of", lambda x: Device(capability, 1))
    q, k, v, upstream = (torch.randn(1, rows, 1, 24, device=DEVICE) for rows in (101, keys, keys, 101))
    assert CROSS._work(q, CROSS._backward_tiles(*head_tiles.choice_sizes(q, k)))[0] > 32
    agrees("cross_attention", q, k, v, upstream)
    agrees("self_attention", q, k, v, upstream)


@pytest.mark.parametrize("op", ["self_attention", "cross_attention"])
def test_the_log_sum_exp_is_written_for_a_backward_pass_alone(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    q, k, v = (torch.randn(1, 19, 2, 24, device=DEVICE, requires_grad=True) for _ in "qkv")
    with sdkernels.backend("triton"), torch.no_grad():
        compiled = torch.compile(getattr(sdkernels, op), fullgraph=True, backend="aot_eager")(q, k, v)
    torch._dynamo.reset()

    module, sizes = {"self_attention": SELF, "cross_attention": CROSS}[op], []
    launch = getattr(module, f"{op}_forward")

    def note(*arguments: Any) -> tuple[Tensor, Tensor]:
        o, lse = launch(*arguments)
        sizes.append(tuple(lse.shape))
        return o, lse

    monkeypatch.setattr(module, f"{op}_forward", note)
    with sdkernels.backend("triton"):
        out = getattr(sdkernels, op)(q, k, v)
        with torch.no_grad():
            alone = getattr(sdkernels, op)(q, k, v)
    assert sizes == [(1, 2, 19), (0,)]
    assert torch.equal(out, alone) and torch.equal(out, compiled)


def test_probabilities() -> None:
    q, k, v = (torch.randn(2, rows, 3, 24, device=DEVICE, requires_grad=True) for rows in (21, 77, 77))
    with sdkernels.backend("triton"):
        out, probs = sdkernels.cross_attention(q, k, v, probabilities=True)
        alone = sdkernels.cross_attention(q, k, v)
    expected, mean = reference.cross_attention(q, k, v, probabilities=True)
    assert out.requires_grad and not probs.requires_grad and not mean.requires_grad and torch.equal(out, alone)
    assert probs.dtype == torch.float32 and probs.shape == (2, 21, 77)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probs, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 21, device=DEVICE))


@pytest.mark.parametrize(
    ("op", "q", "k", "options", "reason"),
    [
        ("self_attention", (1, 4, 1, 257), (1, 4, 1, 257), {}, "head dims up to 256"),
        ("cross_attention", (1, 4, 1, 257), (1, 4, 1, 257), {}, "head dims up to 256"),
        ("cross_attention", (1, 4, 1, 8), (1, 257, 1, 8), {}, "up to 256 keys, found 257"),
        ("self_attention", (1, 4, 2, 8), (1, 4, 1, 8), {}, r"k and v \[B, M, H, D\]"),
        ("cross_attention", (4, 2, 8), (4, 2, 8), {}, r"q must be \[B, N, H, D\]"),
        ("self_attention", (1, 4, 1, 8), (1, 4, 1, 8), {"scale": -1.0}, "a positive scale, found -1.0"),
    ],
)
def test_what_the_kernels_do_not_take(op: str, q: Any, k: Any, options: dict[str, float], reason: str) -> None:
    x, y = torch.randn(q, device=DEVICE), torch.randn(k, device=DEVICE)
    with sdkernels.backend("triton"), pytest.raises(UnsupportedError, match=reason):
        getattr(sdkernels, op)(x, y, y, **options)


def test_one_dtype_for_all() -> None:
    q, k = torch.randn(1, 4, 1, 8, device=DEVICE), torch.randn(1, 4, 1, 8, device=DEVICE).half()
    with sdkernels.backend("triton"), pytest.raises(UnsupportedError, match="one dtype"):
        sdkernels.self_attention(q, k, k)


def test_where_auto_takes_pytorchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a measurement by head dim; what was measured for the architecture and length comes first."""
    choice = {width: SELF._prefers_sdpa(torch.empty(1, 9, 1, width), 9) for width in (40, 64, 80, 128, 160)}
    assert choice == {40: False, 64: True, 80: False, 128: True, 160: False}
    with simulate(75):
        assert SELF._prefers_sdpa(torch.empty(1, 9, 1, 40), 9)  # no tensor cores in Triton before sm_80
    measured = {"90": {"40": {"1024": "sdpa"}, "64": {"longest": "kernel"}}}
    monkeypatch.setattr(SELF, "FASTER", SELF.FASTER | {"measured": measured})
    lengths = (256, 257, 1024, 1025, 4097)
    assert [SELF._prefers_sdpa(torch.empty(1, 1, 1, 40), m) for m in lengths] == [False, True, True, False, False]
    assert [SELF._prefers_sdpa(torch.empty(1, 1, 1, 64), m) for m in lengths] == [True, True, True, True, False]
