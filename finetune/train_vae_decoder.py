"""Fine-tune the VAE's decoder: ``python -m finetune.train_vae_decoder --data pictures --output runs/mine``.

Writes OUTPUT/vae.safetensors, which A1111, ComfyUI, diffusers and ``sdkit --vae`` read, and beside it the same as
`finetune.train_lora`: the sheets show pictures above what the VAE makes of them, the report says how much better it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL import Image
from torch import Tensor

from finetune.data.batches import TrainingData
from finetune.data.buckets import prepare
from finetune.data.cache import LatentCache, View, weights_hash
from finetune.data.config import DataConfig, Latents
from finetune.data.folders import check_output, read_pictures
from finetune.options import check_options
from finetune.recipe.command_line import command, to_toml
from finetune.recipe.facts import data_facts
from finetune.recipe.report import report, summary, was_finished, write_beginnings
from finetune.recipe.run import WITHOUT_SHEETS, fill_caches
from finetune.training.config import TrainConfig
from finetune.training.facts import content, options_as_facts
from finetune.training.gradient_checkpointing import checkpoint_activations
from finetune.training.loop import make_accelerator, train
from finetune.training.memory import estimate_memory, peak_memory, saved_bytes
from finetune.vae_decoder.loss import DecoderBatch, DecoderLoss, DecoderLossConfig
from finetune.vae_decoder.metrics import load_inception, measure
from sdkit.checkpoints import loading
from sdkit.checks import Range, expect, refuse_unread
from sdkit.errors import ConfigError
from sdkit.images.pixels import open_image, to_pil
from sdkit.images.sheet import contact_sheet
from sdkit.networks.layers import ResnetBlock2D
from sdkit.networks.vae import AutoencoderKL
from sdkit.networks.vae_blocks import AttentionBlock

if TYPE_CHECKING:
    from accelerate import Accelerator

RECOMPUTED = (ResnetBlock2D, AttentionBlock)  # under gradient checkpointing
FILE = "vae.safetensors"


@dataclass(frozen=True)
class DecoderModel:
    """The model whose VAE is trained, and where the results go."""

    model: Annotated[str, "Ships with sdkit, a diffusers folder or a single file; a whole model or a VAE."] = "tabletop"
    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/vae")
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass: less memory, slower."] = False

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class DecoderData:
    """Where the pictures are and how they are cut; they need no captions."""

    data: Annotated[Path, "Folder of pictures."]
    validation_data: Annotated[
        Path | None, "Folder of pictures for sheets and measures (default: the first 64 that are trained on)."
    ] = None
    resolution: Annotated[
        int | None, "Pixels: a picture's area is at most its square (default: the VAE's).", Range(1)
    ] = None
    folder_repeats: Annotated[bool, "A folder like 10_name: 10 times an epoch."] = True
    aspect_buckets: Annotated[bool, "Keep each picture's aspect ratio, about; else all become squares."] = True
    random_crops: Annotated[int, "Crop each picture at so many random places; 0: in the middle.", Range(0)] = 0
    random_flip: Annotated[bool, "Mirror half of the pictures."] = False
    latents: Latents = "mean"
    train_batch_size: Annotated[int, "Pictures a process and micro-batch.", Range(1)] = 8
    cache_dir: Annotated[Path | None, "Encoded pictures (default: OUTPUT/cache)."] = None

    def __post_init__(self) -> None:
        check_options(self)

    def config(self) -> DataConfig:
        """These settings as those of any training, each picture with an empty caption."""
        return DataConfig(
            self.data,
            folder_repeats=self.folder_repeats,
            resolution=self.resolution,
            aspect_buckets=self.aspect_buckets,
            random_crops=self.random_crops,
            random_flip=self.random_flip,
            latents=self.latents,
            train_batch_size=self.train_batch_size,
        )


@dataclass(frozen=True)
class DecoderTraining(TrainConfig):
    """The loop's settings, with the published decoders' average of the weights."""

    ema_decay: Annotated[
        float | None, "Show and write a moving average of the weights; 0: the weights.", Range(0, 1, below=True)
    ] = 0.999
    max_grad_norm: Annotated[
        float,
        "Scale down gradients whose norm is larger; 0: never. Not with a discriminator, whose gradients count.",
        Range(0),
    ] = 0.0


@dataclass(frozen=True)
class DecoderSamples:
    """How the decoder is shown and measured."""

    num_validation_images: Annotated[int, "Pictures on a sheet; 0: no sheets.", Range(0)] = 4
    inception_weights: Annotated[Path | None, "StyleGAN2-ADA's inception-2015-12-05.pt, for rFID."] = None

    def __post_init__(self) -> None:
        check_options(self)


def main(
    model: DecoderModel,
    data_config: DecoderData,
    loss_config: DecoderLossConfig,
    config: DecoderTraining,
    sampling: DecoderSamples,
) -> None:
    """Fine-tune the VAE's decoder on a folder of pictures; the encoder stays as it is."""
    accelerator = make_accelerator(config)
    check(accelerator, loss_config, config, sampling)
    check_output(model.output, data_config.config())

    vae = loading.load_vae(model.model, dtype=torch.float32).to(accelerator.device)
    data = training_data(vae, data_config.config(), config.seed, accelerator.process_index, accelerator.num_processes)
    shown = validation_views(vae, data_config)
    if data_config.validation_data is not None:
        check_not_trained_on(shown, data)
    weights = weights_hash(vae)

    torch.manual_seed(config.seed)
    loss = DecoderLoss(vae, loss_config)
    figures = measures(loss, shown, sampling)

    latents = LatentCache(vae, data_config.cache_dir or model.output / "cache")
    fill_caches(latents, None, data, accelerator)

    said = about(loss, data, config, model, accelerator.num_processes)
    before: dict[str, float] = {}
    if accelerator.is_main_process:
        print(said, flush=True)
        before = figures(vae)
    if model.gradient_checkpointing:
        checkpoint_activations(vae.decoder, RECOMPUTED)

    every = to_toml(model, data_config, loss_config, config, sampling)
    discriminator_rate = loss_config.discriminator_lr or config.learning_rate
    started = time.monotonic()
    trained = train(
        accelerator,
        loss,
        partial(batch, data, latents, config.gradient_accumulation_steps),
        config,
        model.output,
        begin=partial(write_beginnings, model.output, every, data),
        facts=data_facts(data) | {"the VAE": content(weights)} | loss_facts(loss),
        highest_rate=lambda name: discriminator_rate if name.startswith("discriminator.") else config.learning_rate,
        export=lambda folder: loading.save(vae, folder / FILE),
        validate=partial(sample_sheet, vae, shown[: sampling.num_validation_images])
        if sampling.num_validation_images
        else None,
    )

    if accelerator.is_main_process and not was_finished(model.output, trained, (FILE,)):
        seconds = time.monotonic() - started
        report(model.output, said, trained.history, seconds, peak_memory(accelerator.device), (FILE,))
        after = figures(loading.load_vae(model.output / FILE).to(accelerator.device))
        what = "trained on" if data_config.validation_data is None else "not trained on"
        add_measures(model.output / "report.md", f"{len(shown)} pictures {what}", before, after)


