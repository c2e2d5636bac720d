"""Train a UNet on latents and captions: ``python -m finetune.pretrain.noise_predictor``; on tabletop pictures, or on
your own.

It predicts v, epsilon or the picture, on a schedule of one's choice. The loss has min-SNR weights (arXiv 2303.09556,
gamma 5); those of v and of the picture never fall below a floor: what stands where is decided at high noise, where the
plain weight all but vanishes. Captions are dropped one time in ten so that guidance works, or always; the weights'
moving average is kept. The text encoder goes on learning with the UNet, its pooled output held to what contrastive
training made it, so that the image encoder still fits.

The end of the text and the padding behind it have seen every word, so a network may look there alone, and no word would
have a place in the picture. So half of the steps have no padding, one token in ten is missing, and where it is known
where objects are, their words are taught to be looked at from there (`finetune.pretrain.grounding`).

Ends by writing the whole model. On several cores processes of one thread each are faster than one of several threads:
``ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m finetune.pretrain.noise_predictor``.
"""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import sdkernels
from finetune.pretrain.clip import load_text_encoder, tokenize
from finetune.pretrain.grounding import Places, attention_of, find_places, grounding_loss, of_samples
from finetune.pretrain.own_pictures import TrainingPictures, image_folder
from finetune.pretrain.recipe import Recipe, autocast, is_main_process, main_process_first, train_on_the_cpu
from finetune.pretrain.world.pictures import SCENES, SCENES_HELP, SIZE, Pictures, training_pictures
from finetune.seeds import step_generator
from finetune.training.averaging import in_place_of
from finetune.training.min_snr import min_snr_weight
from sdkit.checkpoints import loading
from sdkit.checkpoints.components import Components
from sdkit.files import replacing, write_json
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet, enlarged
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
    sample_size=SIZE // 8,  # written down alone: it takes any size
    block_out_channels=(80, 160),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,  # heads, as in diffusers' configurations: of width 40 and 80, like Stable Diffusion 1's
    norm_num_groups=16,
)
SCHEDULER: dict[str, Any] = {  # ddpm: its fresh noise mends early mistakes, such as a second object
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False, "variance_type": "fixed_small",
}  # fmt: skip
BATCH = 32
RUN, SHEET_RUN = 6, 9  # numbers for `step_generator`: of the run, and of the sheets' noise
QUIET = 0.35  # of the timesteps: where there is more noise it is decided what stands where
DROPOUT, TOKEN_DROPOUT = 0.1, 0.1  # share of captions, and of single tokens, that are left out
UNPADDED = 0.5  # share of the steps
GAMMA = 5.0
FLOOR = 0.4  # least weight of a timestep
COUNTS = (0.4, 0.48, 0.12)  # share of pictures with one, two and three objects
ANCHOR, GROUNDING = 1.0, 0.02  # weights of what holds the text encoder, and of where words are looked at
UNTOLD = "(no text)"
PROMPTS = (
    "a red sphere", "a blue cube", "a green torus", "a yellow cylinder", "a purple cone", "a white sphere",
    "a large shiny orange cube on a wooden table", "a small matte cyan ball on a black table",
    "a red cube and a blue sphere", "a green cone and a yellow torus", "a white cylinder behind a purple sphere",
    "a cyan torus to the left of a red cone", "an orange sphere in front of a green cylinder",
    "a small blue cube to the right of a large yellow cone", "a blue sphere on a grey table", "",
)  # fmt: skip


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: TrainingPictures, folder: Path) -> Tensor:
    """The posterior's mean of every picture, scaled, float16 [N, 4, h, w]; kept on disk, under the encoder's hash."""
    weights = b"".join(value.numpy().tobytes() for value in vae.encoder.state_dict().values())
    key = hashlib.sha256(weights + f"{vae.config.scaling_factor} {len(pictures)}".encode()).hexdigest()[:12]

    file = folder / f"latents-{key}.pt"
    if not file.exists():
        parts: list[Tensor] = []
        for index in tqdm(torch.arange(len(pictures)).split(64), desc="encode", mininterval=5.0):
            parts.append(scaled_latents(vae, pictures.pixels(index)).half())
        with replacing(file) as temporary:
            torch.save(torch.cat(parts), temporary)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def scaled_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """The posterior's mean, scaled, of pictures [B, 3, H, W] in [-1, 1]."""
    with autocast():
        mean = vae.encode(pixels).mode()
    return mean.float() * vae.config.scaling_factor


