"""The tests of the kernels can fail: each planted fault is seen by the cases of its op.

The package's folder is copied, one line of an op's files is spoilt, and the copy is loaded under another name. No fault
reaches outside of a tensor: in the interpreter that ends the process.
"""

import importlib.util
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sdkernels
from sdkernels.registry import OPS
from tests.sdkernels.test_kernels import DEVICE, check

# the files in which an op's lines are looked for; OP.py where it is not named
FILES = {
    "group_norm": ("group_norm.py", "group_norm_forward_kernels.py", "group_norm_backward_kernels.py"),
    "group_norm_of_sum": ("group_norm.py", "group_norm_forward_kernels.py", "group_norm_backward_kernels.py"),
    "self_attention": ("self_attention.py", "attention_backward.py", "head_tiles.py"),
    "cross_attention": ("cross_attention_kernels.py",),
}

# op, what is wrong, the line, the line spoilt
FAULTS = [
    ("geglu", "tail dropped", "inside = column < width", "inside = column < width - 1"),
    ("geglu", "the wrong half gates", "value * gelu(gate,", "gate * gelu(value,"),
    ("geglu", "tanh's gelu", "tl.maximum(g, 0.0) - tl.abs(g) * tail", "g * tl.sigmoid(1.702 * g)"),
    ("geglu", "a coefficient in half precision", "0.7107068705", "0.7"),
    ("geglu", "slope without the density", "cdf + 0.3989422804014327 * gate * bell", "cdf"),
    ("layer_norm", "E[x^2] - E[x]^2", "tl.sum(centred * centred, axis=1) / width + eps", "tl.sum(x * x, axis=1) / width - mean * mean + eps"),
    ("layer_norm", "padding counted", "x = tl.where(inside, x - mean[:, None], 0.0)", "x = x - mean[:, None]"),
    ("layer_norm", "residual's gradient forgotten", "dx += tl.load(", "dx += 0 * tl.load("),
    ("layer_norm", "a projection left out", " - normed * along_x[:, None]", ""),
    ("layer_norm", "rows of the last tile", "for first in range(tl.program_id(0) * ROWS, rows,", "for first in range(tl.program_id(0) * ROWS, rows - 1,"),
    ("group_norm_of_sum", "shift forgotten", "total += tl.load(shift_ptr", "total += 0 * tl.load(shift_ptr"),
    ("group_norm_of_sum", "skip one channel on", "column_there = channels - split, column - split", "column_there = channels - split, tl.maximum(column - split - 1, 0)"),
    ("group_norm_of_sum", "gradient of the sum forgotten", "dx += tl.load(dtotal_ptr", "dx += 0 * tl.load(dtotal_ptr"),
    ("group_norm_of_sum", "gradient of the shift not summed", "first.sum(pixels, dtype=torch.float32)", "first.mean(pixels, dtype=torch.float32)"),
    ("linear_geglu", "gates of the values' rows", "gates = tl.cast(out, tl.int64) * width", "gates = tl.cast(0 * out, tl.int64) * width"),
    ("linear_geglu", "last channels of x", "for start in range(0, width, BK):", "for start in range(0, width - 1, BK):"),
    ("linear_geglu", "bias of the gates", "bias_ptr + out + column", "bias_ptr + column"),
    ("linear_geglu", "blocks beyond the band", "tall = min(down - band * BANDS, BANDS)", "tall = BANDS"),
    ("lora_linear", "x A^T kept of other rows", "low_ptr + m[:, None] * rank", "low_ptr + (m * 0)[:, None] * rank"),
    ("lora_linear", "scale left out", "full += scale * tl.dot(", "full += tl.dot("),
    ("lora_linear", "last columns of x", "for first in range(0, K, BK):", "for first in range(0, K - 1, BK):"),
    ("lora_linear", "rank padded with what lies there", "inside = (column < K)[:, None] & (r < rank)[None, :]", "inside = (column < K)[:, None] & (r < rank - 1)[None, :]"),
    ("lora_linear", "gradient of A without the scale", "_scaled_product(dlow.t(), x, scale_tensor, ctx.scale, a.dtype)", "(dlow.t() @ x)"),
    ("lora_linear", "gradient of B without the scale", "_scaled_product(dy.t(), low, scale_tensor, ctx.scale, b.dtype)", "(dy.t() @ low)"),
    ("lora_linear", "no sums for the weight", "dweight = dy.t() @ x if want_weight", "dweight = 0 * (dy.t() @ x) if want_weight"),
    ("group_norm", "E[x^2] - E[x]^2", "tl.sum(y * y) / (pixels * GROUP) - rest * rest + eps", "tl.sum(tl.where(inside, (y + mean) * (y + mean), 0.0)) / (pixels * GROUP) - mean * mean + eps"),
    ("group_norm", "means of chunks not merged", "m2s / GROUP + size * delta * delta", "m2s / GROUP + 0 * size * delta * delta"),
    ("group_norm", "shift forgotten backward", "x += tl.load(shift_ptr", "x += 0 * tl.load(shift_ptr"),
    ("group_norm", "gradient of the shift of one sample", "else dadd.sum(0)).to(shift.dtype)", "else dadd[0]).to(shift.dtype)"),
    ("group_norm", "a projection left out", " - x * mean_dz_x)", ")"),
    ("group_norm", "a projection left out of two passes", " - x * mean_dz_x[None, :])", ")"),
    ("self_attention", "sums not rescaled", "total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    ("self_attention", "sums by product not rescaled", "ones, total * shrink[:, None])", "ones, total)"),
    ("self_attention", "keys beyond the last", 'scores = tl.where((key < M - first)[None, :], scores, float("-inf"))', "scores = scores"),
    ("self_attention", "keys' gradient without delta", "- delta[None, :])", ")"),
    ("self_attention", "a head's second part", "product = tl.dot(a2, tl.trans(b2), product,", "product += 0 * tl.dot(a2, tl.trans(b2), product,"),
    ("cross_attention", "a key missed", "p2 = masked_scores(q1, q2, k3, k4, M - M1,", "p2 = masked_scores(q1, q2, k3, k4, M - M1 - 1,"),
    ("cross_attention", "gradient without delta", "ds = (p * (dp - delta[:, None])).to", "ds = (p * dp).to"),
    ("cross_attention", "scale of the queries' gradient", "dq1 * scale, dq2 * scale", "dq1, dq2"),
    ("cross_attention_block", "a key missed", "p2 = masked_scores(q1, q2, k1, k2, M - M1,", "p2 = masked_scores(q1, q2, k1, k2, M - M1 - 1,"),
    ("cross_attention_block", "scores not scaled", "p1 = tl.exp2(p1 * scale - top[:, None])", "p1 = tl.exp2(p1 - top[:, None])"),
    ("cross_attention_block", "last channels of x", "for first in range(0, C, BC):", "for first in range(0, C - 1, BC):"),
    ("cross_attention_block", "keys of the first sample for all", "keys = b.to(tl.int64) * M * W", "keys = b.to(tl.int64) * 0"),
    ("cross_attention_block", "head dim's second part", "total = tl.dot(a2, tl.trans(b2), total,", "total += 0 * tl.dot(a2, tl.trans(b2), total,"),
    ("cross_attention_block", "bias of the last channels", "y2 += tl.load(", "y2 += 0 * tl.load("),
    ("cross_attention_block", "gradient of the output weights", "rows.t() @ o.flatten(2)", "rows.t() @ q.flatten(2)"),
    ("add_noise", "amplitudes not rooted", "tl.sqrt(acp).to(tl.float32)", "acp.to(tl.float32)"),
    ("add_noise", "sign of v", "signal * noise - sigma * x", "signal * noise + sigma * x"),
    ("add_noise", "one timestep for all", "t = tl.load(t_ptr + sample)", "t = tl.load(t_ptr)"),
    ("prepare_step", "scale of another step", "scale_ptr + step", "scale_ptr + 0 * step"),
    ("prepare_step", "time of another step", "times_ptr + step * width", "times_ptr + 0 * step * width"),
    ("prepare_step", "the first sample for all", "owner = tl.load(owners_ptr + row)", "owner = tl.load(owners_ptr + row) * 0"),
    ("prepare_step", "channels beside the latents scaled too", "value = tl.where(is_latent, value, beside)", "value = tl.where(is_latent, value, beside * scale)"),
    ("prepare_step", "tail of the time row dropped", "(place < width)", "(place < width - 1)"),
    ("sampler_step", "channels-last read as if it were not", "there = sample + own % pixels * channels + own // pixels", "there = place"),
    ("sampler_step", "guidance of another step", "guidance_ptr + step", "guidance_ptr + 0 * step"),
    ("sampler_step", "guidance the wrong way", "guidance * (cond - uncond)", "guidance * (uncond - cond)"),
    ("sampler_step", "noise forgotten", "table = coefficients_ptr", "noise = noise * 0\n    table = coefficients_ptr"),
    ("sampler_step", "neighbouring row", "table = coefficients_ptr + step *", "table = coefficients_ptr + 0 * step *"),
    ("sampler_step", "tail dropped", "inside = place < size", "inside = place < size - 1"),
]  # fmt: skip


