"""GroupNorm of a sum beyond the registry's cases: both ways through the kernels, what comes later, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

import sdkernels
from sdkernels import reference, registry
from tests.sdkernels.test_faults import spoilt  # noqa: F401  # pyright: ignore[reportUnusedImport]  # a fixture
from tests.sdkernels.test_group_norm import in_parts
from tests.sdkernels.test_kernels import DEVICE, check, poisoned  # noqa: F401  # pyright: ignore[reportUnusedImport]  # a fixture

SPEC = registry.OPS["group_norm_of_sum"]
CASES = {case.name: case for case in SPEC.odd}


def inputs(name: str, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> dict[str, Any]:
    return SPEC.inputs(CASES[name], dtype, DEVICE, mean=mean)


def run(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with sdkernels.backend("triton"):
        return sdkernels.group_norm_of_sum(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["odd", "nchw", "across", "skip", "c96", "pixel", "line", "block"])
def test_in_two_passes(name: str, dtype: torch.dtype) -> None:
    for mean in (0.0, 100.0):
        with in_parts(128):
            check(SPEC, inputs(name, dtype, mean), dtype)


@pytest.mark.parametrize("tile", [0, 128])
@pytest.mark.parametrize("name", ["across", "flat"])
@torch.no_grad()
def test_what_is_added_later_is_stored_and_not_normed(name: str, tile: int) -> None:
    """Where no gradient is wanted the kernels do it, else an addition behind them."""
    arguments = inputs(name)
    with in_parts(tile):
        y, total = run(arguments)
        plain, before = run(arguments | {"later": None})

    expected = reference.group_norm_of_sum(**arguments)
    torch.testing.assert_close((y, total), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    assert (total - before).abs().max() > 0.5


def test_a_sum_of_nothing_is_x_itself() -> None:
    arguments = inputs("odd") | {"residual": None, "shift": None}
    y, total = run(arguments)
    assert total is arguments["x"]
    norm = {name: arguments[name] for name in ("x", "num_groups", "weight", "bias", "activation")}
    with sdkernels.backend("triton"):
        assert torch.equal(y, sdkernels.group_norm(**norm))


@pytest.mark.parametrize("tile", [0, 128])
def test_formats_that_differ_become_that_of_x(tile: int) -> None:
    arguments = inputs("across")
    mixed = arguments | {name: arguments[name].contiguous() for name in ("residual", "skip")}
    with in_parts(tile):
        results, expected = run(mixed), run(arguments)
    for result, same in zip(results, expected, strict=True):
        assert torch.equal(result, same) and result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"residual": torch.ones(2, 6, 5, 6)}, r"residual must be \(2, 6, 5, 7\)"),
        ({"residual": torch.ones(2, 6, 5, 7).half()}, "must have x's dtype"),
        ({"skip": torch.ones(1, 2, 5, 7)}, r"skip must be \(2, 6, 5, 7\) but for its channels"),
        ({"shift": torch.ones(5)}, r"shift must be \[6\]"),
        ({"skip": torch.ones(2, 2, 5, 7)}, r"weight must be \[8\]"),
        ({"num_groups": 4}, "6 channels must be whole groups"),
    ],
)
def test_what_the_kernels_do_not_take(changes: dict[str, Any], reason: str) -> None:
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in changes.items()}
    with pytest.raises(sdkernels.UnsupportedError, match=reason):
        run(inputs("odd") | moved)


# what is wrong in the way of two passes, the line, the line spoilt
FAULTS = [
    ("statistics: the first sample for all", "tl.cast(sample, tl.int64) * pixels * split",
     "tl.cast(sample, tl.int64) * 0 * split"),
    ("statistics: sum not stored", "x = total.to(tl.float32) - later[None, :]\n        x -= pivot",
     "tl.store(total_ptr + start + offset, total * 0, mask=inside)\n"
     "            x = total.to(tl.float32) - later[None, :]\n        x -= pivot"),
    ("apply: the gradient of the sum", "if dtotal_ptr is not None:\n            dx +=",
     "if dtotal_ptr is not None:\n            dx += 0 *"),
]  # fmt: skip


@pytest.mark.parametrize(
    "spoilt",
    [pytest.param(("group_norm_of_sum", *fault), id=fault[0]) for fault in FAULTS],
    indirect=True,
)
def test_a_planted_fault_is_seen(spoilt: Any) -> None:  # noqa: F811
    with pytest.raises(AssertionError), in_parts(128, spoilt):
        for name in ("odd", "skip"):
            check(SPEC, inputs(name), torch.float32, spoilt)