class Batch(NamedTuple):
    """Clean latents [BATCH, 4, h, w], the noise that is added, at timesteps t [BATCH]; token ids [BATCH, N], which of
    the tokens the UNet sees, bool [BATCH, N], and where their objects are, if that is known."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    ids: Tensor
    seen: Tensor
    places: Places | None = None


class Prediction(NamedTuple):
    """A batch's loss, a scalar; the text encoder's last hidden state [B, N, D]; the probabilities of `attention_of`,
    none for a batch without places."""

    loss: Tensor
    hidden: Tensor
    probabilities: list[Tensor]


class PredictorLoss(nn.Module):
    """forward(batch) -> the prediction's weighted error + how far the text's pooled output is from that of ``anchor`` +
    how much words are looked at from elsewhere than their objects.

    ``unet`` and ``text_encoder`` are trained together; ``anchor`` is the text encoder before that, frozen.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        anchor: CLIPTextModel,
        schedule: NoiseSchedule,
    ) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule
        self.text_encoder: Any = text_encoder
        self.anchor: Any = anchor.requires_grad_(False)
        self.alphas = schedule.alphas_cumprod.float()

    def forward(self, batch: Batch) -> Tensor:
        return self.predict(batch).loss

    def predict(self, batch: Batch) -> Prediction:
        """The loss, and what the networks had to say on the way."""
        kind = self.schedule.prediction_type
        x_t, target = sdkernels.add_noise(batch.x0, batch.noise, batch.t, self.alphas, kind)
        ids, end = batch.ids, int(batch.ids[0, -1])

        with autocast():
            hidden = self.text_encoder(input_ids=ids).last_hidden_state
            context = hidden * batch.seen[..., None].to(hidden.dtype)
            with nullcontext([]) if batch.places is None else attention_of(self.unet) as probabilities:
                prediction, summary = self.unet(x_t, batch.t, context), pooled(hidden, ids, end)
            with torch.no_grad():
                wanted = pooled(self.anchor(input_ids=ids).last_hidden_state, ids, end)

        error = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        loss = (loss_weight(self.schedule, batch.t) * error).mean()
        loss = loss + ANCHOR * F.mse_loss(summary.float(), wanted.float())
        if batch.places is not None:  # in noise alone nobody can know where objects are
            loss = loss + GROUNDING * grounding_loss(probabilities, batch.places, self.alphas[batch.t])
        return Prediction(loss, hidden, probabilities)


