"""Which inputs the fused block takes and what runs instead, and the architectures that have tiles of their own."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sdkernels
from sdkernels import reference
from sdkernels.backend import Device
from sdkernels.op_spec import Case, Inputs
from sdkernels.registry import OPS
from tests.sdkernels.test_kernels import DEVICE, check

SPEC = OPS["cross_attention_block"]
BLOCK: Any = sys.modules["sdkernels.cross_attention_block"]
SIZES = {"batch": 2, "queries": 5, "channels": 24, "keys": 20, "heads": 2, "width": 24}


def inputs(dtype: torch.dtype = torch.float32, **sizes: Any) -> Inputs:
    return SPEC.inputs(Case("small", SIZES | sizes), dtype, DEVICE)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of x for which the kernel ran."""
    shapes: list[tuple[int, ...]] = []
    launch = BLOCK.cross_attention_block_forward

    def note(x: Tensor, *others: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return launch(x, *others)

    monkeypatch.setattr(BLOCK, "cross_attention_block_forward", note)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_architectures_whose_heads_are_split(
    monkeypatch: pytest.MonkeyPatch, launched: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(BLOCK, "device_of", lambda x: Device(80, 108))
    check(SPEC, inputs(dtype, queries=35), dtype)
    assert launched == [(2, 35, 24)]


OTHERS: dict[str, Inputs] = {
    "channels": inputs(channels=129),
    "head": inputs(width=65, heads=1),
    "keys": inputs(keys=129),
    "scale": inputs(scale=-0.5) | {"k": -inputs()["k"]},
    "one sample of keys": inputs() | {"k": inputs()["k"][:1], "v": inputs()["v"][:1]},
}


@pytest.mark.parametrize("name", ["channels", "head", "keys"])
def test_what_the_kernel_does_not_take_is_composed_of_kernels(launched: list[tuple[int, ...]], name: str) -> None:
    given = OTHERS[name]
    with sdkernels.backend("triton"):
        ours = sdkernels.cross_attention_block(**given)
    assert not launched
    torch.testing.assert_close(ours, reference.cross_attention_block(**given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["scale", "one sample of keys"])
def test_what_no_kernel_takes_is_refused(name: str) -> None:
    with sdkernels.backend("triton"), pytest.raises(sdkernels.UnsupportedError, match="cross_attention: "):
        sdkernels.cross_attention_block(**OTHERS[name])


def test_autocast_composes(launched: list[tuple[int, ...]]) -> None:
    given = inputs()
    half = {name: given[name].half() for name in "kv"}
    with sdkernels.backend("triton"), torch.autocast(DEVICE, torch.float16):
        ours = sdkernels.cross_attention_block(**given | half)
    assert ours.dtype == torch.float16 and not launched
    torch.testing.assert_close(ours.float(), reference.cross_attention_block(**given), rtol=1e-2, atol=1e-2)


def test_gradients_only_where_wanted() -> None:
    given = inputs()
    x = given["x"].requires_grad_()
    with sdkernels.backend("triton"):
        y = sdkernels.cross_attention_block(**given)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(reference.cross_attention_block(**given).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_auto_takes_the_kernel_where_the_table_names_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(batch: int, **changed: Tensor) -> bool:
        x, k, w = torch.empty(batch, 5, 48), torch.empty(batch, 20, 2, 24), torch.empty(48, 48)
        arguments = {"x": x, "to_q": w, "k": k, "v": k, "to_out": w, "bias": None} | changed
        return BLOCK._is_faster(**arguments)

    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert BLOCK.FASTER["measured"] == {} and not faster(2)
    monkeypatch.setattr(BLOCK, "FASTER", {"measured": {"90": {"48 2x24 20": [10, 20]}}})
    monkeypatch.setattr(BLOCK, "device_of", lambda x: Device(90, 132))
    assert [faster(batch) for batch in (1, 2, 4, 5)] == [False, True, True, False]
    assert not faster(2, k=torch.empty(2, 21, 2, 24))
    needs_gradient = torch.empty(48, 48, requires_grad=True)
    assert not faster(2, to_q=needs_gradient)
    with torch.no_grad():
        assert faster(2, to_q=needs_gradient)
    monkeypatch.setattr(BLOCK, "device_of", lambda x: Device(80, 108))
    assert not faster(2)


def test_auto_on_a_cpu_composes_the_definitions(launched: list[tuple[int, ...]]) -> None:
    given = {name: x.cpu() for name, x in inputs().items()}
    with sdkernels.backend("auto"):
        ours = sdkernels.cross_attention_block(**given)
    q = F.linear(given["x"], given["to_q"]).unflatten(-1, (2, 24))
    out = reference.cross_attention(q, given["k"], given["v"]).flatten(2)
    assert torch.equal(ours, F.linear(out, given["to_out"], given["bias"])) and not launched