def check(
    accelerator: Accelerator, loss_config: DecoderLossConfig, config: TrainConfig, sampling: DecoderSamples
) -> None:
    """Raise ConfigError for settings that do not go together."""
    if accelerator.is_fsdp2:
        raise ConfigError("accelerate: a VAE needs no sharding; expected no, multi-CPU or multi-GPU, found FSDP")

    expect(
        config.learning_rate > 0, "learning_rate", "a number above 0, for the decoder to train", config.learning_rate
    )
    if not sampling.num_validation_images:
        refuse_unread("validation_steps", config.validation_steps, None, WITHOUT_SHEETS)

    if loss_config.discriminator_weight and config.max_grad_norm:
        raise ConfigError(
            "max_grad_norm: expected 0 with a discriminator, whose gradients would scale down the decoder's, "
            f"found {config.max_grad_norm}"
        )


def training_data(vae: AutoencoderKL, config: DataConfig, seed: int, rank: int = 0, world: int = 1) -> TrainingData:
    """The pictures in buckets that suit the VAE. Raises ConfigError that lists all that is wrong with them."""
    own = vae.config.sample_size
    resolution = config.resolution or (own if isinstance(own, int) else max(own))
    found = read_pictures(config, captioned=False)
    return TrainingData(found.pictures, config, resolution, vae.config.factor, seed, rank, world, found.left_out)


def validation_views(vae: AutoencoderKL, config: DecoderData) -> list[View]:
    """The pictures for sheets and measures, cut in the middle."""
    whole = replace(config, data=config.validation_data or config.data, random_crops=0, random_flip=False)
    views = training_data(vae, whole.config(), seed=0).views()
    return views[:64] if config.validation_data is None else views


