"""The definitions of the ops against their formulas written out, in float64, and against PyTorch's own gradients."""

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdkernels import reference
from tests.conftest import draw, relative_error

CLOSE = 1e-12


def written_out_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    return normed * weight.reshape(per_channel) + bias.reshape(per_channel)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale).exp()
    return torch.einsum("bhnm,bmhd->bnhd", scores / scores.sum(-1, keepdim=True), v)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 12, 5, 7), 1), ((2, 12, 5, 7), 3), ((2, 12, 5, 7), 12), ((1, 12, 1, 1), 3), ((3, 12, 11), 12), ((2, 12), 6)],
)
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.3])
def test_group_norm(shape: tuple[int, ...], groups: int, eps: float):
    x, weight, bias = 5 + 0.01 * draw("x", shape), draw("weight", (12,)), draw("bias", (12,))
    expected = written_out_group_norm(x, groups, weight, bias, eps)
    assert relative_error(reference.group_norm(x, groups, weight, bias, eps), expected) < CLOSE


@pytest.mark.parametrize("rows", [1, 2])
def test_group_norm_adds_before_and_activates_after(rows: int):
    x, weight, bias, add = draw("x", (2, 8, 3, 5)), draw("weight", (8,)), draw("bias", (8,)), draw("add", (rows, 8))
    y = written_out_group_norm(x + add[:, :, None, None], 4, weight, bias, 1e-5)
    assert relative_error(reference.group_norm(x, 4, weight, bias, add=add), y) < CLOSE
    actual = reference.group_norm(x, 4, weight, bias, activation="silu", add=add)
    assert relative_error(actual, y / (1 + (-y).exp())) < CLOSE


def test_group_norm_without_weight_and_bias():
    x = draw("x", (2, 8, 3, 5))
    expected = written_out_group_norm(x, 4, torch.ones(8), torch.zeros(8), 1e-5)
    assert relative_error(reference.group_norm(x, 4, None, None), expected) < CLOSE


