"""GroupNorm beyond the registry's cases: both ways through the kernels, any shape and stride, large means, formats."""

import importlib
import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sdkernels
from sdkernels import reference, registry
from sdkernels.agreement import evaluate, exact
from sdkernels.group_norm_plan import is_channels_last
from tests.sdkernels.test_faults import spoilt  # noqa: F401  # pyright: ignore[reportUnusedImport]  # a fixture
from tests.sdkernels.test_kernels import DEVICE, check, poisoned  # noqa: F401  # pyright: ignore[reportUnusedImport]  # a fixture

SPEC = registry.OPS["group_norm"]
group_norm = importlib.import_module("sdkernels.group_norm")  # the name in the package is the function


@contextmanager
def in_parts(tile: int, package: Any = sdkernels) -> Generator[None]:
    """Small inputs go the way of large ones, in tiles of so many elements. 0: the usual way."""
    if not tile:
        yield
        return
    tiles, forced = {"passes": 2, "tile": tile}, package.tuned.forced
    with forced("group_norm_forward", tiles), forced("group_norm_backward", tiles):
        yield


def make(
    shape: tuple[int, ...],
    groups: int,
    layout: str = "last",
    mean: float = 0.0,
    add: int = 0,
    affine: bool = True,
    silu: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments; ``layout``: "last", "first" (contiguous), or "strided", which is neither."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)

    x = draw(*shape, mean=mean)
    if layout == "last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        x = torch.stack([torch.full_like(x, float("nan")), x], dim=-1)[..., 1]

    weight, bias = (draw(shape[1], mean=1.0, std=0.2), draw(shape[1], std=0.2)) if affine else (None, None)
    return {
        "x": x,
        "num_groups": groups,
        "weight": weight,
        "bias": bias,
        "activation": "silu" if silu else None,
        "add": draw(add, shape[1]) if add else None,
    }


PARTS = {
    "last": dict(shape=(2, 12, 5, 7), groups=2, add=2),
    "first": dict(shape=(2, 6, 5, 7), groups=2, add=1, layout="first"),
    "group beyond a block": dict(shape=(1, 70, 3, 3), groups=1, add=1),
    "blocks across groups": dict(shape=(1, 72, 3, 2), groups=3, silu=False),
    "many groups together": dict(shape=(1, 24, 3, 3), groups=8, affine=False),
    "one pixel": dict(shape=(2, 10, 1), groups=2),
    "plain first": dict(shape=(1, 9, 33), groups=1, layout="first", affine=False, silu=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("name", PARTS)
def test_in_parts(name: str, mean: float, dtype: torch.dtype) -> None:
    with in_parts(128):
        check(SPEC, make(**PARTS[name], mean=mean, dtype=dtype), dtype)


@pytest.mark.parametrize("mean", [100.0, 1000.0, -30000.0])
@pytest.mark.parametrize("tile", [0, 256])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_large_means(layout: str, tile: int, mean: float) -> None:
    """E[x^2] - E[x]^2 in float32 would be off by 1e-3, 0.1 and everything."""
    with in_parts(tile):
        check(SPEC, make((1, 8, 9, 11), 2, layout, mean, add=1), torch.float32)


def test_large_means_that_differ_between_channels_and_along_the_pixels() -> None:
    arguments = make((1, 8, 9, 11), 2, add=1)
    arguments["x"] += (
        1000 * torch.arange(8, device=DEVICE)[:, None, None] + 50 * torch.arange(9, device=DEVICE)[:, None]
    )
    for tile in (0, 128):
        with in_parts(tile):
            check(SPEC, arguments, torch.float32)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Arguments of ``make``, and a tile for ``in_parts``."""
    batch, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    channels = groups * draw(st.one_of(st.integers(1, 9), st.sampled_from([40, 70])))
    pixels = draw(st.lists(st.integers(1, 7), max_size=2) | st.lists(st.integers(1, 3), min_size=3, max_size=3))
    assume(batch * channels * math.prod(pixels) > groups)  # PyTorch refuses a single value a group

    call = {
        "shape": (batch, channels, *pixels),
        "groups": groups,
        "layout": draw(st.sampled_from(["last", "first", "strided"])),
        "mean": draw(st.sampled_from([0.0, 10.0])),
        "add": draw(st.sampled_from([0, 1, batch])),
        "affine": draw(st.booleans()),
        "silu": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }
    elements = channels * math.prod(pixels)
    return call, draw(st.sampled_from([0, 1 << (elements // 8).bit_length(), 1 << elements.bit_length()]))


def check_any(call: dict[str, Any], tile: int) -> None:
    """Close to float64: as close as the spread of the smallest group allows, for eager may be exact by luck."""
    arguments = make(**call)
    dy = torch.randn(arguments["x"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with in_parts(tile):
        ours = evaluate("triton", SPEC, arguments, [dy])
    eager = evaluate("eager", SPEC, {**arguments, "x": arguments["x"].contiguous()}, [dy])
    truth = evaluate("eager", SPEC, exact(arguments), [dy])

    # Rounding of the input, as far as the norm of the smallest group enlarges it.
    x = exact(arguments)["x"]
    if call["add"]:
        x = x + exact(arguments)["add"].reshape(-1, x.shape[1], *(1,) * (x.dim() - 2))
    rstd = 1 / (x.reshape(x.shape[0], call["groups"], -1).var(-1, correction=0).min() + 1e-5).sqrt()
    slack = 64 * torch.finfo(torch.float32).eps * (1 + call["mean"]) * max(1, rstd) ** 2

    for mine, theirs, t in zip(ours, eager, truth, strict=True):
        assert mine.shape == t.shape
        error, allowed = (mine - t).abs().max(), 2 * (theirs - t).abs().max() + slack * max(1, t.abs().max())
        assert error <= allowed, f"{error:.3g} over {allowed:.3g}"


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_shape_stride_and_grouping(call: tuple[dict[str, Any], int]) -> None:
    check_any(*call)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, database=None)
@given(calls())
def test_any_shape_stride_and_grouping_at_length(call: tuple[dict[str, Any], int]) -> None:
    check_any(*call)


def run(arguments: dict[str, Any]) -> Tensor:
    with sdkernels.backend("triton"):
        return sdkernels.group_norm(**arguments)


@pytest.mark.parametrize("tile", [0, 128])
def test_the_memory_format_is_kept(tile: int) -> None:
    with in_parts(tile):
        for shape, channels_last in (((2, 6, 3, 5), torch.channels_last), ((1, 6, 2, 3, 2), torch.channels_last_3d)):
            last, first = make(shape, 2), make(shape, 2, "first")
            assert run(last).is_contiguous(memory_format=channels_last) and run(first).is_contiguous()
            torch.testing.assert_close(run(last), run(first), rtol=0, atol=2e-6)
            x = last["x"].detach().requires_grad_()
            (dx,) = torch.autograd.grad(run({**last, "x": x}).square().sum(), x)
            assert dx.is_contiguous(memory_format=channels_last)


def test_the_usual_formats_are_not_copied() -> None:
    for layout in ("last", "first"):
        x = make((2, 6, 3, 5), 2, layout)["x"]
        assert group_norm.arranged(x, is_channels_last(x)) is x or (
            group_norm.arranged(x, is_channels_last(x)).data_ptr() == x.data_ptr()
        )


def test_a_slice_of_the_channels_stays_channels_last() -> None:
    arguments = make((2, 12, 3, 5), 2)
    part = {k: v[:, 4:10] if k == "x" else v[4:10] if isinstance(v, Tensor) else v for k, v in arguments.items()}
    y = run(part)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, reference.group_norm(**part), rtol=0, atol=2e-6)


@pytest.mark.parametrize("upstream", ["first", "last", "expanded"])
def test_the_upstream_gradient_may_have_any_strides(upstream: str) -> None:
    for layout in ("first", "last"):
        arguments = make((2, 6, 3, 5), 2, layout)
        x = arguments["x"].requires_grad_()
        dy = (
            torch.ones((), device=DEVICE).expand(x.shape) if upstream == "expanded" else make(x.shape, 2, upstream)["x"]
        )
        (ours,) = torch.autograd.grad(run(arguments), x, dy)
        (theirs,) = torch.autograd.grad(reference.group_norm(**arguments), x, dy)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("tile", [0, 128])
def test_float32_weights_of_half_precision_input(tile: int) -> None:
    arguments = make((2, 6, 3, 5), 2, dtype=torch.float16, add=1)
    for name in ("weight", "bias"):
        arguments[name] = (arguments[name].float() * 1.0001).requires_grad_()
    dy = make((2, 6, 3, 5), 2, dtype=torch.float16, seed=1)["x"]
    with in_parts(tile):
        y = run(arguments)
        ours = torch.autograd.grad(y, [arguments["weight"], arguments["bias"]], dy)

    truth_of = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    truth = reference.group_norm(**truth_of)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), truth, rtol=1e-3, atol=1e-4)
    theirs = torch.autograd.grad(truth, [arguments["weight"], arguments["bias"]], dy.double())
    for mine, t in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": torch.ones(2, 6, 4, dtype=torch.float64)}, "float64"),
        ({"num_groups": 4}, "6 channels must be whole groups"),
        ({"weight": torch.ones(1)}, r"weight must be \[6\]"),
        ({"add": torch.ones(3, 6)}, r"add must be \[2 or 1, 6\]"),
        ({"add": torch.ones(2, 6).half()}, "of torch.float16"),
        ({"x": torch.ones(0, 6, 4)}, "empty"),
        ({"x": torch.ones(1, 6), "num_groups": 6}, "single value"),
    ],
)
def test_what_the_kernels_do_not_take(changes: dict[str, Any], reason: str) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(sdkernels.UnsupportedError, match=reason):
        run(make((2, 6, 4), 2) | moved)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation"):
        run(make((2, 6, 4), 2) | {"activation": "gelu"})


# tile of in_parts, what is wrong, the line, the line spoilt
FAULTS = [
    (0, "forward: E[x^2] - E[x]^2",
     "tl.sum(y * y) / (pixels * GROUP) - rest * rest + eps",
     "tl.sum(tl.where(inside, (y + mean) * (y + mean), 0.0)) / (pixels * GROUP) - mean * mean + eps"),
    (0, "forward: padding counted", "y = tl.where(inside, x, 0.0)", "y = x"),
    (0, "forward: eps left out", "- rest * rest + eps)", "- rest * rest)"),
    (0, "forward: tail dropped", "inside = (row < pixels)[:, None]", "inside = (row < pixels - 1)[:, None]"),
    (0, "forward and backward: one add for all", "sample * add_stride", "0 * add_stride"),
    (0, "backward: group's mean left out", "dz * weight[None, :] - mean_dz - x", "dz * weight[None, :] - x"),
    (0, "backward: projection left out", " - x * mean_dz_x)", ")"),
    (0, "backward: slope of SiLU", "sigmoid * (1.0 + z * (1.0 - sigmoid))", "sigmoid"),
    (0, "backward: gradient of add", "- pixels * mean_dz - tl.sum(x, axis=0) * mean_dz_x", "- pixels * mean_dz"),
    (128, "statistics: between the rows",
     "channel_m2 = tl.sum(m2 + seen * delta * delta, axis=0)", "channel_m2 = tl.sum(m2, axis=0)"),
    (128, "statistics: between the channels", " + count * delta * delta, axis=1)", ", axis=1)"),
    (128, "statistics: rows weigh alike",
     "(tl.maximum(count - row, 0) + ROWS - 1) // ROWS", "(count + ROWS - 1 + 0 * row) // ROWS"),
    (128, "statistics: Welford's second factor", "m2 += delta * (x - mean)", "m2 += delta * delta"),
    (128, "apply: chunks weigh alike",
     "tl.minimum(tl.maximum(pixels - part * part_chunk, 0), part_chunk)", "(part_chunk + 0 * part)"),
    (128, "apply: between the chunks", "m2s / GROUP + size * delta * delta", "m2s / GROUP"),
    (128, "apply: the block's first group alone",
     "group, part = first // GROUP + tl.arange(0, GROUPS)", "group, part = first // GROUP + 0 * tl.arange(0, GROUPS)"),
    (128, "apply: tail dropped", "min(begin + chunk, pixels), ROWS):", "min(begin + chunk, pixels) - 1, ROWS):"),
    (128, "sums: padding counted",
     "x = tl.where(inside, (x - mean[None, :] + before[None, :]) * rstd[None, :], 0.0)",
     "x = (x - mean[None, :] + before[None, :]) * rstd[None, :]"),
    (128, "combine: chunks missed", "for done in range(0, chunks, ROWS):", "for done in range(0, chunks - 1, ROWS):"),
    (128, "combine: group's mean", "mean_dz = tl.sum(weight * total_dz)", "mean_dz = tl.sum(total_dz)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoilt", "tile"),
    [pytest.param(("group_norm", *fault), tile, id=fault[0]) for tile, *fault in FAULTS],
    indirect=["spoilt"],
)
def test_a_planted_fault_is_seen(spoilt: Any, tile: int) -> None:  # noqa: F811
    with pytest.raises(AssertionError), in_parts(tile, spoilt):
        for case in (
            make((2, 6, 3, 3), 2, add=2),
            make((1, 6, 3, 3), 2, mean=1000.0),
            make((1, 80, 7), 2, silu=False),
            make((1, 6, 3, 11), 1, affine=False, add=1),
            make((1, 4, 2), 2, mean=1000.0, affine=False, silu=False),
        ):
            check(SPEC, case, torch.float32, spoilt)