@pytest.fixture
def spoilt(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    op, _, line, instead = request.param

    # Copy the package and spoil the line wherever the op has it.
    folder = tmp_path / "spoilt"
    shutil.copytree(Path(sdkernels.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = [folder / name for name in FILES.get(op, (f"{op}.py",))]
    files = [file for file in files if line in file.read_text()]
    assert files, f"{op} has no line {line!r} to spoil"
    for file in files:
        file.write_text(file.read_text().replace(line, instead))

    # Load the copy.
    name = f"spoilt_{abs(hash(request.param))}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module

    for key in [key for key in sys.modules if key.split(".")[0] == name]:
        del sys.modules[key]


def is_seen(op: str, package: ModuleType) -> bool:
    """Whether some case of the op fails on the package's kernel."""
    spec = OPS[op]
    for dtype, mean, case in itertools.product((torch.float32, torch.float16), (0.0, 100.0), spec.odd):
        try:
            check(spec, spec.inputs(case, dtype, DEVICE, mean=mean), dtype, package)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("spoilt", FAULTS, indirect=True, ids=[f"{f[0]}: {f[1]}" for f in FAULTS])
def test_a_planted_fault_is_seen(spoilt: ModuleType, request: pytest.FixtureRequest) -> None:
    assert is_seen(request.node.callspec.params["spoilt"][0], spoilt)


def test_every_kernel_has_a_planted_fault() -> None:
    assert {fault[0] for fault in FAULTS} == set(OPS)
