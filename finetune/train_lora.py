"""Teach a model new things by LoRA: ``python -m finetune.train_lora --data pictures --output runs/mine``.

Writes OUTPUT/lora.safetensors, and beside it what one wants to know: report.md with the loss curve and sample sheets
from before and after, config.toml (``--config`` makes the run again), losses.csv, and the checkpoints from which a
killed run goes on. Runs on several GPUs as ``accelerate launch -m finetune.train_lora …``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from finetune.data.config import DataConfig
from finetune.lora.adapters import without_adapters
from finetune.lora.attach import add_lora
from finetune.lora.continuing import continue_lora, copy_in, keep_copy
from finetune.lora.saving import check_can_save, save_lora
from finetune.options import check_options, refuse_unread_options
from finetune.recipe.command_line import command
from finetune.recipe.diffusion_loss import LossConfig, TrainedText
from finetune.recipe.run import ModelConfig, SampleConfig, Student, teach
from finetune.training.config import TrainConfig
from finetune.training.states import saved_states
from sdkit.checks import POSITIVE, Range, expect
from sdkit.stable_diffusion import StableDiffusion

FILE = "lora.safetensors"
RECIPES = Path(__file__).parent / "lora" / "recipes"


@dataclass(frozen=True)
class LoraModel(ModelConfig):
    """The model that is adapted, and where the results go."""

    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/lora")


@dataclass(frozen=True)
class LoraOptions:
    """The adapter, see ``finetune.add_lora``."""

    init_lora: Annotated[
        Path | None, "Go on from this LoRA, of any format; rank, alpha and targets are the file's then."
    ] = None
    rank: Annotated[int | None, "Rank of the updates (default: 8).", Range(1)] = None
    alpha: Annotated[float | None, "They are multiplied by alpha / rank (default: the rank).", POSITIVE] = None
    targets: Annotated[
        tuple[str, ...],
        "cross_attention (the default), attention, transformer, all or a regular expression; several: ends of names.",
    ] = ()
    dropout: Annotated[float, "Share of the updates' inputs that is dropped.", Range(0, 1, below=True)] = 0.0
    use_rslora: Annotated[bool, "Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."] = False
    use_dora: Annotated[bool, "Train the norms of the weights' rows apart (arXiv 2402.09353)."] = False
    init: Annotated[Literal["kaiming", "gaussian"], "How the first matrix is drawn; the second is zero."] = "kaiming"
    train_text_encoder: Annotated[bool, "Adapt the text encoder too."] = False
    text_encoder_lr: Annotated[float | None, "Its learning rate (default: the UNet's).", POSITIVE] = None
    loraplus_lr_ratio: Annotated[
        float, "Learning rate of the second matrices over the first's (arXiv 2402.12354).", POSITIVE
    ] = 1.0
    format: Annotated[Literal["diffusers", "kohya", "peft"], "Format of the file."] = "diffusers"

    def __post_init__(self) -> None:
        check_options(self)
        if not self.train_text_encoder:
            refuse_unread_options(self, ("text_encoder_lr",), "without train_text_encoder")
        if self.init_lora is not None:
            refuse_unread_options(self, ("use_rslora", "init"), "beside init_lora, which has its scales and matrices")


def main(
    model: LoraModel,
    lora: LoraOptions,
    data: DataConfig,
    loss: LossConfig,
    config: TrainConfig,
    sampling: SampleConfig,
) -> None:
    """Teach a model new things by LoRA, from a folder of pictures with captions."""
    some = config.learning_rate or lora.text_encoder_lr
    expect(bool(some), "learning_rate", "a number above 0, or a text_encoder_lr to train that alone", 0)

    def adapt(sd: StableDiffusion, _: object) -> Student:
        goes_on, start = config.resume and bool(saved_states(model.output)), lora.init_lora
        if goes_on and start is not None and (copy := copy_in(start, model.output)).exists():
            start = copy
        add_adapter(sd, lora, start, unet=config.learning_rate > 0, clip_skip=model.clip_skip)
        check_can_save(sd, "default", lora.format)
        if lora.init_lora and not goes_on:
            keep_copy(lora.init_lora, model.output)
        return Student(
            (FILE,),
            lambda folder: save_lora(sd, folder / FILE, lora.format),
            TrainedText(sd.tokenizer, sd.text_encoder, model.clip_skip) if lora.train_text_encoder else None,
            base=partial(without_adapters, sd),
            highest_rate=partial(highest_rate, lora=lora, unet=config.learning_rate),
            about={"init_lora": str(lora.init_lora)} if lora.init_lora else {},
        )

    teach(adapt, lora, model, data, loss, config, sampling)


def highest_rate(name: str, lora: LoraOptions, unet: float) -> float:
    """The highest learning rate of a parameter, by its name in `DiffusionLoss`; ``unet``: the UNet's."""
    text = unet if lora.text_encoder_lr is None else lora.text_encoder_lr
    rate = text if name.startswith("context.") else unet
    return rate * lora.loraplus_lr_ratio if ".lora_B." in name else rate


def add_adapter(
    sd: StableDiffusion, lora: LoraOptions, start: Path | None = None, unet: bool = True, clip_skip: int = 0
) -> None:
    """Put the LoRA into the model, in float32: the one in ``start``, or a new one.

    ``unet``, ``clip_skip``: as in `add_lora`.
    """
    targets = lora.targets[0] if len(lora.targets) == 1 else lora.targets
    text = lora.train_text_encoder
    if start is not None:
        given = targets or None
        continue_lora(sd, start, lora.rank, lora.alpha, given, lora.dropout, lora.use_dora, text, unet, clip_skip)
        return

    rank = 8 if lora.rank is None else lora.rank
    trained = add_lora(
        sd,
        rank,
        rank if lora.alpha is None else lora.alpha,
        targets or "cross_attention",
        lora.dropout,
        lora.use_rslora,
        lora.use_dora,
        lora.init,
        text_encoder=text,
        unet=unet,
        clip_skip=clip_skip,
    )

    for parameter in trained:
        parameter.data = parameter.data.float()


app = command(
    main,
    {
        "Model": LoraModel, "LoRA": LoraOptions, "Data": DataConfig, "Loss": LossConfig, "Training": TrainConfig,
        "Samples": SampleConfig,
    },
    RECIPES,
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_lora")
