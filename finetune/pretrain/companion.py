"""Train a companion of a tabletop model: ``python -m finetune.pretrain.companion inpaint`` or ``depth``.

Its UNet sees more than noisy latents: a mask and the masked picture's latents (arXiv 2112.10752, section 4.5), or a
depth map. The weights of these channels start at 0, and a LoRA is around every other layer; both learn from renders,
whose masks and depth are exact. Written is what is different alone (`sdkit.checkpoints.companion_folder`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

import sdkernels
from finetune.lora.attach import add_lora
from finetune.lora.saving import updates_of
from finetune.pretrain.clip import tokenize
from finetune.pretrain.noise_predictor import BATCH, DROPOUT, draw_timesteps, loss_weight, scaled_latents
from finetune.pretrain.recipe import Recipe, autocast, every_nth, is_main_process, train_on_the_cpu
from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.pictures import COUNTS, REPEATS
from finetune.pretrain.world.raycast import Rendered, render
from finetune.pretrain.world.scenes import Scenes, sample_scenes
from finetune.seeds import step_generator
from sdkit.checkpoints.companion_folder import DOWN, UP, save_companion
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.loading import MODELS
from sdkit.images.depth import depth_channel
from sdkit.images.masks import sampled
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SCENE_SEED = 6_000_001
RUN = 10  # number of the run, for `step_generator`
CHUNK = 64
BOX, WHOLE = 0.5, 0.1  # share of masks around an object, and over the whole picture; the others lie anywhere
ROUND = 0.3  # share of masks that are ellipses
NAME = "companion"
DEPTH_PARTS = {
    "depth_estimator": ("transformers", "DPTForDepthEstimation"),
    "feature_extractor": ("transformers", "DPTImageProcessor"),
}


class Kind(StrEnum):
    """What the UNet sees beside noisy latents."""

    inpaint = "inpaint"
    depth = "depth"


# Examples


class Examples(NamedTuple):
    """Scaled latents [N, 4, h, w] of renders, the channels beside them [N, E, h, w], both float16; and the scenes."""

    latents: Tensor
    extra: Tensor
    scenes: Scenes


@torch.no_grad()
def render_examples(kind: Kind, vae: AutoencoderKL, count: int, size: int) -> Examples:
    """``count`` renders of ``size`` pixels, of scenes that no other training has."""
    rng = torch.Generator().manual_seed(SCENE_SEED)
    parts: list[Examples] = []
    for _ in tqdm(range(0, count, CHUNK), desc="render", mininterval=5.0):
        scenes = sample_scenes(CHUNK, rng, COUNTS, repeats=REPEATS)
        rendered = render(scenes, size)
        pixels = rendered.images * 2 - 1
        latents = scaled_latents(vae, pixels)
        grid = (latents.shape[2], latents.shape[3])

        if kind is Kind.depth:
            extra = depth_channel(1 / rendered.depth, grid)
        else:
            masks = draw_masks(rendered, rng)
            extra = torch.cat([sampled(masks, grid), scaled_latents(vae, pixels * (1 - masks))], dim=1)
        parts.append(Examples(latents.half(), extra.half(), scenes))

    latents, extra, scenes = zip(*parts, strict=True)
    return Examples(torch.cat(latents)[:count], torch.cat(extra)[:count], Scenes.cat(scenes)[slice(count)])


def draw_masks(rendered: Rendered, rng: torch.Generator) -> Tensor:
    """A mask for each render, [B, 1, S, S], 1 where it is repainted: a box or an ellipse, around an object or not."""
    count, size = len(rendered.images), rendered.images.shape[-1]
    line = torch.arange(size) + 0.5
    masks = torch.zeros(count, 1, size, size)

    def uniform(low: float, high: float, number: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(number, generator=rng)

    for mask, instance in zip(masks, rendered.masks, strict=True):
        kind = float(uniform(0, 1))
        if kind < BOX:
            slot = 1 + int(torch.randint(int(instance.max()), (), generator=rng))
            inside = instance == slot
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            edges = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            top, left, bottom, right = (
                torch.stack(edges) + uniform(0, 0.1 * size, 4) * torch.tensor([-1, -1, 1, 1])
            ).tolist()
        elif kind < BOX + WHOLE:
            top, left, bottom, right = 0.0, 0.0, float(size), float(size)
        else:
            height, width = uniform(0.15 * size, 0.75 * size, 2).tolist()
            top, left = float(uniform(0, size - height)), float(uniform(0, size - width))
            bottom, right = top + height, left + width

        y = (line - (top + bottom) / 2) / ((bottom - top) / 2)
        x = (line - (left + right) / 2) / ((right - left) / 2)
        is_round = kind > BOX + WHOLE and float(uniform(0, 1)) < ROUND
        reach = y[:, None].square() + x.square() if is_round else torch.maximum(y.abs()[:, None], x.abs())
        mask[0] = (reach <= 1).float()
    return masks


# Training


class Batch(NamedTuple):
    """Clean latents [BATCH, 4, h, w], the channels beside them [BATCH, E, h, w], the noise that is added, at timesteps
    t [BATCH]; token ids [BATCH, N]."""

    x0: Tensor
    extra: Tensor
    noise: Tensor
    t: Tensor
    ids: Tensor


class CompanionLoss(nn.Module):
    """forward(batch) -> the weighted error of the UNet's prediction; the text encoder is as it is."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule
        self.text_encoder: Any = text_encoder
        self.alphas = schedule.alphas_cumprod.float()

    def forward(self, batch: Batch) -> Tensor:
        x_t, target = sdkernels.add_noise(batch.x0, batch.noise, batch.t, self.alphas, self.schedule.prediction_type)  # type: ignore[arg-type]
        with autocast():
            with torch.no_grad():
                hidden = self.text_encoder(input_ids=batch.ids).last_hidden_state
            prediction = self.unet(torch.cat([x_t, batch.extra], dim=1), batch.t, hidden)
        error = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        return (loss_weight(self.schedule, batch.t) * error).mean()