def check_not_trained_on(views: Sequence[View], data: TrainingData) -> None:
    """Raise ConfigError for pictures that are among those of the training too, by their content."""
    trained = {picture.digest: picture.path for picture in data.pictures}
    for picture, *_ in views:
        if picture.digest in trained:
            found = f"{picture.path}, which is {trained[picture.digest]}"
            raise ConfigError(f"validation_data: expected pictures that are not trained on, found {found}")


def pixels(view: View) -> Tensor:
    """The picture of a view, [1, 3, H, W] in [-1, 1]."""
    picture, bucket, crop, flip = view
    return prepare(open_image(picture.path), bucket, crop, flip, picture.digest)


def batch(data: TrainingData, latents: LatentCache, accumulation: int, n: int) -> DecoderBatch:
    """Micro-batch ``n``: latents, and the pictures that they are of."""
    pictures = data.batch(n, lambda view, generator: pixels(view)[0])
    return DecoderBatch(data.batch(n, latents).latents, pictures.latents, n // accumulation, pictures.weights)


def loss_facts(loss: DecoderLoss) -> dict[str, Any]:
    """The facts that the loss depends on, wherever its files lie."""
    options = options_as_facts(loss.config, without=("lpips_vgg", "lpips_weights"))
    return options | {"LPIPS": None if loss.lpips is None else content(weights_hash(loss.lpips))}


def measures(
    loss: DecoderLoss, views: Sequence[View], sampling: DecoderSamples
) -> Callable[[AutoencoderKL], dict[str, float]]:
    """A function that measures a VAE on the pictures."""
    path = sampling.inception_weights
    inception = None if path is None else load_inception(path, loss.vae.device)
    return lambda vae: measure(vae, map(pixels, views), loss.lpips, inception)


def sample_sheet(vae: AutoencoderKL, views: Sequence[View]) -> Image.Image:
    """The pictures, and below each what the VAE makes of it."""
    originals = [pixels(view).to(vae.device) for view in views]
    both = [*originals, *(vae(x) for x in originals)]
    return contact_sheet([image for x in both for image in to_pil(x)], len(views))


def about(loss: DecoderLoss, data: TrainingData, config: TrainConfig, model: DecoderModel, world: int) -> str:
    """The run's summary."""
    trained = [p for p in loss.vae.parameters() if p.requires_grad]
    activations = activation_bytes(loss, data, RECOMPUTED if model.gradient_checkpointing else ())
    memory = estimate_memory([loss], activations, config)

    perceptual = "1 - multi-scale SSIM" if loss.lpips is None else "LPIPS"
    lines = {
        "model": f"{model.model}, its VAE's decoder",
        "loss": f"{loss.config.reconstruction} + {loss.config.perceptual_weight:g} ({perceptual})"
        + (f", discriminator {loss.config.discriminator_weight:g}" if loss.discriminator else ""),
    }
    return summary(lines, trained, data, config, memory, model.output, world)


def activation_bytes(loss: DecoderLoss, data: TrainingData, recomputed: tuple[type[torch.nn.Module], ...]) -> int:
    """Bytes that a batch of the largest pictures keeps for its backward pass."""
    config, count = loss.vae.config, data.config.train_batch_size
    width, height = max(data.buckets, key=lambda bucket: bucket[0] * bucket[1])

    def forward() -> object:
        latents = torch.empty(count, config.latent_channels, height // config.factor, width // config.factor)
        return loss(DecoderBatch(latents, torch.empty(count, 3, height, width), loss.config.discriminator_start))

    return saved_bytes(loss, forward, recomputed)


def add_measures(report: Path, pictures: str, before: dict[str, float], after: dict[str, float]) -> None:
    """Put a table of the figures at the report's end, and print it."""
    rows = [f"| {name} | {before[name]:.4g} | {after[name]:.4g} |" for name in before]
    table = "\n".join([f"| {pictures} | before | after |", "|---|---|---|", *rows])
    with report.open("a", encoding="utf-8") as file:
        file.write(f"\n## Measures\n\n{table}\n")
    print(table)


app = command(
    main,
    {
        "Model": DecoderModel, "Data": DecoderData, "Loss": DecoderLossConfig, "Training": DecoderTraining,
        "Samples": DecoderSamples,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_vae_decoder")
