"""A run on pictures and captions, whatever learns from them: the common course of the training scripts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data.batches import Batch, DataConfig, TrainingData, read_pictures
from finetune.data.cache import LatentCache, TextCache, weights_hash
from finetune.data.folders import SUFFIXES
from finetune.recipe.command_line import to_toml
from finetune.recipe.diffusion_loss import DiffusionLoss, LossConfig
from finetune.recipe.report import report, summary
from finetune.training.config import TrainConfig
from finetune.training.gradient_checkpointing import checkpoint_activations
from finetune.training.loop import make_accelerator, train
from finetune.training.memory import estimate_memory, peak_memory, saved_bytes
from sdkit.errors import ConfigError
from sdkit.files import replacing, write_text
from sdkit.images.sheet import contact_sheet
from sdkit.networks.attention import Transformer2DModel
from sdkit.networks.layers import ResnetBlock2D
from sdkit.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SEEN = 64  # pictures that a process shows to ``Student.prepare``
RECOMPUTED = (ResnetBlock2D, Transformer2DModel)  # under gradient checkpointing


@dataclass(frozen=True)
class ModelConfig:
    """The model that is adapted, and where the results go."""

    model: Annotated[str, "A model that ships with sdkit, a diffusers folder or a single file."] = "tabletop"
    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/run")
    clip_skip: Annotated[int, "Last layers of the text encoder that are left out (A1111's number - 1)."] = 0
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass: less memory, slower."] = False


@dataclass(frozen=True)
class SampleConfig:
    """The pictures that show what was learnt."""

    validation_prompt: Annotated[tuple[str, ...], "A prompt of the sample sheets (default: some captions)."] = ()
    num_validation_images: Annotated[int, "How many captions are taken where no prompt is given; 0: no sheets."] = 4
    num_inference_steps: Annotated[int, "Sampling steps."] = 20
    guidance_scale: Annotated[float, "How hard the prompt pulls."] = 5.0


@dataclass(frozen=True)
class Student:
    """The part that learns. It is in the model already, in float32, and the rest of the model is frozen."""

    files: tuple[str, ...]
    """The names of what ``export`` writes; the first is the one that users want."""
    export: Callable[[Path], None]
    """Writes what was learnt so far into a folder."""
    text: Callable[[Sequence[str]], Tensor] | None = None
    """Gives captions their contexts where that is learnt; None: the text encoder's, computed once."""
    beside: nn.Module | None = None
    """A module that learns and is no part of the UNet or of ``text``."""
    prepare: Callable[[Callable[[], None], Callable[[Tensor], Tensor]], None] | None = None
    """prepare(see, total) is called before training; see() runs the model on the first batches, total(x) sums x over
    processes."""
    batch: Callable[[Batch], Batch] = lambda batch: batch
    """Applied to every batch."""
    show: Callable[[], None] = lambda: None
    """Called before sample sheets are drawn."""
    rate_factor: Callable[[str], float] = lambda name: 1.0
    """The factor on a parameter's learning rate, by the name that it has in `DiffusionLoss`."""
    base: Callable[[], AbstractContextManager[nn.Module]] | None = None
    """A block in which the model is as before training; it gives the UNet (see `DiffusionLoss`); None: none."""
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    """Lines of the summary."""


def teach(
    adapt: Callable[[StableDiffusion, TrainingData], Student],
    options: Any,
    model: ModelConfig,
    data_config: DataConfig,
    loss_config: LossConfig,
    config: TrainConfig,
    sampling: SampleConfig,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
) -> None:
    """Load the model, ``adapt`` it as ``options`` say (a dataclass), train what it returns, and write all about it.

    dtypes: of the networks, by accelerate's mixed_precision. Raises ConfigError and CheckpointError before it starts.
    """
    if loss_config.prior_target == "base" and data_config.class_data is None:
        raise ConfigError("prior_target: expected a class_data with base, the pictures that it is asked about")

    accelerator = make_accelerator(config)
    if loss_config.prior_target == "base" and accelerator.is_fsdp2:  # which waits until all processes ask
        raise ConfigError("prior_target: expected picture under FSDP, found base")

    sd = StableDiffusion.load(model.model, accelerator.device, dtypes[accelerator.mixed_precision])
    with accelerator.main_process_first():
        make_class_pictures(sd, data_config)
    data = training_data(sd, data_config, config.seed, accelerator)

    identity = {
        "data": data.fingerprint,
        "options": str(options),
        "loss": str(loss_config),
        "clip_skip": str(model.clip_skip),
    }
    identity |= {name: weights_hash(getattr(sd, name)) for name in ("unet", "vae", "text_encoder")}

    torch.manual_seed(config.seed)
    student = adapt(sd, data)

    cache = data_config.cache_dir or model.output / "cache"
    latents = LatentCache(sd.vae, cache)
    text = student.text or TextCache(sd.tokenizer, sd.text_encoder, cache, model.clip_skip)
    fill_caches(latents, text, data, accelerator)

    loss = DiffusionLoss(sd.unet, text, sd.schedule, loss_config, student.base)
    if student.beside is not None:
        loss.add_module("beside", student.beside)

    def batches(n: int) -> Batch:
        return student.batch(data.batch(n, latents))

    def see() -> None:
        for n in range(math.ceil(SEEN / data_config.train_batch_size)):
            loss(batches(n))

    if student.prepare is not None:
        student.prepare(see, lambda x: cast("Tensor", accelerator.reduce(x)))

    about = _summary(sd, loss, student, data, config, model, accelerator.num_processes)
    if accelerator.is_main_process:
        print(about, flush=True)
        model.output.mkdir(parents=True, exist_ok=True)
        write_text(model.output / "config.toml", to_toml(model, options, data_config, loss_config, config, sampling))
    if model.gradient_checkpointing:
        checkpoint_activations(sd.unet, RECOMPUTED)

    prompts = sampling.validation_prompt or tuple(data.captions()[: sampling.num_validation_images])
    started = time.monotonic()
    trained = train(
        accelerator,
        loss,
        batches,
        config,
        model.output,
        identity=identity,
        rate_factor=student.rate_factor,
        export=student.export,
        validate=partial(sample_sheet, sd, student, prompts, sampling, model.clip_skip) if prompts else None,
    )

    if accelerator.is_main_process:
        seconds, peak = time.monotonic() - started, peak_memory(accelerator.device)
        report(model.output, about, trained.history, seconds, peak, student.files)


