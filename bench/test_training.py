"""A LoRA training step beside diffusers + peft: ``pytest bench/test_training.py``.

On a GPU: a network of SD1's size with random weights, pictures of 512, batch 4, rank 8 on cross-attention, autocast
over a half UNet with float32 adapters, fused AdamW; eager beside eager, compiled beside compiled. On a CPU: the
shipped model's network in float32, as a check that the suite works. Both get latents and contexts that are cached
already. ``--benchmark-json`` keeps the figures for ``bench.report``; *peak MB* is the most memory that a step held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.networks import SIZE, time_whole, unet_config
from bench.timing import DEVICE, GPU, Ceilings
from finetune.data.batches import Batch
from finetune.lora.attach import add_lora
from finetune.recipe.diffusion_loss import DiffusionLoss, LossConfig
from sdkit.checkpoints.loading import load
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.stable_diffusion import StableDiffusion

BATCH, SIDE, RANK = (4, 64, 8) if GPU else (2, 16, 8)
CROSS_ATTENTION = r".*\.attn2\.(to_[qkv]|to_out\.0)"
COMPILED = torch.float16  # compiling takes minutes, on a CPU many: there it is left out
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32]


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
    sd = StableDiffusion(load("tabletop"))
    sd.unet = UNet2DConditionModel.from_config(unet_config()).to(DEVICE, dtype)
    trained = add_lora(sd, RANK, RANK)
    for p in trained:
        p.data = p.data.float()

    latents, contexts = inputs(sd.unet.config.per_block(sd.unet.config.cross_attention_dim)[0])
    loss = DiffusionLoss(sd.unet.train(), lambda captions: contexts, sd.schedule, LossConfig()).to(DEVICE)
    if compiled:
        sd.unet.compile()

    def step(n: int) -> Tensor:
        generators = [torch.Generator().manual_seed(n * BATCH + i) for i in range(BATCH)]
        return loss(Batch(latents, [""] * BATCH, torch.ones(BATCH), torch.zeros(BATCH, dtype=torch.bool), generators))

    return Step(step, trained)


def theirs(dtype: torch.dtype, compiled: bool) -> Step:
    """diffusers' UNet with peft's adapters, as diffusers' training script for LoRA does it."""
    diffusers = pytest.importorskip("diffusers")
    from peft import LoraConfig

    config = unet_config()
    unet = diffusers.UNet2DConditionModel.from_config(config).to(DEVICE, dtype).requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=CROSS_ATTENTION))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()

    latents, contexts = inputs(config["cross_attention_dim"])
    schedule = diffusers.DDPMScheduler.from_config(load("tabletop").scheduler_config)
    if compiled:
        unet.compile()

    def step(n: int) -> Tensor:
        g = torch.Generator().manual_seed(n)
        noise = torch.randn(latents.shape, generator=g).to(DEVICE, dtype)
        t = torch.randint(schedule.config.num_train_timesteps, (BATCH,), generator=g).to(DEVICE)
        x0 = latents.to(DEVICE, dtype)
        noisy = schedule.add_noise(x0, noise, t)
        prediction = unet(noisy, t, contexts.to(DEVICE, dtype), return_dict=False)[0]
        return F.mse_loss(prediction.float(), schedule.get_velocity(x0, noise, t).float())

    return Step(step, trained)


IMPLEMENTATIONS: dict[str, tuple[Callable[[torch.dtype, bool], Step], bool]] = {
    "ours": (ours, False), "diffusers + peft": (theirs, False),
    "ours compiled": (ours, True), "diffusers + peft compiled": (theirs, True),
}  # fmt: skip


def trainer(name: str, dtype: torch.dtype) -> Callable[[], None]:
    """A function whose every call makes an optimizer step."""
    make, compiled = IMPLEMENTATIONS[name]
    step = make(dtype, compiled)
    optimizer = torch.optim.AdamW(step.trained, 1e-4, fused=True)
    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
    count = 0

    def run() -> None:
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

    return run


@pytest.mark.usefixtures("fresh_memory")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in IMPLEMENTATIONS for dtype in DTYPES if "compiled" not in name or dtype == COMPILED],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_training(benchmark: Any, limits: Ceilings, name: str, dtype: torch.dtype) -> None:
    time_whole(
        benchmark,
        limits,
        trainer(name, dtype),
        name=name,
        op="LoRA training step",
        direction="both",
        case=f"{SIZE}, batch {BATCH}, {str(dtype).removeprefix('torch.')}",
        rounds=30 if GPU else 3,
        images=BATCH,
    )