def loss_weight(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Min-SNR weights of the squared error at timesteps t; where there is more noise than picture, never below FLOOR as
    weights of v's error. Epsilon has no floor: its error says less and less of the picture there."""
    weight = min_snr_weight(schedule, t, GAMMA, torch.float32)
    snr = schedule.snr(t)
    if schedule.prediction_type == "epsilon":
        return weight
    floor = FLOOR if schedule.prediction_type == "v_prediction" else FLOOR * (snr + 1).float()  # x0's error is v's
    return torch.where(snr < 1, torch.maximum(weight, torch.as_tensor(floor)), weight)


@dataclass(frozen=True)
class Draws:
    """The batches of a run. ``latents`` are those of the pictures; ``length`` is that of the token ids, with padding;
    ``dropout`` is the share of captions that are left out, ``counts`` are those of `draw_pictures`."""

    pictures: TrainingPictures
    latents: Tensor
    tokenizer: CLIPTokenizer
    length: int
    dropout: float = DROPOUT
    counts: tuple[float, float, float] = COUNTS

    @cached_property
    def groups(self) -> list[Tensor]:
        """The pictures by how many objects they show."""
        return by_count(self.pictures.count)

    def __call__(self, step: int) -> Batch:
        """Step ``step``'s batch."""
        rng = step_generator(RUN, step)
        index = draw_pictures(self.groups, self.counts, rng)
        x0 = self.latents[index].float()
        noise = torch.randn(x0.shape, generator=rng)

        texts = self.pictures.captions(index, seed=int(torch.randint(2**31, (), generator=rng)))
        dropped = torch.rand(BATCH, generator=rng) < self.dropout
        texts = ["" if drop else text for drop, text in zip(dropped, texts, strict=True)]
        padded = bool(torch.rand((), generator=rng) >= UNPADDED)
        ids = tokenize(self.tokenizer, texts, self.length if padded else None)
        seen = torch.rand(ids.shape, generator=rng) >= TOKEN_DROPOUT
        places: Places | None = None
        if isinstance(self.pictures, Pictures):
            scenes, cover = self.pictures.scenes[index], self.pictures.cover[index]
            places = find_places(self.tokenizer, texts, scenes, cover, seen)
        return Batch(x0, noise, draw_timesteps(SCHEDULER["num_train_timesteps"], rng), ids, seen, places)


def rows_of(batch: Batch, own: Tensor) -> Batch:
    """Some samples of a batch, int64 [M]."""
    places = None if batch.places is None else of_samples(batch.places, own)
    return Batch(batch.x0[own], batch.noise[own], batch.t[own], batch.ids[own], batch.seen[own], places)


def share(batch: Batch, process: int, processes: int) -> Batch:
    """What one of several processes trains on: every ``processes``-th sample."""
    return rows_of(batch, torch.arange(process, len(batch.t), processes))


def by_count(count: Tensor) -> list[Tensor]:
    """Indices of the pictures with one, two and three objects; ``count`` [N] is how many objects each shows."""
    return [(count == number).nonzero()[:, 0] for number in (1, 2, 3)]


def draw_pictures(groups: Sequence[Tensor], counts: Sequence[float], rng: torch.Generator) -> Tensor:
    """Indices [BATCH] of pictures from the groups of `by_count`, as many of each as ``counts`` says, if it has any."""
    weights = torch.tensor(counts) * torch.tensor([len(group) > 0 for group in groups])
    kinds = torch.multinomial(weights, BATCH, replacement=True, generator=rng).tolist()
    within = torch.rand(BATCH, generator=rng).tolist()
    return torch.stack(
        [groups[kind][int(place * len(groups[kind]))] for kind, place in zip(kinds, within, strict=True)]
    )


def draw_timesteps(total: int, rng: torch.Generator) -> Tensor:
    """Timesteps [BATCH] in random order, QUIET of them even over the first half, the rest over the second."""
    places = (torch.randperm(BATCH, generator=rng) + torch.rand(BATCH, generator=rng)) / BATCH
    places = torch.where(places < QUIET, places / QUIET, 1 + (places - QUIET) / (1 - QUIET)) / 2
    return (places * total).long().clamp(max=total - 1)


@torch.no_grad()
def sample_sheet(
    loss: PredictorLoss, vae: AutoencoderKL, tokenizer: CLIPTokenizer, prompts: Sequence[str], side: int
) -> Image.Image:
    """The prompts drawn on latents of ``side`` with 20 steps and guidance 3, as a sheet with captions."""
    plan = make_plan("dpmpp_2m", loss.schedule, 20, timestep_spacing="trailing")
    ids = tokenize(tokenizer, [*prompts, *[""] * len(prompts)], loss.text_encoder.config.max_position_embeddings)
    context = loss.unet.context_kv(loss.text_encoder(input_ids=ids).last_hidden_state)

    def predict(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        t = plan.timesteps[k].float()
        cond, uncond = loss.unet(torch.cat([x, x]).float(), t, None, context_kv=context).chunk(2)
        return uncond, cond

    noise = torch.randn(len(prompts), 4, side, side, generator=step_generator(SHEET_RUN, 0))
    latents = denoise(plan, predict, plan.start(noise), lambda: noise, Guidance(3.0))
    pictures = vae.decode(latents.float() / vae.config.scaling_factor).clamp(-1, 1)
    return contact_sheet([enlarged(p, 128) for p in to_pil(pictures)], 8, [p or UNTOLD for p in prompts])


def networks(work: Path, init: Path | None, schedule: NoiseSchedule, side: int) -> PredictorLoss:
    """A new UNet for latents of ``side`` with the text encoder of `clip`, or both as they are in the model ``init``."""
    anchor = load_text_encoder(work / "clip").eval()
    anchor.set_attn_implementation("eager")  # the flash kernel's backward is slow in bfloat16 on a CPU
    config = replace(CONFIG, sample_size=side, cross_attention_dim=anchor.config.hidden_size)
    unet, text_encoder = UNet2DConditionModel(config), copy.deepcopy(anchor)

    if init is not None:
        earlier = loading.load(init, dtype=torch.float32)
        unet.load_state_dict(earlier.unet.state_dict())
        text_encoder.load_state_dict(earlier.text_encoder.state_dict())
    return PredictorLoss(unet, text_encoder, anchor, schedule)


def words_of(texts: Sequence[str]) -> list[str]:
    """The different words of texts, in lower case, in their order."""
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})