def make_class_pictures(sd: StableDiffusion, config: DataConfig) -> None:
    """Draw pictures of the class prompt until the class folder holds as many as were asked for."""
    if config.class_data is None or not config.num_class_images:
        return

    config.class_data.mkdir(parents=True, exist_ok=True)
    there = sum(file.suffix.lower() in SUFFIXES for file in config.class_data.rglob("*"))
    for index in tqdm(range(there, config.num_class_images), desc="class pictures"):
        picture = sd.text_to_image(config.class_prompt, seed=index, progress=False).images[0]
        with replacing(config.class_data / f"class-{index:05d}.png") as temporary:
            picture.save(temporary, "PNG")


def training_data(sd: StableDiffusion, config: DataConfig, seed: int, accelerator: Accelerator) -> TrainingData:
    """The pictures in buckets that suit the model. Raises ConfigError that lists all that is wrong with them."""
    factor, own = sd.vae.config.factor, sd.unet.config.sample_size or 64
    resolution = config.resolution or factor * (own if isinstance(own, int) else max(own))
    step = factor * 2 ** (len(sd.unet.config.block_out_channels) - 1)  # so that every level halves evenly
    return TrainingData(
        read_pictures(config), config, resolution, step, seed, accelerator.process_index, accelerator.num_processes
    )


def fill_caches(latents: LatentCache, text: object, data: TrainingData, accelerator: Accelerator) -> None:
    """Encode what is not there yet: each process its share, then, where the disk is not shared, what it still lacks."""
    for share in (slice(accelerator.process_index, None, accelerator.num_processes), slice(None)):
        latents.fill(data.views(), share, accelerator.is_local_main_process)
        if isinstance(text, TextCache):
            text.fill(data.captions(), share, accelerator.is_local_main_process)
        accelerator.wait_for_everyone()


def sample_sheet(
    sd: StableDiffusion, student: Student, prompts: Sequence[str], sampling: SampleConfig, clip_skip: int
) -> Image.Image:
    """A picture of each prompt, the n-th with seed n."""
    student.show()
    pictures = [
        sd.text_to_image(
            prompt,
            seed=seed,
            num_inference_steps=sampling.num_inference_steps,
            clip_skip=clip_skip,
            guidance_scale=sampling.guidance_scale,
            prompt_weighting=False,
            progress=False,
        ).images[0]
        for seed, prompt in enumerate(prompts)
    ]
    return contact_sheet(pictures, 4, prompts)


def _summary(
    sd: StableDiffusion,
    loss: DiffusionLoss,
    student: Student,
    data: TrainingData,
    config: TrainConfig,
    model: ModelConfig,
    world: int,
) -> str:
    trained = [p for p in loss.parameters() if p.requires_grad]
    activations = _activation_bytes(sd, loss, student, data, RECOMPUTED if model.gradient_checkpointing else ())
    with nullcontext(sd.unet) if loss.base is None else loss.base() as base:
        everything = nn.ModuleList([loss, base, sd.vae, sd.text_encoder])  # counts what is in two of them once
        memory = estimate_memory([everything], activations, config.ema_decay is not None)

    networks = f"{model.model}, {str(sd.dtype).removeprefix('torch.')}, {sd.schedule.prediction_type}"
    return summary({"model": networks, **student.about}, trained, data, config, memory, model.output, world)


def _activation_bytes(
    sd: StableDiffusion, loss: nn.Module, student: Student, data: TrainingData, recomputed: tuple[type[nn.Module], ...]
) -> int:
    """Bytes that UNet and student keep for the backward pass of a batch of the largest pictures."""
    config, factor, batch = sd.unet.config, sd.vae.config.factor, data.config.train_batch_size
    width, height = (side // factor for side in max(data.buckets, key=lambda bucket: bucket[0] * bucket[1]))

    def forward() -> object:
        sample = torch.empty(batch, config.in_channels, height, width, dtype=sd.dtype)
        states, learnt = config.per_block(config.cross_attention_dim)[0], student.text is not None
        context = torch.empty(batch, 77, states, dtype=sd.dtype, requires_grad=learnt)
        return sd.unet(sample, torch.zeros(batch), context)

    return saved_bytes(loss, forward, recomputed)
