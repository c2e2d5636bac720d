"""Learn a new word: ``python -m finetune.train_textual_inversion --data pictures --token "<zorb>" --init torus``.

Writes OUTPUT/zorb.safetensors, diffusers' format, and OUTPUT/zorb.pt, that of A1111 (which calls the word by the file's
name); beside them the same as `finetune.train_lora`. The word's vectors are all that is learned: the model stays as it
is, to the bit, so there is nothing that it could forget.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL import Image
from torch import nn

from finetune.adapters import freeze
from finetune.buckets import Size
from finetune.cache import LatentCache, weights_hash
from finetune.checkpoints import saved_states
from finetune.data import Batch, DataConfig, TrainingData, describe
from finetune.loop import TrainConfig, make_accelerator, train
from finetune.losses import DiffusionLoss, LossConfig
from finetune.memory import checkpoint_activations, estimate_memory, peak_memory, saved_bytes
from finetune.options import command, to_toml
from finetune.textual_inversion import (
    LearnedWord,
    check_captions,
    check_token,
    initial_vectors,
    vocabulary_norm,
)
from finetune.train_hypernetwork import report
from finetune.train_lora import (
    DTYPES,
    RECOMPUTED,
    ModelConfig,
    SampleConfig,
    load_model,
    sample_sheet,
    training_data,
)
from sdkit.errors import ConfigError
from sdkit.pipeline import StableDiffusion
from sdkit.textual_inversion import save_textual_inversion

if TYPE_CHECKING:
    from accelerate import Accelerator

HOLE = "{}"
TEMPLATES = ("a picture of {}", "a photo of {}", "a render of {}", "a close view of {}", "here is {}", "{}")


@dataclass(frozen=True)
class InversionModel(ModelConfig):
    """What the word is learned for, and where the results go."""

    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/textual_inversion")


@dataclass(frozen=True)
class WordOptions:
    """The word, and what its vectors begin with."""

    token: Annotated[str, "The new word, as captions and prompts have it."]
    init: Annotated[str, "Words that are like it: one for each vector, or every vector begins as their mean."]
    vectors: Annotated[int, "How many vectors it stands for; each takes the place of a token in prompts."] = 1
    max_norm: Annotated[
        float | None, "Longest a vector may become, times the vocabulary's mean (1: as a real word's; default: any)."
    ] = None
    templates: Annotated[
        tuple[str, ...], "Captions of pictures without one, drawn anew each time; {} stands for the word."
    ] = TEMPLATES

    def __post_init__(self) -> None:
        check_token(self.token)
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(f"max_norm: expected a positive number, found {self.max_norm}")
        if not self.templates or any(template.count(HOLE) != 1 for template in self.templates):
            raise ConfigError(f"templates: expected {HOLE} once in each of one or more, found {list(self.templates)}")

    @property
    def files(self) -> tuple[str, str]:
        """The files' names, diffusers' and A1111's: the token without what no file system likes."""
        stem = re.sub(r"[^\w-]+", "", self.token) or "embedding"
        return f"{stem}.safetensors", f"{stem}.pt"


@dataclass(frozen=True)
class InversionTraining(TrainConfig):
    """The loop's settings, with a rate for a few vectors alone as default."""

    learning_rate: Annotated[float, "Highest learning rate."] = 2e-3


def main(
    model: InversionModel,
    options: WordOptions,
    data_config: DataConfig,
    loss_config: LossConfig,
    config: InversionTraining,
    sampling: SampleConfig,
) -> None:
    """Learn the vectors of a new word (textual inversion) from a folder of pictures of what it means."""
    accelerator = make_accelerator(config)
    check_data(data_config)
    sd = load_model(model.model, accelerator.device, DTYPES[accelerator.mixed_precision])
    uncaptioned = replace(data_config, instance_prompt=data_config.instance_prompt or options.token)
    data = training_data(sd, uncaptioned, config.seed, accelerator)
    check_captions(data.captions(), options.token, sd.tokenizer)
    identity = {"data": data.fingerprint, "word": str(options), "loss": str(loss_config),
                "clip_skip": str(model.clip_skip)}  # fmt: skip
    identity |= {name: weights_hash(getattr(sd, name)) for name in ("unet", "vae", "text_encoder")}
    word = learned_word(sd, options, model.clip_skip)
    latents = LatentCache(sd.vae, data_config.cache_dir or model.output / "cache")
    encode_pictures(latents, data, accelerator)
    loss = DiffusionLoss(sd.unet, word, sd.schedule, loss_config)
    about = summary(sd, loss, options, data, config, model, accelerator.num_processes)
    if accelerator.is_main_process:
        print(about, flush=True)
        model.output.mkdir(parents=True, exist_ok=True)
        (model.output / "config.toml").write_text(to_toml(model, options, data_config, loss_config, config, sampling))
    if model.gradient_checkpointing:
        checkpoint_activations(sd.unet, RECOMPUTED)
    prompts = sampling.validation_prompt or tuple(data.captions()[: sampling.num_validation_images])
    started = time.monotonic()
    history = train(
        accelerator, loss, lambda n: fill_templates(data.batch(n, latents), options), config, model.output,
        identity=identity, export=lambda folder: save(word, folder, options),
        validate=partial(word_sheet, sd, word, prompts, sampling, model.clip_skip) if prompts else None,
    )  # fmt: skip
    if accelerator.is_main_process:
        shutil.copyfile(saved_states(model.output)[-1] / options.files[1], model.output / options.files[1])
        seconds, peak = time.monotonic() - started, peak_memory(accelerator.device)
        report(model.output, about, history, seconds, peak, options.files[0])