def scheduler_config(schedule: NoiseSchedule) -> dict[str, Any]:
    """What the model's folder says of its schedule."""
    names = ("beta_schedule", "prediction_type", "rescale_betas_zero_snr")
    return SCHEDULER | {name: getattr(schedule, name) for name in names}


def main(
    work: Annotated[Path, typer.Option(help="Rendered pictures, checkpoints, sheets, results.")] = Path(
        "build/tabletop"
    ),
    data: Annotated[Path | None, typer.Option(help="A folder of pictures with captions, not tabletop renders.")] = None,
    scenes: Annotated[int, typer.Option(help=SCENES_HELP, min=64)] = SCENES,
    size: Annotated[int, typer.Option(help="Width and height of the pictures.", min=16)] = SIZE,
    init: Annotated[Path | None, typer.Option(help="A model of this kind to go on from; else from nothing.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of 32 pictures.", min=1)] = 11_000,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 7e-4,
    prediction: Annotated[str, typer.Option(help="What the network predicts: v_prediction, epsilon or sample.")] = (
        "v_prediction"
    ),
    beta_schedule: Annotated[str, typer.Option(help="scaled_linear, linear or squaredcos_cap_v2.")] = "scaled_linear",
    zero_terminal_snr: Annotated[bool, typer.Option(help="The last timestep is noise alone.")] = False,
    unconditional: Annotated[bool, typer.Option(help="All captions are left out.")] = False,
) -> None:
    """Train the noise predictor and write the model to WORK/model; a killed run goes on where it stopped."""
    if zero_terminal_snr and prediction == "epsilon":
        raise typer.BadParameter("--zero-terminal-snr: of noise alone epsilon says nothing; predict v or the sample")
    if data is not None and scenes != SCENES:
        raise typer.BadParameter("--scenes: does nothing with --data")
    schedule = NoiseSchedule(
        prediction_type=prediction, beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_terminal_snr
    )

    # Pictures as latents.
    torch.manual_seed(0)
    folder = work / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    vae = loading.load_vae(work / "vae", dtype=torch.float32)
    with main_process_first():
        pictures = training_pictures(work, scenes, scenes // 2, size) if data is None else image_folder(data, size)[0]
        latents = encoded(vae, pictures, folder)
    tokenizer = load_tokenizer(work / "clip" / "tokenizer")

    # Training.
    loss = networks(work, init, schedule, latents.shape[-1])
    prompts = PROMPTS if data is None else pictures.captions(torch.arange(min(16, len(pictures))), seed=0)
    recipe = Recipe(
        max_train_steps=steps,
        learning_rate=learning_rate,
        lr_warmup_steps=300,
        decay_from=0.4,
        ema_decay=0.999,
        optimizer="muon",
    )
    length = loss.anchor.config.max_position_embeddings
    trained = train_on_the_cpu(
        loss,
        Draws(pictures, latents, tokenizer, length, dropout=1.0 if unconditional else DROPOUT),
        recipe,
        folder,
        share=share,
        highest_rate=lambda name: learning_rate * (0.5 if name.startswith("text_encoder") else 1.0),
        validate=lambda: sample_sheet(loss, vae, tokenizer, prompts, latents.shape[-1]),
    )

    # The model.
    if not is_main_process():
        return
    with in_place_of(loss, trained.average.values) if trained.average else nullcontext():
        model = Components(loss.unet, vae, loss.text_encoder, tokenizer, scheduler_config(schedule))
        loading.save(model, work / "model", dtype=torch.float16)
    shutil.copytree(work / "clip" / "image_encoder", work / "model" / "image_encoder", dirs_exist_ok=True)
    texts = pictures.captions(torch.arange(len(pictures)), seed=0)
    write_json(work / "model" / loading.WORDS, {"words": words_of(texts)})


if __name__ == "__main__":
    typer.run(main)