def draw_batches(examples: Examples, tokenizer: CLIPTokenizer, length: int, total: int) -> Callable[[int], Batch]:
    """A function from a step to its batch; ``length`` is that of token ids, ``total`` the number of timesteps."""

    def batch(step: int) -> Batch:
        rng = step_generator(RUN, step)
        index = torch.randint(len(examples.latents), (BATCH,), generator=rng)
        texts = captions(examples.scenes[index], seed=int(torch.randint(2**31, (), generator=rng)))
        dropped = torch.rand(BATCH, generator=rng) < DROPOUT
        ids = tokenize(tokenizer, ["" if d else t for d, t in zip(dropped, texts, strict=True)], length)

        x0, extra = examples.latents[index].float(), examples.extra[index].float()
        return Batch(x0, extra, torch.randn(x0.shape, generator=rng), draw_timesteps(total, rng), ids)

    return batch


def widened(base: StableDiffusion, channels: int) -> StableDiffusion:
    """The model with a UNet of ``channels`` input channels, which does what the model's own does."""
    parts, state = base.components, dict(base.unet.state_dict())
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, weight.new_zeros(len(weight), channels - weight.shape[1], 3, 3)], 1)

    unet = UNet2DConditionModel.from_config(base.unet.config.to_dict() | {"in_channels": channels})
    unet.load_state_dict(state)
    return StableDiffusion(Components(unet, parts.vae, parts.text_encoder, parts.tokenizer, parts.scheduler_config))


def difference(sd: StableDiffusion) -> dict[str, Tensor]:
    """What the training has changed: the input convolution, and two factors for each layer with a LoRA."""
    conv = sd.unet.conv_in
    found = {f"conv_in.{name}": value.detach() for name, value in conv.named_parameters()}
    for target, update in updates_of(sd, NAME).items():
        factors: Any = update
        found[f"{target.path}.weight{UP}"] = factors.scale * factors.up.flatten(1)
        found[f"{target.path}.weight{DOWN}"] = factors.down.flatten(1)
    return found


def main(
    kind: Annotated[Kind, typer.Argument(help="What it sees beside noisy latents.")],
    base: Annotated[Path, typer.Option(help="The model that it is a companion of.")] = MODELS / "tabletop",
    output: Annotated[Path | None, typer.Option(help="Its folder; default: beside the model, MODEL-KIND.")] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints.")] = Path("build/tabletop"),
    depth_estimator: Annotated[
        Path, typer.Option(help="What `finetune.pretrain.depth_estimator` wrote; of depth's companion alone.")
    ] = Path("build/tabletop/depth_estimator"),
    examples: Annotated[int, typer.Option(help="Renders to learn from.", min=64)] = 12_000,
    steps: Annotated[int, typer.Option(help="Training steps of 32 renders.", min=1)] = 3_000,
    rank: Annotated[int, typer.Option(help="Rank of the difference of each layer.", min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
) -> None:
    """Train it and write its folder; a killed run goes on where it stopped."""
    torch.manual_seed(0)
    model = StableDiffusion.from_pretrained(base, device="cpu", dtype=torch.float32)
    latent, size = model.vae.config.latent_channels, model.picture_size[0]
    channels = latent + (1 if kind is Kind.depth else 1 + latent)

    sd = widened(model, channels)
    add_lora(sd, rank, alpha=rank, targets=r"^(?!conv_in$)", name=NAME)
    sd.unet.conv_in.requires_grad_(True)

    shown = render_examples(kind, sd.vae, examples, size)
    length = sd.text_encoder.config.max_position_embeddings
    batches = draw_batches(shown, sd.tokenizer, length, sd.schedule.num_train_timesteps)
    recipe = Recipe(max_train_steps=steps, learning_rate=learning_rate, lr_warmup_steps=100, decay_from=0.3)
    loss = CompanionLoss(sd.unet, sd.text_encoder, sd.schedule)
    train_on_the_cpu(loss, batches, recipe, work / f"companion-{kind}", every_nth)
    if not is_main_process():
        return

    folder = output or base.with_name(f"{base.name}-{kind}")
    parts = DEPTH_PARTS if kind is Kind.depth else {}
    for name in parts:
        shutil.copytree(depth_estimator / name, folder / name, dirs_exist_ok=True)
    save_companion(folder, f"../{base.name}", {"in_channels": channels}, difference(sd), parts)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
