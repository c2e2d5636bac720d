"""The register of ops: for each its cases, their inputs, its operations, and the arguments that have a gradient.

Tests, benchmarks, tuning and the compile report iterate over ``OPS``. A new op has its inputs and its entry here, a
definition in ``reference.py`` and a file of its own.

Hot cases are the shapes of Stable Diffusion 1 at 512 x 512 and 2 at 768 x 768, for 2 samples (one picture with
guidance) and 8; odd cases are small and awkward. A function of inputs takes ``draw``, the ``mean`` of the main input
and the case's sizes, and returns the op's arguments by name, the floating-point ones in float64.
"""

from __future__ import annotations

from typing import Any

import torch

from .op_spec import Case, Draw, Inputs, OpSpec, Target, cases

# side of the latent, heads and their width at each level of the UNet
_ATTENTION = {
    "sd1": ((64, 8, 40), (32, 8, 80), (16, 8, 160), (8, 8, 160)),
    "sd2": ((96, 5, 64), (48, 10, 64), (24, 20, 64), (12, 20, 64)),
}


# halvings of the latent's side, and channels, of the norms in the UNet's ResNet blocks
_NORMS = (
    *((0, c) for c in (320, 640, 960)),
    *((1, c) for c in (320, 640, 960, 1280, 1920)),
    *((2, c) for c in (640, 1280, 1920, 2560)),
    *((3, c) for c in (1280, 2560)),
)


def _geglu_inputs(draw: Draw, mean: float, rows: int, width: int) -> Inputs:
    return {"x": draw(rows, 2 * width, mean=mean)}


