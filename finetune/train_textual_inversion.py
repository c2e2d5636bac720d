"""Learn a new word: ``python -m finetune.train_textual_inversion --data pictures --token "<zorb>" --init torus``.

Writes OUTPUT/zorb.safetensors, diffusers' format, and OUTPUT/zorb.pt, that of A1111 (which calls the word by the file's
name); beside them the same as `finetune.train_lora`. The word's vectors are all that is learned: the model stays as it
is, to the bit, so there is nothing that it could forget.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from finetune.data.batches import Batch, TrainingData
from finetune.data.config import DataConfig
from finetune.options import check_options
from finetune.recipe.command_line import command
from finetune.recipe.diffusion_loss import LossConfig
from finetune.recipe.run import ModelConfig, SampleConfig, Student, teach
from finetune.textual_inversion import (
    LearnedWord,
    check_captions,
    check_token,
    initial_vectors,
    vocabulary_norm,
)
from finetune.training.config import TrainConfig
from finetune.training.freezing import freeze
from sdkit.checkpoints.textual_inversion import save_textual_inversion
from sdkit.checks import POSITIVE, Range, expect, refuse_unread
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion

HOLE = "{}"
TEMPLATES = ("a picture of {}", "a photo of {}", "a render of {}", "a close view of {}", "here is {}", "{}")


@dataclass(frozen=True)
class InversionModel(ModelConfig):
    """The model that the word is learned for, and where the results go."""

    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/textual_inversion")


@dataclass(frozen=True)
class WordOptions:
    """The word, and the first values of its vectors."""

    token: Annotated[str, "The new word, as captions and prompts have it."]
    init: Annotated[str, "Words that are like it: one for each vector, or every vector begins as their mean."]
    vectors: Annotated[int, "How many vectors it stands for; each takes the place of a token in prompts.", Range(1)] = 1
    max_norm: Annotated[
        float | None,
        "Longest a vector may become, times the vocabulary's mean (1: as a real word's; default: any).",
        POSITIVE,
    ] = None
    templates: Annotated[
        tuple[str, ...], "Captions of pictures without one, drawn anew each time; {} stands for the word."
    ] = TEMPLATES

    def __post_init__(self) -> None:
        check_token(self.token)
        check_options(self)
        filled = bool(self.templates) and all(template.count(HOLE) == 1 for template in self.templates)
        expect(filled, "templates", f"{HOLE} once in each of one or more", list(self.templates))

    @property
    def files(self) -> tuple[str, str]:
        """The files' names, diffusers' and A1111's: the token without what no file system likes."""
        stem = re.sub(r"[^\w-]+", "", self.token) or "embedding"
        return f"{stem}.safetensors", f"{stem}.pt"


@dataclass(frozen=True)
class InversionTraining(TrainConfig):
    """The loop's settings, with a rate for a few vectors alone as default."""

    learning_rate: Annotated[float, "Highest learning rate.", POSITIVE] = 2e-3


def main(
    model: InversionModel,
    options: WordOptions,
    data: DataConfig,
    loss: LossConfig,
    config: InversionTraining,
    sampling: SampleConfig,
) -> None:
    """Learn the vectors of a new word (textual inversion) from a folder of pictures of what it means."""
    check_data(data)

    def adapt(sd: StableDiffusion, pictures: TrainingData) -> Student:
        check_captions(pictures.captions(), options.token, sd.tokenizer)
        if options.token not in pictures.captions():
            refuse_unread("templates", options.templates, TEMPLATES, "as every picture has a caption")
        word = learned_word(sd, options, model.clip_skip)
        return Student(
            options.files,
            lambda folder: save(word, folder, options),
            word,
            batch=partial(fill_templates, options=options),
            show=lambda: sd.textual_inversions.update({word.token: word.inversion().vectors}),
            about={"word": f"{options.token}, {options.vectors} vector(s) that begin as {options.init!r}"},
        )

    teach(adapt, options, model, data, loss, config, sampling, last_caption=options.token)


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


def fill_templates(batch: Batch, options: WordOptions) -> Batch:
    """Captions that are the token alone put into a template, each drawn with the sample's own generator."""
    captions = list(batch.captions)
    for i, generator in enumerate(batch.generators):
        if captions[i] == options.token:
            drawn = int(torch.randint(len(options.templates), (), generator=generator))
            captions[i] = options.templates[drawn].replace(HOLE, options.token)
    return replace(batch, captions=captions)


def save(word: LearnedWord, folder: Path, options: WordOptions) -> None:
    """Write the word so far in both formats."""
    for file in options.files:
        save_textual_inversion(word.inversion(), folder / file)


app = command(
    main,
    {
        "Model": InversionModel, "Word": WordOptions, "Data": DataConfig, "Loss": LossConfig,
        "Training": InversionTraining, "Samples": SampleConfig,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_textual_inversion")