def test_group_norm_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match=r"activation .* 'gelu'"):
        reference.group_norm(draw("x", (1, 4, 2, 2)), 2, None, None, activation="gelu")


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("with_add", [False, True])
def test_group_norm_of_channels_last_is_as_accurate_as_of_contiguous(mean: float, with_add: bool):
    x = (mean + draw("x", (2, 32, 24, 20))).float()
    add = draw("add", (2, 32)).float() if with_add else None
    expected = reference.group_norm(x.double(), 4, None, None, add=None if add is None else add.double())

    def error(x: Tensor) -> float:
        return float((reference.group_norm(x, 4, None, None, add=add) - expected).abs().max())

    last = x.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert error(last) <= 2 * error(x) + torch.finfo(torch.float32).eps


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 3.0, 9.0, 40.0, 300.0, 10_000.0])
def test_group_norm_of_half_precision_loses_nothing_to_its_layout(mean: float, dtype: torch.dtype):
    """PyTorch's kernel for channels-last does from a mean of some 100 deviations on; it is used below that."""
    x, weight, bias = draw("x", (2, 64, 33, 31)) + mean, draw("weight", (64,)), draw("bias", (64,))
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    expected = reference.group_norm(x.double(), 8, weight.double(), bias.double())
    first, last = (
        reference.group_norm(x.to(memory_format=layout), 8, weight, bias)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(last.double(), expected) < 1.1 * relative_error(first.double(), expected) + 1e-5


def test_group_norm_keeps_the_memory_format():
    x = draw("x", (2, 8, 3, 5))
    last = x.to(memory_format=torch.channels_last)
    for activation in (None, "silu"):
        y = reference.group_norm(last, 4, None, None, activation=activation, add=draw("add", (2, 8)))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert reference.group_norm(x, 4, None, None, activation=activation).is_contiguous()


def test_group_norm_of_a_strided_view():
    x = draw("x", (2, 8, 6, 10))
    view = x[:, :, ::2, 1::3]
    assert torch.equal(reference.group_norm(view, 4, None, None), reference.group_norm(view.clone(), 4, None, None))


@pytest.mark.parametrize("op", [reference.self_attention, reference.cross_attention])
@pytest.mark.parametrize(("heads", "width"), [(1, 40), (3, 5)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(op: Callable[..., Tensor], heads: int, width: int, scale: float | None):
    keys = 6 if op is reference.self_attention else 77
    q, k, v = (draw(name, (2, n, heads, width)) for name, n in (("q", 6), ("k", keys), ("v", keys)))
    actual = op(q, k, v, scale)
    assert relative_error(actual, written_out_attention(q, k, v, width**-0.5 if scale is None else scale)) < CLOSE


def test_attention_of_large_scores_is_finite():
    q, k, v = (draw(name, (1, 4, 2, 8)) for name in "qkv")
    actual = reference.self_attention(1e3 * q, 1e3 * k, v)
    winner = torch.einsum("bnhd,bmhd->bhnm", q, k).argmax(-1).transpose(1, 2)  # [B, N, H]
    expected = v.gather(1, winner[..., None].expand(-1, -1, -1, 8))
    assert relative_error(actual, expected) < 1e-6


def test_geglu_is_the_exact_gelu_of_the_second_half():
    x = 2 * draw("x", (2, 5, 14))
    value, gate = x[..., :7], x[..., 7:]
    expected = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    assert relative_error(reference.geglu(x), expected) < CLOSE
    assert relative_error(value * F.gelu(gate, approximate="tanh"), expected) > 1e-5


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_norm(eps: float):
    x, weight, bias = 3 + 0.01 * draw("x", (2, 5, 9)), draw("weight", (9,)), draw("bias", (9,))
    residual = draw("residual", (2, 5, 9))

    def written_out(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    assert relative_error(reference.layer_norm(x, weight, bias, eps), written_out(x)) < CLOSE
    normed, total = reference.layer_norm(x, weight, bias, eps, residual)
    assert relative_error(normed, written_out(x + residual)) < CLOSE
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("scale", [0.0, -1.5, torch.tensor(0.7, dtype=torch.float64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lora_linear_is_the_merged_layer(scale: float | Tensor, with_bias: bool):
    x, weight, a, b = draw("x", (2, 3, 6)), draw("weight", (5, 6)), draw("a", (2, 6)), draw("b", (5, 2))
    bias = draw("bias", (5,)) if with_bias else None
    expected = x @ (weight + scale * b @ a).T + (0 if bias is None else bias)
    assert relative_error(reference.lora_linear(x, weight, bias, a, b, scale), expected) < CLOSE


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 7)])
def test_add_noise(shape: tuple[int, ...]):
    x0, noise, t = draw("x0", shape), draw("noise", shape), torch.tensor([0, 3, 9, 3])
    acp = torch.linspace(0.999, 0.0, 10, dtype=torch.float64)
    rows = acp[t].reshape(-1, *(1,) * (len(shape) - 1))
    expected = rows.sqrt() * x0 + (1 - rows).sqrt() * noise
    targets = {"epsilon": noise, "v_prediction": rows.sqrt() * noise - (1 - rows).sqrt() * x0, "sample": x0}
    for prediction_type, target in targets.items():
        actual = reference.add_noise(x0, noise, t, acp, prediction_type)
        assert relative_error(actual[0], expected) < CLOSE
        assert relative_error(actual[1], target) < CLOSE


def test_add_noise_takes_its_roots_in_the_tables_precision():
    x0, noise, acp = torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1 - 1e-9], dtype=torch.float64)
    x_t, target = reference.add_noise(x0, noise, torch.tensor([0]), acp, "v_prediction")
    assert (x_t.dtype, target.dtype) == (torch.float32, torch.float32)
    assert relative_error(1 - target, torch.full((1, 2), math.sqrt(1e-9))) < 2e-3  # 0 if acp were float32


def test_add_noise_refuses_an_unknown_prediction_type():
    with pytest.raises(ValueError, match=r"prediction_type .*'x0'"):
        reference.add_noise(draw("x", (1, 2)), draw("n", (1, 2)), torch.tensor([0]), torch.ones(1), "x0")


@pytest.mark.parametrize("given", ["both", "cond", "uncond"])
@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("step", [2, torch.tensor(2)])
def test_sampler_step(given: str, with_noise: bool, step: int | Tensor):
    registers, coefficients = draw("registers", (3, 2, 4, 5, 6)), draw("coefficients", (4, 3, 5))
    uncond = None if given == "cond" else draw("uncond", (2, 4, 5, 6))
    cond = None if given == "uncond" else draw("cond", (2, 4, 5, 6))
    noise = draw("noise", (2, 4, 5, 6)) if with_noise else None
    actual = reference.sampler_step(registers, uncond, cond, noise, coefficients, step, guidance_scale=7.5)
    predictions = {"both": lambda u, c: u + 7.5 * (c - u), "cond": lambda u, c: c, "uncond": lambda u, c: u}
    row, prediction = coefficients[2], predictions[given](uncond, cond)
    for i in range(3):
        expected = sum(row[i, j] * registers[j] for j in range(3)) + row[i, 3] * prediction
        assert relative_error(actual[i], expected + (0 if noise is None else row[i, 4] * noise)) < CLOSE


def test_sampler_step_computes_in_the_registers_precision():
    registers, half = draw("registers", (1, 1, 3)), draw("cond", (1, 3)).half()
    coefficients = torch.tensor([[[1.0, 1e-6, 0.0]]], dtype=torch.float64)
    actual = reference.sampler_step(registers, None, half, None, coefficients, 0)
    assert actual.dtype == torch.float64
    assert relative_error(actual[0], registers[0] + 1e-6 * half.double()) < CLOSE


def test_sampler_step_needs_a_prediction():
    with pytest.raises(ValueError, match="prediction"):
        reference.sampler_step(draw("r", (1, 1, 2)), None, None, None, draw("c", (1, 1, 3)), 0)


GRADIENTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "group_norm": (
        lambda x, w, b, a: reference.group_norm(x, 2, w, b, activation="silu", add=a),
        ((2, 4, 2, 3), (4,), (4,), (2, 4)),
    ),
    "self_attention": (reference.self_attention, ((1, 3, 2, 4),) * 3),
    "cross_attention": (reference.cross_attention, ((1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4))),
    "geglu": (reference.geglu, ((2, 6),)),
    "layer_norm": (reference.layer_norm, ((2, 5), (5,), (5,))),
    "lora_linear": (
        lambda x, w, bias, a, b: reference.lora_linear(x, w, bias, a, b, 0.5),
        ((2, 4), (3, 4), (3,), (2, 4), (3, 2)),
    ),
}


@pytest.mark.parametrize("op", GRADIENTS)
def test_every_differentiable_input_has_its_gradient(op: str):
    function, shapes = GRADIENTS[op]
    arguments = [draw(f"{op} {i}", shape).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, arguments)


def test_the_definitions_import_no_triton():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names and not any("triton" in name for name in names)
