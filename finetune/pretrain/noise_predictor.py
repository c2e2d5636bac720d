"""Train the UNet of the shipped model on latents and captions: ``python -m finetune.pretrain.noise_predictor``.

v prediction with min-SNR weighting (arXiv 2303.09556, gamma 5) that never falls below a floor: what stands where is
decided at high noise, where the plain weight all but vanishes. Captions are dropped one time in ten so that guidance
works; the weights' moving average is kept. The text encoder goes on learning with the UNet, its pooled output held to
what contrastive training made it, so that the image encoder still fits. Ends by writing the whole model.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

import sdkernels
from finetune.pretrain.autoencoder import load_vae
from finetune.pretrain.clip import load_text_encoder, tokenize
from finetune.pretrain.training import MovingAverage, Recipe, autocast, generator, save_atomically, train
from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.pictures import SIZE, Pictures, training_pictures
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.diffusers_folder import load_folder, save_folder
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import grid
from sdkit.networks.config import UNetConfig
from sdkit.networks.text_encoder import pooled
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import load_tokenizer
from sdkit.sampling.guidance import Guidance
from sdkit.sampling.plan import denoise
from sdkit.sampling.planning import make_plan
from sdkit.sampling.schedule import NoiseSchedule

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

CONFIG = UNetConfig(
    sample_size=SIZE // 4,
    block_out_channels=(64, 128, 160),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4, 5),
    norm_num_groups=16,
    cross_attention_dim=128,
)
SCHEDULER: dict[str, Any] = {  # ddpm: its fresh noise mends early mistakes, such as a second object
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_spacing": "trailing",
    "steps_offset": 1, "clip_sample": False, "variance_type": "fixed_small",
}  # fmt: skip
BATCH = 32
DROPOUT = 0.1
GAMMA = 5.0
FLOOR = 0.4  # least weight of a timestep
COUNTS = (0.48, 0.4, 0.12)  # share of pictures with one, two and three objects
ANCHOR = 1.0
PROMPTS = (
    "a red sphere", "a blue cube", "a green torus", "a yellow cylinder", "a purple cone", "a white sphere",
    "a large shiny orange cube on a wooden table", "a small matte cyan ball on a black table",
    "a red cube and a blue sphere", "a green cone and a yellow torus", "a white cylinder behind a purple sphere",
    "a cyan torus to the left of a red cone", "an orange sphere in front of a green cylinder",
    "a small blue cube to the right of a large yellow cone", "a blue sphere on a grey table", "",
)  # fmt: skip


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: Pictures, folder: Path) -> Tensor:
    """The posterior's mean of every picture, scaled, float16 [N, 4, h, w]; kept on disk, under the encoder's hash."""
    weights = b"".join(value.numpy().tobytes() for value in vae.encoder.state_dict().values())
    key = hashlib.sha256(weights + f"{vae.config.scaling_factor} {len(pictures)}".encode()).hexdigest()[:12]
    file = folder / f"latents-{key}.pt"
    if not file.exists():
        parts: list[Tensor] = []
        for index in tqdm(torch.arange(len(pictures)).split(64), desc="encode", mininterval=5.0):
            with autocast():
                mean = vae.encode(pictures.pixels(index)).mode()
            parts.append((mean.float() * vae.config.scaling_factor).half())
        save_atomically(torch.cat(parts), file)
    return torch.load(file, weights_only=True)


class TextConditioned(nn.Module):
    """What is trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder: Any = text_encoder

    def forward(self, sample: Tensor, timestep: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction, and the text's pooled output."""
        hidden = self.text_encoder(input_ids=ids).last_hidden_state
        return self.unet(sample, timestep, hidden), pooled(hidden, ids, int(ids[0, -1]))


def loss_weight(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Weight of v's squared error at timesteps t: min(snr, GAMMA) / (snr + 1) (arXiv 2303.09556), but never below
    FLOOR where there is more noise than picture."""
    snr = schedule.snr(t).float()
    weight = snr.clamp(max=GAMMA) / (snr + 1)
    return torch.where(snr < 1, weight.clamp(min=FLOOR), weight)


def draw_pictures(count: Tensor, rng: torch.Generator) -> Tensor:
    """Indices [BATCH] of pictures, drawn so that COUNTS holds; ``count`` [N] is how many objects each shows."""
    weights = torch.tensor(COUNTS) / count.bincount(minlength=4)[1:]
    return torch.multinomial(weights[count - 1], BATCH, replacement=True, generator=rng)


def draw_timesteps(total: int, rng: torch.Generator) -> Tensor:
    """Timesteps [BATCH], one from each of BATCH equal parts of the schedule, in random order."""
    places = (torch.randperm(BATCH, generator=rng) + torch.rand(BATCH, generator=rng)) / BATCH
    return (places * total).long().clamp(max=total - 1)


@torch.no_grad()
def sample_sheet(model: TextConditioned, vae: AutoencoderKL, tokenizer: CLIPTokenizer, schedule: NoiseSchedule) -> Any:
    """PROMPTS drawn with 20 steps and guidance 3, as a sheet with captions."""
    plan = make_plan("dpmpp_2m", schedule, 20, timestep_spacing="trailing")
    ids = tokenize(tokenizer, [*PROMPTS, *[""] * len(PROMPTS)], model.text_encoder.config.max_position_embeddings)
    context = model.unet.context_kv(model.text_encoder(input_ids=ids).last_hidden_state)

    def predict(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        t = plan.timesteps[k].float()
        cond, uncond = model.unet(torch.cat([x, x]).float(), t, None, context_kv=context).chunk(2)
        return uncond, cond

    noise = torch.randn(len(PROMPTS), 4, SIZE // 4, SIZE // 4, generator=generator(9, 0))
    latents = denoise(plan, predict, plan.start(noise), lambda: noise, Guidance(3.0))
    pictures = vae.decode(latents.float() / vae.config.scaling_factor).clamp(-1, 1)
    return grid([p.resize((128, 128)) for p in to_pil(pictures)], 8, [p or "(no text)" for p in PROMPTS])


def main(
    work: Annotated[Path, typer.Option(help="Rendered pictures, checkpoints, sheets, results.")] = Path(
        "build/tabletop"
    ),
    init: Annotated[Path | None, typer.Option(help="A model of this kind to go on from; else from nothing.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of 32 pictures.")] = 13_600,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 7e-4,
) -> None:
    """Train the noise predictor and write the model to WORK/model; a killed run goes on where it stopped."""
    torch.manual_seed(0)
    pictures = training_pictures(work)
    vae = load_vae(work / "vae")
    folder = work / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    latents = encoded(vae, pictures, folder)
    tokenizer = load_tokenizer(work / "clip" / "tokenizer")
    anchor = load_text_encoder(work / "clip").eval().requires_grad_(False)
    anchor.set_attn_implementation("eager")  # the flash kernel's backward is slow in bfloat16 on a CPU
    model = TextConditioned(UNet2DConditionModel(CONFIG), copy.deepcopy(anchor).requires_grad_(True))
    if init is not None:
        earlier = load_folder(init, dtype=torch.float32)
        model.unet.load_state_dict(earlier.unet.state_dict())
        model.text_encoder.load_state_dict(earlier.text_encoder.state_dict())
    schedule = NoiseSchedule(prediction_type="v_prediction")
    alphas = schedule.alphas_cumprod.float()
    length = anchor.config.max_position_embeddings

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = generator(6, step)
        index = draw_pictures(pictures.scenes.count, rng)
        x0 = latents[index].float()
        noise = torch.randn(x0.shape, generator=rng)
        texts = captions(pictures.scenes[index], seed=int(torch.randint(2**31, (), generator=rng)))
        dropped = torch.rand(BATCH, generator=rng) < DROPOUT
        texts = ["" if drop else text for drop, text in zip(dropped, texts, strict=True)]
        ids = tokenize(tokenizer, texts, length)
        t = draw_timesteps(schedule.num_train_timesteps, rng)
        x_t, target = sdkernels.add_noise(x0, noise, t, alphas, "v_prediction")
        with autocast():
            prediction, summary = model(x_t, t, ids)
            with torch.no_grad():
                wanted = pooled(anchor(input_ids=ids).last_hidden_state, ids, int(ids[0, -1]))
        error = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        held = F.mse_loss(summary.float(), wanted.float())
        mse = (loss_weight(schedule, t) * error).mean()
        return mse + ANCHOR * held, {"mse": error.mean().item(), "anchor": held.item()}

    def with_average(average: MovingAverage | None) -> TextConditioned:
        smooth = copy.deepcopy(model).eval()
        if average is not None:
            average.copy_to(smooth)
        return smooth

    def sample(step: int, average: MovingAverage | None) -> None:
        sample_sheet(with_average(average), vae, tokenizer, schedule).save(folder / f"sheet-{step:06d}.png")

    recipe = Recipe(steps=steps, learning_rate=learning_rate, warmup=300, decay_from=0.4, ema_decay=0.999)
    average = train(
        model,
        loss,
        recipe,
        folder,
        on_sample=sample,
        rates=lambda name: 0.5 if name.startswith("text_encoder") else 1.0,
    )
    smooth = with_average(average)
    save_folder(
        Components(smooth.unet, vae, smooth.text_encoder, tokenizer, SCHEDULER), work / "model", dtype=torch.float16
    )
    shutil.copytree(work / "clip" / "image_encoder", work / "model" / "image_encoder", dirs_exist_ok=True)


if __name__ == "__main__":
    typer.run(main)
