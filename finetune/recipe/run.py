"""A run on pictures and captions, whatever learns from them: the common course of the training scripts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data.batches import Batch, TrainingData
from finetune.data.cache import LatentCache, TextCache, weights_hash
from finetune.data.config import DataConfig
from finetune.data.folders import check_apart, check_output, read_pictures
from finetune.data.walking import walk
from finetune.options import check_options, refuse_unread_options
from finetune.recipe.command_line import to_toml
from finetune.recipe.diffusion_loss import DiffusionLoss, LossConfig
from finetune.recipe.facts import data_facts, schedule_facts
from finetune.recipe.report import SIDE, report, summary, was_finished, write_beginnings
from finetune.training.config import TrainConfig
from finetune.training.facts import content, options_as_facts
from finetune.training.gradient_checkpointing import checkpoint_activations
from finetune.training.loop import make_accelerator, train
from finetune.training.memory import estimate_memory, peak_memory, saved_bytes
from sdkit.checks import Range, refuse_unread
from sdkit.errors import ConfigError
from sdkit.files import replacing
from sdkit.images.sheet import contact_sheet, enlarged
from sdkit.networks.attention import Transformer2DModel
from sdkit.networks.layers import ResnetBlock2D
from sdkit.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NETWORKS = ("unet", "vae", "text_encoder")
SEEN = 64  # pictures that a process shows to ``Student.prepare``
RECOMPUTED = (ResnetBlock2D, Transformer2DModel)  # under gradient checkpointing
WITHOUT_SHEETS = "without sample sheets (num_validation_images 0)"


@dataclass(frozen=True)
class ModelConfig:
    """The model that is adapted, and where the results go."""

    model: Annotated[str, "A model that ships with sdkit, a diffusers folder or a single file."] = "tabletop"
    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/run")
    clip_skip: Annotated[int, "Last layers of the text encoder that are left out (A1111's number - 1).", Range(0)] = 0
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass: less memory, slower."] = False

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class SampleConfig:
    """The pictures that show what was learnt."""

    validation_prompt: Annotated[tuple[str, ...], "A prompt of the sample sheets (default: some captions)."] = ()
    num_validation_images: Annotated[
        int, "How many captions are taken where no prompt is given; 0: no sheets.", Range(0)
    ] = 4
    num_inference_steps: Annotated[int, "Sampling steps.", Range(1)] = 20
    guidance_scale: Annotated[float, "How hard the prompt pulls.", Range(0)] = 5.0

    def __post_init__(self) -> None:
        check_options(self)
        if self.validation_prompt:
            refuse_unread_options(self, ("num_validation_images",), "beside validation_prompt")
        if not self.shows:
            refuse_unread_options(self, ("num_inference_steps", "guidance_scale"), WITHOUT_SHEETS)

    @property
    def shows(self) -> bool:
        """Whether there are sample sheets."""
        return bool(self.validation_prompt) or self.num_validation_images > 0


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
    highest_rate: Callable[[str], float] | None = None
    """A parameter's highest learning rate, by the name that it has in `DiffusionLoss`; None: the settings'."""
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
    last_caption: str | None = None,
) -> None:
    """Load the model, ``adapt`` it as ``options`` say (a dataclass), train what it returns, and write all about it.

    dtypes: of the networks, by accelerate's mixed_precision. last_caption: of pictures that would have none, not even
    their folder's name. Raises ConfigError and CheckpointError before it starts.
    """
    if loss_config.prior_target == "base" and data_config.class_data is None:
        raise ConfigError("prior_target: expected a class_data with base, the pictures that it is asked about")

    if not sampling.shows:
        refuse_unread("validation_steps", config.validation_steps, None, WITHOUT_SHEETS)

    check_output(model.output, data_config)

    accelerator = make_accelerator(config)
    if loss_config.prior_target == "base" and accelerator.is_fsdp2:  # which waits until all processes ask
        raise ConfigError("prior_target: expected picture under FSDP, found base")

    # Without graphs, whose memory is the training's.
    sd = StableDiffusion.load(model.model, accelerator.device, dtypes[accelerator.mixed_precision], graphs=False)
    sd.words = None  # it is to learn others
    with accelerator.main_process_first():
        make_class_pictures(sd, data_config)
    data = training_data(sd, data_config, config.seed, accelerator, last_caption)

    facts = data_facts(data) | options_as_facts(options) | options_as_facts(loss_config) | schedule_facts(sd.schedule)
    facts["clip_skip"] = model.clip_skip
    facts |= {f"the model's {name}": content(weights_hash(getattr(sd, name))) for name in NETWORKS}

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
    if model.gradient_checkpointing:
        checkpoint_activations(sd.unet, RECOMPUTED)

    every = to_toml(model, options, data_config, loss_config, config, sampling)
    prompts = sampling.validation_prompt or tuple(data.captions()[: sampling.num_validation_images])
    started = time.monotonic()
    trained = train(
        accelerator,
        loss,
        batches,
        config,
        model.output,
        facts=facts,
        begin=partial(write_beginnings, model.output, every, data),
        highest_rate=student.highest_rate,
        export=student.export,
        validate=partial(sample_sheet, sd, student, prompts, sampling, model.clip_skip) if prompts else None,
    )

    if accelerator.is_main_process and not was_finished(model.output, trained, student.files):
        seconds, peak = time.monotonic() - started, peak_memory(accelerator.device)
        learnt_from = [picture for picture in data.pictures if not picture.is_prior]
        report(model.output, about, trained.history, seconds, peak, student.files, learnt_from)


def make_class_pictures(sd: StableDiffusion, config: DataConfig) -> None:
    """Draw pictures of the class prompt until the class folder holds as many as were asked for; none is replaced."""
    if config.class_data is None or not config.num_class_images:
        return

    check_apart(config.data, config.class_data)
    config.class_data.mkdir(parents=True, exist_ok=True)
    missing = config.num_class_images - len(walk(config.class_data).pictures)
    files = ((n, config.class_data / f"class-{n:05d}.png") for n in count())
    free = ((n, file) for n, file in files if not os.path.lexists(file))
    for n, file in tqdm(list(islice(free, max(0, missing))), desc="class pictures"):
        picture = sd.text_to_image(config.class_prompt, seed=n, progress=False).images[0]
        with replacing(file) as temporary:
            picture.save(temporary, "PNG")


def training_data(
    sd: StableDiffusion, config: DataConfig, seed: int, accelerator: Accelerator, last_caption: str | None = None
) -> TrainingData:
    """The pictures in buckets that suit the model. Raises ConfigError that lists all that is wrong with them.

    last_caption: of pictures that would have none, not even their folder's name.
    """
    factor, own = sd.vae.config.factor, sd.unet.config.sample_size or 64
    resolution = config.resolution or factor * (own if isinstance(own, int) else max(own))
    step = factor * 2 ** (len(sd.unet.config.block_out_channels) - 1)  # so that every level halves evenly
    found, rank, world = read_pictures(config, last_caption), accelerator.process_index, accelerator.num_processes
    return TrainingData(found.pictures, config, resolution, step, seed, rank, world, found.left_out)


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
    return contact_sheet([enlarged(picture, SIDE) for picture in pictures], 4, prompts)


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
        memory = estimate_memory([everything], activations, config)

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