GEGLU = OpSpec(
    name="geglu",
    make=_geglu_inputs,
    hot=tuple(
        Case(f"{model} b{batch} {side}x{side} {4 * c}", {"rows": batch * side * side, "width": 4 * c})
        for model, top in (("sd1", 64), ("sd2", 96))
        for batch in (2, 8)
        for side, c in ((top, 320), (top // 2, 640), (top // 4, 1280))
    ),
    odd=cases(
        one={"rows": 1, "width": 1},
        odd={"rows": 5, "width": 7},
        c40={"rows": 3, "width": 160},
        block={"rows": 2, "width": 1024},
        over={"rows": 2, "width": 1025},
        c33={"rows": 77, "width": 33},
        c96={"rows": 7, "width": 96},
        c320={"rows": 3, "width": 320},
        c1280={"rows": 2, "width": 1280},
        narrow={"rows": 35, "width": 2},
        c31={"rows": 4, "width": 31},
        tall={"rows": 129, "width": 5},
    ),
    gradients=("x",),
    targets=(Target("sd1 b2 64x64 1280", (80, 89, 90, 100, 120), copies=1.0),),
)


def _linear_geglu_inputs(draw: Draw, mean: float, rows: int, width: int, out: int, bias: bool = True) -> Inputs:
    return {
        "x": draw(rows, width, mean=min(mean, 1.0)),
        "weight": draw(2 * out, width, std=width**-0.5),
        "bias": draw(2 * out, std=0.2) if bias else None,
    }


LINEAR_GEGLU = OpSpec(
    name="linear_geglu",
    make=_linear_geglu_inputs,
    hot=tuple(
        Case(f"{model} b{batch} {side}x{side} {c}", {"rows": batch * side * side, "width": c, "out": 4 * c})
        for model, top in (("sd1", 64), ("sd2", 96))
        for batch in (2, 8)
        for side, c in ((top, 320), (top // 2, 640), (top // 4, 1280), (top // 8, 1280))
    ),
    odd=cases(
        one={"rows": 1, "width": 1, "out": 1},
        odd={"rows": 5, "width": 7, "out": 3},
        c40={"rows": 9, "width": 40, "out": 40},
        wide={"rows": 3, "width": 33, "out": 70, "bias": False},
        c77={"rows": 77, "width": 31, "out": 33},
        block={"rows": 32, "width": 32, "out": 32},
        over={"rows": 33, "width": 65, "out": 33},
        c96={"rows": 65, "width": 96, "out": 65},
        tall={"rows": 300, "width": 16, "out": 4},
        bands={"rows": 289, "width": 3, "out": 35},
        plain={"rows": 4, "width": 64, "out": 20, "bias": False},
        c320={"rows": 7, "width": 320, "out": 40},
    ),
    flops=lambda rows, width, out, **_: 4 * rows * width * out,
)


def _group_norm_inputs(
    draw: Draw,
    mean: float,
    batch: int,
    channels: int,
    shape: tuple[int, ...],
    groups: int = 32,
    last: bool = True,
    affine: bool = True,
    activation: str | None = "silu",
    add: int = 0,
    shift: bool = False,
    eps: float = 1e-5,
) -> Inputs:
    """``last``: channels-last in memory; ``add``: its rows, 0 for none."""
    x = draw(batch, *shape, channels, mean=mean).movedim(-1, 1)

    return {
        "x": x if last else x.contiguous(),
        "num_groups": groups,
        "weight": draw(channels, mean=1.0, std=0.2) if affine else None,
        "bias": draw(channels, std=0.2) if affine else None,
        "eps": eps,
        "activation": activation,
        "add": draw(add, channels) if add else None,
        "shift": draw(channels) if shift else None,
    }


GROUP_NORM = OpSpec(
    name="group_norm",
    make=_group_norm_inputs,
    hot=tuple(
        Case(f"{name} {side}x{side} {c}{' add' if add else ''}", {"channels": c, "shape": (side, side)} | sizes)
        for name, sizes, side, c, add in (
            *(
                (f"{model} b{batch}", {"batch": batch, "add": batch if add else 0}, top >> level, c, add)
                for model, top in (("sd1", 64), ("sd2", 96))
                for batch in (2, 8)
                for level, c in _NORMS
                for add in ((False, True) if c == (320, 640, 1280, 1280)[level] else (False,))
            ),
            ("vae b1", {"batch": 1}, 512, 128, False),
            ("vae b1", {"batch": 1}, 64, 512, False),
        )
    ),
    odd=cases(
        one={"batch": 1, "channels": 1, "shape": (2,), "groups": 1, "activation": None},
        odd={"batch": 2, "channels": 6, "shape": (5, 7), "groups": 2, "add": 2},
        nchw={"batch": 2, "channels": 6, "shape": (5, 7), "groups": 2, "last": False, "add": 1},
        shift={"batch": 2, "channels": 6, "shape": (5, 3), "groups": 3, "shift": True, "add": 2},
        c40={"batch": 1, "channels": 40, "shape": (7, 3), "groups": 4, "eps": 0.3},
        c96={"batch": 1, "channels": 96, "shape": (5, 1), "groups": 3, "affine": False},
        c320={"batch": 1, "channels": 320, "shape": (3, 5), "groups": 2, "activation": None, "add": 1},
        pixel={"batch": 2, "channels": 12, "shape": (1, 1), "groups": 3},
        flat={"batch": 3, "channels": 10, "shape": (), "groups": 2, "add": 3},
        line={"batch": 2, "channels": 9, "shape": (77,), "groups": 1, "last": False, "activation": None},
        cube={"batch": 1, "channels": 8, "shape": (3, 4, 5), "groups": 2, "add": 1},
        block={"batch": 1, "channels": 32, "shape": (8, 8), "groups": 2, "last": False},
        single={"batch": 1, "channels": 3, "shape": (33, 2), "groups": 3},
        parts={"batch": 1, "channels": 17, "shape": (33, 33), "groups": 1, "add": 1},
    ),
    gradients=("x", "weight", "bias", "add", "shift"),
    targets=(Target("sd1 b2 64x64 320", (90,), copies=1.6),),
)


def _group_norm_of_sum_inputs(
    draw: Draw,
    mean: float,
    batch: int,
    channels: int,
    shape: tuple[int, ...],
    parts: str = "residual shift",
    skip: int = 0,
    groups: int = 32,
    last: bool = True,
    affine: bool = True,
    activation: str | None = "silu",
) -> Inputs:
    """``channels`` of x, ``skip`` of skip, 0 for none; ``parts``: the others that there are."""

    def pixels(channels: int, mean: float = 0.0) -> torch.Tensor:
        x = draw(batch, *shape, channels, mean=mean).movedim(-1, 1)
        return x if last else x.contiguous()

    return {
        "x": pixels(channels, mean),
        "residual": pixels(channels) if "residual" in parts else None,
        "shift": draw(channels) if "shift" in parts else None,
        "skip": pixels(skip, mean) if skip else None,
        "num_groups": groups,
        "weight": draw(channels + skip, mean=1.0, std=0.2) if affine else None,
        "bias": draw(channels + skip, std=0.2) if affine else None,
        "activation": activation,
        "later": draw(channels + skip) if "later" in parts else None,
    }


# halvings of the latent's side, and channels of x and of the skip connection, where the up blocks join them
_JOINTS = ((0, 320, 320), (0, 640, 320), (1, 640, 640), (1, 1280, 640), (2, 1280, 1280), (3, 1280, 1280))

GROUP_NORM_OF_SUM = OpSpec(
    name="group_norm_of_sum",
    make=_group_norm_of_sum_inputs,
    hot=(
        *(
            Case(
                f"{model} b{batch} {top >> level}x{top >> level} {c}",
                {"batch": batch, "channels": c, "shape": (top >> level, top >> level), "activation": None},
            )
            for model, top in (("sd1", 64), ("sd2", 96))
            for batch in (2, 8)
            for level, c in ((0, 320), (1, 640), (2, 1280), (3, 1280))
        ),
        *(
            Case(
                f"{model} b{batch} {top >> level}x{top >> level} {c}+{skip}",
                {"batch": batch, "channels": c, "skip": skip, "shape": (top >> level, top >> level), "parts": ""},
            )
            for model, top in (("sd1", 64), ("sd2", 96))
            for batch in (2, 8)
            for level, c, skip in _JOINTS
        ),
    ),
    odd=cases(
        one={"batch": 1, "channels": 1, "shape": (2,), "groups": 1, "activation": None},
        odd={"batch": 2, "channels": 6, "shape": (5, 7), "groups": 2},
        nchw={"batch": 2, "channels": 4, "skip": 2, "shape": (5, 7), "groups": 2, "last": False},
        across={"batch": 2, "channels": 7, "skip": 5, "shape": (3, 5), "groups": 2, "parts": "residual shift later"},
        skip={"batch": 1, "channels": 24, "skip": 16, "shape": (7, 3), "groups": 4, "parts": ""},
        c96={"batch": 1, "channels": 96, "shape": (5, 1), "groups": 3, "affine": False, "parts": "residual"},
        shift={"batch": 1, "channels": 320, "shape": (3, 5), "groups": 2, "activation": None, "parts": "shift"},
        pixel={"batch": 2, "channels": 9, "skip": 3, "shape": (1, 1), "groups": 3},
        flat={"batch": 3, "channels": 10, "shape": (), "groups": 2, "parts": "residual later"},
        line={"batch": 2, "channels": 9, "shape": (77,), "groups": 1, "last": False, "activation": None},
        block={"batch": 1, "channels": 16, "skip": 16, "shape": (8, 8), "groups": 2, "last": False},
        parts={"batch": 1, "channels": 11, "skip": 6, "shape": (33, 33), "groups": 1},
    ),
    gradients=("x", "residual", "shift", "skip", "weight", "bias", "later"),
)


def _layer_norm_inputs(
    draw: Draw, mean: float, rows: int, width: int, affine: bool = True, residual: bool = False
) -> Inputs:
    return {
        "x": draw(rows, width, mean=mean),
        "weight": draw(width, mean=1.0, std=0.2) if affine else None,
        "bias": draw(width, std=0.2) if affine else None,
        "residual": draw(rows, width) if residual else None,
    }


LAYER_NORM = OpSpec(
    name="layer_norm",
    make=_layer_norm_inputs,
    hot=tuple(
        Case(f"{model} b{batch} {side}x{side} {c}", {"rows": batch * side * side, "width": c, "residual": True})
        for model, top in (("sd1", 64), ("sd2", 96))
        for batch in (2, 8)
        for side, c in ((top, 320), (top // 2, 640), (top // 4, 1280))
    ),
    odd=cases(
        one={"rows": 1, "width": 2},
        odd={"rows": 5, "width": 7},
        c40={"rows": 3, "width": 40},
        sum={"rows": 5, "width": 33, "residual": True},
        plain={"rows": 4, "width": 31, "affine": False},
        c77={"rows": 77, "width": 33},
        c96={"rows": 7, "width": 96},
        c320={"rows": 9, "width": 320},
        c1280={"rows": 2, "width": 1280},
        block={"rows": 3, "width": 64},
        over={"rows": 3, "width": 65},
        tall={"rows": 257, "width": 16, "residual": True},
    ),
    gradients=("x", "weight", "bias", "residual"),
)


def _lora_linear_inputs(
    draw: Draw, mean: float, rows: int, width: int, out: int, rank: int, bias: bool = True, scale: float | None = None
) -> Inputs:
    """x has a mean of at most 1: beyond, its columns are alike, and A's gradient has one error for a whole row."""
    return {
        "x": draw(rows, width, mean=min(mean, 1.0)),
        "weight": draw(out, width, std=width**-0.5),
        "bias": draw(out, std=0.2) if bias else None,
        "a": draw(rank, width, std=width**-0.5),
        "b": draw(out, rank, std=rank**-0.5),
        "scale": draw(mean=0.7, std=0.0) if scale is None else scale,
    }


LORA_LINEAR = OpSpec(
    name="lora_linear",
    make=_lora_linear_inputs,
    hot=tuple(
        Case(
            f"sd1 b{batch} {side}x{side} {c} to {out} rank {rank}",
            {"rows": batch * side * side, "width": c, "out": out, "rank": rank, "bias": out != c},
        )
        for batch in (2, 8)
        for rank in (16, 64)
        for side, c in ((64, 320), (32, 640), (16, 1280))
        for out in (c, 8 * c)
    ),
    odd=cases(
        one={"rows": 1, "width": 1, "out": 1, "rank": 1},
        odd={"rows": 5, "width": 7, "out": 3, "rank": 2},
        c40={"rows": 9, "width": 40, "out": 40, "rank": 4},
        wide={"rows": 3, "width": 33, "out": 70, "rank": 5},
        c77={"rows": 77, "width": 33, "out": 31, "rank": 16},
        more={"rows": 6, "width": 20, "out": 24, "rank": 17},
        c96={"rows": 65, "width": 96, "out": 65, "rank": 8},
        c320={"rows": 7, "width": 320, "out": 40, "rank": 8},
        plain={"rows": 5, "width": 64, "out": 64, "rank": 4, "bias": False},
        number={"rows": 5, "width": 16, "out": 16, "rank": 4, "scale": -1.5},
        tall={"rows": 131, "width": 16, "out": 8, "rank": 3},
        r40={"rows": 5, "width": 17, "out": 9, "rank": 40},
    ),
    gradients=("x", "weight", "bias", "a", "b", "scale"),
    flops=lambda rows, width, out, rank, **_: 2 * rows * (width * out + rank * (width + out)),
)


def _add_noise_inputs(
    draw: Draw, mean: float, batch: int, shape: tuple[int, ...], kind: str, steps: int = 1000
) -> Inputs:
    x0 = draw(batch, *shape, mean=mean)
    return {
        "x0": x0,
        "noise": draw(batch, *shape),
        "t": (torch.arange(batch, device=x0.device) * 7919 + 3) % steps,
        "alphas_cumprod": torch.linspace(0.999, 0.001, steps, dtype=torch.float64, device=x0.device),
        "prediction_type": kind,
    }


ADD_NOISE = OpSpec(
    name="add_noise",
    make=_add_noise_inputs,
    hot=tuple(
        Case(f"{model} b{batch} {kind}", {"batch": batch, "shape": (4, side, side), "kind": kind})
        for model, side in (("sd1", 64), ("sd2", 96))
        for batch in (2, 8, 256)
        for kind in ("epsilon", "v_prediction")
    ),
    odd=cases(
        one={"batch": 1, "shape": (1,), "kind": "epsilon"},
        odd={"batch": 5, "shape": (7,), "kind": "v_prediction"},
        flat={"batch": 3, "shape": (), "kind": "v_prediction"},
        epsilon={"batch": 2, "shape": (4, 5, 7), "kind": "epsilon"},
        sample={"batch": 2, "shape": (4, 5, 7), "kind": "sample"},
        velocity={"batch": 2, "shape": (4, 5, 7), "kind": "v_prediction"},
        block={"batch": 2, "shape": (1024,), "kind": "v_prediction"},
        over={"batch": 2, "shape": (1025,), "kind": "v_prediction"},
        c40={"batch": 3, "shape": (40, 3), "kind": "epsilon"},
        c96={"batch": 2, "shape": (96, 5), "kind": "sample"},
        many={"batch": 77, "shape": (33,), "kind": "v_prediction"},
        short={"batch": 4, "shape": (4, 3, 3), "kind": "v_prediction", "steps": 2},
    ),
    fixed={"alphas_cumprod": torch.float64},
)


def _sampler_step_inputs(
    draw: Draw,
    mean: float,
    registers: int,
    shape: tuple[int, ...],
    guided: str = "both",
    noise: bool = False,
    step: int = 1,
    table: bool = False,
    last: bool = False,
) -> Inputs:
    """``guided``: "both" predictions, or only "cond" or "uncond"; ``table``: step and guidance as a graph has them;
    ``last``: predictions that are channels-last in memory."""
    latent = draw(registers, *shape, mean=mean)
    uncond = None if guided == "cond" else _prediction(draw, shape, last)
    cond = None if guided == "uncond" else _prediction(draw, shape, last)
    scales = draw(3, mean=7.5) if table else 7.5

    return {
        "registers": latent,
        "uncond": uncond,
        "cond": cond,
        "noise": draw(*shape) if noise else None,
        "coefficients": draw(3, registers, registers + 2),
        "step": torch.tensor(step, device=latent.device) if table else step,
        "guidance_scale": scales,
    }


def _prediction(draw: Draw, shape: tuple[int, ...], last: bool) -> torch.Tensor:
    return draw(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else draw(*shape)


SAMPLER_STEP = OpSpec(
    name="sampler_step",
    make=_sampler_step_inputs,
    hot=tuple(
        Case(
            f"{model} b{batch} {registers} registers{' noise' if noise else ''}",
            {"registers": registers, "shape": (batch, 4, side, side), "noise": noise, "table": True, "last": True},
        )
        for model, side in (("sd1", 64), ("sd2", 96))
        for batch in (1, 4, 512)
        for registers, noise in ((1, False), (1, True), (3, False))
    ),
    odd=cases(
        one={"registers": 1, "shape": (1, 1)},
        odd={"registers": 2, "shape": (5, 7)},
        cond={"registers": 3, "shape": (2, 4, 5, 6), "guided": "cond"},
        uncond={"registers": 3, "shape": (2, 4, 5, 6), "guided": "uncond", "noise": True},
        noise={"registers": 2, "shape": (2, 4, 5, 7), "noise": True, "step": 2},
        first={"registers": 4, "shape": (1, 4, 8, 8), "step": 0},
        last={"registers": 1, "shape": (3, 33), "step": -1},
        five={"registers": 5, "shape": (2, 40), "noise": True},
        block={"registers": 2, "shape": (1, 1024)},
        over={"registers": 2, "shape": (1, 1025), "noise": True},
        seven={"registers": 7, "shape": (77, 3)},
        c96={"registers": 3, "shape": (2, 96, 3)},
        table={"registers": 3, "shape": (2, 4, 5, 7), "table": True, "step": 2, "noise": True},
        channels_last={"registers": 2, "shape": (2, 4, 17, 19), "last": True, "table": True},
        alone={"registers": 1, "shape": (3, 4, 5, 6), "last": True, "guided": "cond", "noise": True},
    ),
    fixed={"registers": torch.float32, "coefficients": torch.float64, "guidance_scale": torch.float32},
)


def _prepare_step_inputs(
    draw: Draw,
    mean: float,
    shape: tuple[int, ...],
    rows: int,
    extras: int = 0,
    width: int = 33,
    step: int = 1,
    table: bool = True,
) -> Inputs:
    """``rows`` of the network's input, made of the samples in turn; ``table``: the step as a graph has it."""
    latents = draw(*shape, mean=mean)

    return {
        "latents": latents,
        "extra": draw(shape[0], extras, *shape[2:]) if extras else None,
        "owners": torch.arange(rows, device=latents.device) % shape[0],
        "input_scale": draw(3),
        "times": draw(3, width),
        "step": torch.tensor(step, device=latents.device) if table else step,
    }


PREPARE_STEP = OpSpec(
    name="prepare_step",
    make=_prepare_step_inputs,
    hot=tuple(
        Case(
            f"{model} b{batch}{f' {extras} more channels' if extras else ''}",
            {"shape": (batch, 4, side, side), "rows": 2 * batch, "extras": extras, "width": 20800},
        )
        for model, side in (("sd1", 64), ("sd2", 96))
        for batch in (1, 4)
        for extras in (0, 5)
    ),
    odd=cases(
        one={"shape": (1, 1), "rows": 1, "width": 1},
        odd={"shape": (5, 7), "rows": 3},
        both={"shape": (2, 4, 5, 7), "rows": 4},
        number={"shape": (2, 4, 5, 7), "rows": 2, "table": False, "step": 2},
        last={"shape": (2, 4, 3, 3), "rows": 4, "step": -1},
        first={"shape": (1, 4, 8, 8), "rows": 3, "step": 0, "table": False},
        mask={"shape": (2, 4, 5, 6), "rows": 4, "extras": 5},
        depth={"shape": (3, 4, 9, 5), "rows": 6, "extras": 1, "step": 2},
        block={"shape": (1, 1, 32, 32), "rows": 1, "width": 1024},
        over={"shape": (1, 1, 1025), "rows": 2, "width": 1025},
        wide={"shape": (1, 2, 3), "rows": 2, "width": 3000, "extras": 2},
        many={"shape": (7, 3, 17, 33), "rows": 14},
    ),
    fixed={"latents": torch.float32, "input_scale": torch.float32},
)


def _self_attention_inputs(draw: Draw, mean: float, tokens: int, **sizes: Any) -> Inputs:
    return _cross_attention_inputs(draw, mean, queries=tokens, keys=tokens, **sizes)


SELF_ATTENTION = OpSpec(
    name="self_attention",
    make=_self_attention_inputs,
    hot=tuple(
        Case(
            f"{model} b{batch} {side}x{side} {heads}x{width}",
            {"batch": batch, "tokens": side * side, "heads": heads, "width": width},
        )
        for model, levels in _ATTENTION.items()
        for batch in (2, 8)
        for side, heads, width in levels
    ),
    odd=cases(
        one={"batch": 1, "tokens": 1, "heads": 1, "width": 1},
        odd={"batch": 1, "tokens": 35, "heads": 2, "width": 7},
        d40={"batch": 2, "tokens": 33, "heads": 2, "width": 40},
        d64={"batch": 1, "tokens": 77, "heads": 1, "width": 64, "scale": 0.3},
        d80={"batch": 1, "tokens": 31, "heads": 1, "width": 80},
        d160={"batch": 1, "tokens": 33, "heads": 1, "width": 160},
        d256={"batch": 1, "tokens": 17, "heads": 1, "width": 256, "scale": 0.01},
        d17={"batch": 1, "tokens": 64, "heads": 3, "width": 17},
        d100={"batch": 1, "tokens": 65, "heads": 1, "width": 100},
        block={"batch": 1, "tokens": 64, "heads": 1, "width": 40},
        over={"batch": 1, "tokens": 65, "heads": 1, "width": 40},
        long={"batch": 1, "tokens": 129, "heads": 1, "width": 16},
        batch={"batch": 3, "tokens": 5, "heads": 2, "width": 32},
    ),
    gradients=("q", "k", "v"),
    flops=lambda batch, tokens, heads, width, **_: 4 * batch * heads * width * tokens**2,
    targets=(Target("sd1 b2 64x64 8x40", (90,), microseconds=140, simulated=True),),
)


def _cross_attention_inputs(
    draw: Draw, mean: float, batch: int, queries: int, keys: int, heads: int, width: int, **others: Any
) -> Inputs:
    q = draw(batch, queries, heads, width)
    k, v = (draw(batch, keys, heads, width, mean=mean) for _ in range(2))
    return {"q": q, "k": k, "v": v, **others}


CROSS_ATTENTION = OpSpec(
    name="cross_attention",
    make=_cross_attention_inputs,
    hot=tuple(
        Case(
            f"{model} b{batch} {side}x{side} {heads}x{width} {keys} keys",
            {"batch": batch, "queries": side * side, "keys": keys, "heads": heads, "width": width},
        )
        for model, levels in _ATTENTION.items()
        for batch in (2, 8)
        for keys in ((77, 154, 231) if (model, batch) == ("sd1", 2) else (77,))
        for side, heads, width in levels
    ),
    odd=cases(
        one={"batch": 1, "queries": 1, "keys": 1, "heads": 1, "width": 1},
        odd={"batch": 1, "queries": 35, "keys": 7, "heads": 2, "width": 7, "probabilities": True},
        d40={"batch": 2, "queries": 17, "keys": 77, "heads": 1, "width": 40, "probabilities": True},
        d64={"batch": 1, "queries": 33, "keys": 77, "heads": 1, "width": 64, "scale": 0.3},
        d80={"batch": 1, "queries": 17, "keys": 77, "heads": 1, "width": 80},
        d160={"batch": 1, "queries": 33, "keys": 77, "heads": 1, "width": 160},
        d256={"batch": 1, "queries": 5, "keys": 33, "heads": 1, "width": 256},
        k154={"batch": 1, "queries": 31, "keys": 154, "heads": 1, "width": 40},
        k231={"batch": 1, "queries": 16, "keys": 231, "heads": 2, "width": 40, "probabilities": True},
        k256={"batch": 1, "queries": 5, "keys": 256, "heads": 1, "width": 17, "scale": 0.01},
        k64={"batch": 1, "queries": 33, "keys": 64, "heads": 3, "width": 24, "probabilities": True},
        k16={"batch": 3, "queries": 7, "keys": 16, "heads": 1, "width": 32},
        long={"batch": 1, "queries": 130, "keys": 20, "heads": 1, "width": 16},
    ),
    gradients=("q", "k", "v"),
    flops=lambda batch, queries, keys, heads, width, **_: 4 * batch * heads * width * queries * keys,
    targets=(Target("sd1 b2 64x64 8x40 77 keys", (90,), microseconds=3.2),),
)


def _cross_attention_block_inputs(
    draw: Draw,
    mean: float,
    batch: int,
    queries: int,
    channels: int,
    keys: int,
    heads: int,
    width: int,
    bias: bool = True,
    **others: Any,
) -> Inputs:
    """x has a mean of at most 1: beyond, the softmax is one key's alone, and gradients are nothing but rounding."""
    k, v = (draw(batch, keys, heads, width, mean=mean) for _ in range(2))

    return {
        "x": draw(batch, queries, channels, mean=min(mean, 1.0)),
        "to_q": draw(heads * width, channels, std=channels**-0.5),
        "k": k,
        "v": v,
        "to_out": draw(channels, heads * width, std=(heads * width) ** -0.5),
        "bias": draw(channels, std=0.2) if bias else None,
        **others,
    }


CROSS_ATTENTION_BLOCK = OpSpec(
    name="cross_attention_block",
    make=_cross_attention_block_inputs,
    hot=tuple(
        Case(
            f"{model} b{batch} {side}x{side} {heads * width} by {heads}x{width} 77 keys",
            {"batch": batch, "queries": side**2, "channels": heads * width, "keys": 77, "heads": heads}
            | {"width": width},
        )
        for model, ((side, heads, width), *_) in _ATTENTION.items()
        for batch in (2, 8)
    ),
    odd=cases(
        one={"batch": 1, "queries": 1, "channels": 1, "keys": 1, "heads": 1, "width": 1},
        odd={"batch": 2, "queries": 5, "channels": 7, "keys": 3, "heads": 2, "width": 3},
        c33={"batch": 1, "queries": 17, "channels": 33, "keys": 7, "heads": 3, "width": 11},
        c40={"batch": 1, "queries": 9, "channels": 40, "keys": 77, "heads": 1, "width": 40, "bias": False},
        c96={"batch": 1, "queries": 7, "channels": 96, "keys": 20, "heads": 2, "width": 48, "scale": 0.3},
        c65={"batch": 1, "queries": 5, "channels": 65, "keys": 33, "heads": 1, "width": 17},
        c128={"batch": 1, "queries": 5, "channels": 128, "keys": 16, "heads": 2, "width": 64},
        c320={"batch": 1, "queries": 3, "channels": 320, "keys": 77, "heads": 2, "width": 40},
        inner={"batch": 1, "queries": 16, "channels": 20, "keys": 5, "heads": 5, "width": 8, "bias": False},
        k65={"batch": 3, "queries": 4, "channels": 16, "keys": 65, "heads": 1, "width": 16, "scale": 0.9},
        k128={"batch": 1, "queries": 17, "channels": 24, "keys": 128, "heads": 1, "width": 24},
        k129={"batch": 1, "queries": 5, "channels": 24, "keys": 129, "heads": 1, "width": 24, "scale": 0.05},
        over={"batch": 1, "queries": 65, "channels": 16, "keys": 9, "heads": 1, "width": 32},
    ),
    gradients=("x", "to_q", "k", "v", "to_out", "bias"),
    flops=lambda batch, queries, channels, keys, heads, width, **_: (
        4 * batch * queries * heads * width * (channels + keys)
    ),
)


OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        GEGLU,
        LINEAR_GEGLU,
        GROUP_NORM,
        GROUP_NORM_OF_SUM,
        LAYER_NORM,
        LORA_LINEAR,
        ADD_NOISE,
        PREPARE_STEP,
        SAMPLER_STEP,
        SELF_ATTENTION,
        CROSS_ATTENTION,
        CROSS_ATTENTION_BLOCK,
    )
}