def check_data(config: DataConfig) -> None:
    """Raise ConfigError for pictures or captions without the word: they give its vectors no gradient."""
    if config.class_data is not None:
        raise ConfigError("class_data: expected none, as a model that does not change forgets no class")
    if config.caption_dropout:
        raise ConfigError("caption_dropout: expected 0, as an empty caption teaches the word nothing")


def learned_word(sd: StableDiffusion, options: WordOptions, clip_skip: int) -> LearnedWord:
    """The word as it begins; nothing else of ``sd`` trains."""
    freeze(sd)
    vectors = initial_vectors(sd.tokenizer, sd.text_encoder, options.init, options.vectors)
    longest = None if options.max_norm is None else options.max_norm * vocabulary_norm(sd.text_encoder)
    return LearnedWord(options.token, vectors, sd.tokenizer, sd.text_encoder, clip_skip, longest)


def encode_pictures(latents: LatentCache, data: TrainingData, accelerator: Accelerator) -> None:
    """Fill the cache: each process its share, then, where the disk is not shared, what it still lacks."""
    for share in (slice(accelerator.process_index, None, accelerator.num_processes), slice(None)):
        latents.fill(data.views(), share, accelerator.is_local_main_process)
        accelerator.wait_for_everyone()


def fill_templates(batch: Batch, options: WordOptions) -> Batch:
    """Captions that are the token alone put into a template, each drawn with the sample's own generator."""
    captions = list(batch.captions)
    for i, generator in enumerate(batch.generators):
        if captions[i] == options.token:
            drawn = int(torch.randint(len(options.templates), (), generator=generator))
            captions[i] = options.templates[drawn].replace(HOLE, options.token)
    return replace(batch, captions=captions)


def word_sheet(
    sd: StableDiffusion, word: LearnedWord, prompts: Sequence[str], sampling: SampleConfig, clip_skip: int
) -> Image.Image:
    """A picture of each prompt, with the word as it is by now."""
    sd.textual_inversions[word.token] = word.inversion().vectors
    return sample_sheet(sd, prompts, sampling, clip_skip)


def save(word: LearnedWord, folder: Path, options: WordOptions) -> None:
    """Write the word so far in both formats."""
    for file in options.files:
        save_textual_inversion(word.inversion(), folder / file)


def summary(
    sd: StableDiffusion,
    loss: DiffusionLoss,
    options: WordOptions,
    data: TrainingData,
    config: TrainConfig,
    model: ModelConfig,
    world: int,
) -> str:
    """What is about to happen: the word, pictures, steps, memory."""
    trained = [p for p in loss.parameters() if p.requires_grad]
    batch = data.config.train_batch_size
    each = batch * config.gradient_accumulation_steps * world
    widest = max(data.buckets, key=lambda bucket: bucket[0] * bucket[1])
    activations = activation_bytes(sd, batch, widest, RECOMPUTED if model.gradient_checkpointing else ())
    everything = nn.ModuleList([loss, sd.vae, sd.text_encoder])
    memory = estimate_memory([everything], activations, config.ema_decay is not None)
    epochs = config.max_train_steps * config.gradient_accumulation_steps / data.batches_per_epoch
    lines = {
        "model": f"{model.model}, {str(sd.dtype).removeprefix('torch.')}, {sd.schedule.prediction_type}",
        "word": f"{options.token}, {options.vectors} vector(s) that begin as {options.init!r}",
        "trained": f"{sum(p.numel() for p in trained):,} parameters in {len(trained)} tensors",
        "pictures": f"{len(set(data.samples))}: {describe(data)}",
        "steps": f"{config.max_train_steps} of {each} pictures, {epochs:.1f} epochs, {world} process(es)",
        "memory": f"about {memory} a process",
        "output": str(model.output),
    }
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def activation_bytes(sd: StableDiffusion, batch: int, bucket: Size, recomputed: tuple[type[Any], ...]) -> int:
    """What the UNet keeps for the backward pass to its context; the text encoder keeps little beside it."""
    config, factor = sd.unet.config, sd.vae.config.factor
    width, height = (side // factor for side in bucket)

    def forward() -> object:
        sample = torch.empty(batch, config.in_channels, height, width, dtype=sd.dtype)
        states = config.per_block(config.cross_attention_dim)[0]
        context = torch.empty(batch, 77, states, dtype=sd.dtype, requires_grad=True)
        return sd.unet(sample, torch.zeros(batch), context)

    return saved_bytes(sd.unet, forward, recomputed)


app = command(
    main,
    {
        "Model": InversionModel, "Word": WordOptions, "Data": DataConfig, "Loss": LossConfig,
        "Training": InversionTraining, "Samples": SampleConfig,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_textual_inversion")
