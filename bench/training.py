"""A LoRA training step beside diffusers + peft: ``python -m bench.training``.

On a GPU: a network of SD1's size with random weights, pictures of 512, batch 4, rank 8 on cross-attention, autocast
over a half UNet with float32 adapters, fused AdamW, in float16 and bfloat16; weights channels-last on both sides.
``--compiled`` times both compiled instead, in float16. Both get latents and contexts that are cached already. A step
after which a trained number is not finite is not timed; nor is ours where its gradients are not the definitions'. On
a CPU: the shipped model's network in float32, as a rehearsal.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from bench.networks import SIDE, SIZE, compile_whole, distance, time_all, unet_config
from bench.record import DEVICE, GPU, Clock, Record, parser_of
from finetune.data.batches import Batch
from finetune.lora.attach import add_lora
from finetune.recipe.diffusion_loss import DiffusionLoss, LossConfig
from sdkit.checkpoints.loading import load
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.stable_diffusion import StableDiffusion

BATCH, RANK = 4 if GPU else 2, 8
CROSS_ATTENTION = r".*\.attn2\.(to_[qkv]|to_out\.0)"
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32]
ALIKE = 5e-2  # of gradients in half precision
MODE = "max-autotune-no-cudagraphs"  # under autograd its own graphs do not hold the optimizer's step

Train = Callable[[], list[nn.Parameter]]
"""Makes an optimizer step; -> what is trained."""


@dataclass(frozen=True)
class Step:
    """Something that trains: its loss for step n, and what is trained."""

    loss: Callable[[int], Tensor]
    trained: list[nn.Parameter]


def inputs(width: int) -> tuple[Tensor, Tensor]:
    """Latents [B, 4, h, w] and contexts [B, 77, D] on the CPU, as caches give them."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 4, SIDE, SIDE, generator=g), torch.randn(BATCH, 77, width, generator=g)


def ours(dtype: torch.dtype, compiled: bool) -> Step:
    """`DiffusionLoss` on our UNet with our adapters."""
    torch.manual_seed(0)
    sd = StableDiffusion(load("tabletop"))
    with DEVICE:
        sd.unet = UNet2DConditionModel.from_config(unet_config())
    sd.to(DEVICE, dtype)
    trained = add_lora(sd, RANK, RANK)
    for p in trained:
        p.data = p.data.float()

    latents, contexts = inputs(sd.unet.config.per_block(sd.unet.config.cross_attention_dim)[0])
    loss = DiffusionLoss(sd.unet.train(), lambda captions: contexts, sd.schedule, LossConfig()).to(DEVICE)
    if compiled:
        compile_whole(sd.unet, MODE)

    def step(n: int) -> Tensor:
        generators = [torch.Generator().manual_seed(n * BATCH + i) for i in range(BATCH)]
        return loss(Batch(latents, [""] * BATCH, torch.ones(BATCH), torch.zeros(BATCH, dtype=torch.bool), generators))

    return Step(step, trained)


def theirs(dtype: torch.dtype, compiled: bool) -> Step:
    """diffusers' UNet with peft's adapters, as diffusers' training script for LoRA does it."""
    from peft import LoraConfig

    diffusers: Any = importlib.import_module("diffusers")  # without its types, which are loose
    config = unet_config()
    with DEVICE:
        unet = diffusers.UNet2DConditionModel.from_config(config)
    layout = torch.channels_last if GPU else torch.contiguous_format
    unet.to(dtype).to(memory_format=layout).requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=CROSS_ATTENTION))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()

    latents, contexts = inputs(config["cross_attention_dim"])
    schedule = diffusers.DDPMScheduler.from_config(load("tabletop").scheduler_config)
    if compiled:
        compile_whole(unet, MODE)

    def step(n: int) -> Tensor:
        g = torch.Generator().manual_seed(n)
        noise = torch.randn(latents.shape, generator=g).to(DEVICE, dtype)
        t = torch.randint(schedule.config.num_train_timesteps, (BATCH,), generator=g).to(DEVICE)
        x0 = latents.to(DEVICE, dtype)
        noisy = schedule.add_noise(x0, noise, t)
        prediction = unet(noisy, t, contexts.to(DEVICE, dtype), return_dict=False)[0]
        return F.mse_loss(prediction.float(), schedule.get_velocity(x0, noise, t).float())

    return Step(step, trained)


def trainer(step: Step, dtype: torch.dtype) -> Train:
    """A function whose every call makes an optimizer step, and returns what is trained."""
    optimizer = torch.optim.AdamW(step.trained, 1e-4, fused=True)
    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
    count = 0

    def run() -> list[nn.Parameter]:
        nonlocal count
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = step.loss(count)
        scaler.scale(loss).backward()

        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(step.trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        count += 1
        return step.trained

    return run


def checked(step: Step, dtype: torch.dtype) -> Step:
    """Our step, if its gradients are those of the definitions; raises ValueError where they are not."""
    found: list[Tensor] = []
    for backend in ("auto", "eager"):
        with sdkernels.backend(backend), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            grads = torch.autograd.grad(1024 * step.loss(0), step.trained)  # float16 would lose small ones
        found.append(torch.cat([g.flatten() for g in grads]))

    if not (off := distance(*found)) <= ALIKE:
        raise ValueError(f"gradients off by {off:.1e}")
    return step


def why_not_finite(trained: list[nn.Parameter]) -> str:
    return "" if all(bool(p.isfinite().all()) for p in trained) else "a trained number is not finite"


def implementations(dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[], Train]]:
    suffix = " compiled" if compiled else ""
    return {
        f"ours{suffix}": lambda: trainer(checked(ours(dtype, compiled), dtype), dtype),
        f"diffusers + peft{suffix}": lambda: trainer(theirs(dtype, compiled), dtype),
    }


def main() -> int:
    """Time all; 1 where one is missing."""
    parser = parser_of(__doc__)
    parser.add_argument("--compiled", action="store_true", help="both compiled, in float16")
    arguments = parser.parse_args()
    clock, record = Clock(arguments.seconds), Record(arguments.out)

    missing = 0
    for dtype in DTYPES[:1] if arguments.compiled else DTYPES:
        missing |= time_all(
            record,
            clock,
            implementations(dtype, arguments.compiled),
            why_not_finite,
            op="LoRA training step",
            case=f"{SIZE}, batch {BATCH}, {str(dtype).removeprefix('torch.')}",
            images=BATCH,
            rounds=30,
            direction="both",
        )
    return missing


if __name__ == "__main__":
    sys.exit(main())
