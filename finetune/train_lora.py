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

from finetune.data.batches import DataConfig
from finetune.lora.adapters import without_adapters
from finetune.lora.attach import add_lora, save_lora
from finetune.recipe.command_line import command
from finetune.recipe.diffusion_loss import LossConfig, TrainedText
from finetune.recipe.run import ModelConfig, SampleConfig, Student, teach
from finetune.training.config import TrainConfig
from sdkit.checks import check_positive
from sdkit.stable_diffusion import StableDiffusion

FILE = "lora.safetensors"


@dataclass(frozen=True)
class LoraModel(ModelConfig):
    """The model that is adapted, and where the results go."""

    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/lora")


@dataclass(frozen=True)
class LoraOptions:
    """The adapter, see ``finetune.add_lora``."""

    rank: Annotated[int, "Rank of the updates."] = 8
    alpha: Annotated[float | None, "They are multiplied by alpha / rank (default: the rank)."] = None
    targets: Annotated[
        tuple[str, ...],
        "cross_attention, attention, transformer, all or a regular expression; several: ends of modules' names.",
    ] = ("cross_attention",)
    dropout: Annotated[float, "Share of the updates' inputs that is dropped."] = 0.0
    use_rslora: Annotated[bool, "Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."] = False
    use_dora: Annotated[bool, "Train the norms of the weights' rows apart (arXiv 2402.09353)."] = False
    init: Annotated[Literal["kaiming", "gaussian"], "How the first matrix is drawn; the second is zero."] = "kaiming"
    train_text_encoder: Annotated[bool, "Adapt the text encoder too."] = False
    text_encoder_lr: Annotated[float | None, "Its learning rate (default: the UNet's)."] = None
    loraplus_lr_ratio: Annotated[float, "Learning rate of the second matrices over the first's (arXiv 2402.12354)."] = (
        1.0
    )
    format: Annotated[Literal["diffusers", "kohya", "peft"], "Format of the file."] = "diffusers"

    def __post_init__(self) -> None:
        check_positive("loraplus_lr_ratio", self.loraplus_lr_ratio)


def main(
    model: LoraModel,
    lora: LoraOptions,
    data: DataConfig,
    loss: LossConfig,
    config: TrainConfig,
    sampling: SampleConfig,
) -> None:
    """Teach a model new things by LoRA, from a folder of pictures with captions."""
    text_factor = 1.0 if lora.text_encoder_lr is None else lora.text_encoder_lr / config.learning_rate

    def adapt(sd: StableDiffusion, _: object) -> Student:
        add_adapter(sd, lora)
        return Student(
            (FILE,),
            lambda folder: save_lora(sd, folder / FILE, lora.format),
            TrainedText(sd.tokenizer, sd.text_encoder, model.clip_skip) if lora.train_text_encoder else None,
            base=partial(without_adapters, sd),
            rate_factor=partial(rate_factor, lora=lora, text_factor=text_factor),
        )

    teach(adapt, lora, model, data, loss, config, sampling)


def rate_factor(name: str, lora: LoraOptions, text_factor: float) -> float:
    """The factor on a parameter's learning rate, by its name in `DiffusionLoss`."""
    factor = text_factor if name.startswith("context.") else 1.0
    return factor * lora.loraplus_lr_ratio if ".lora_B." in name else factor


def add_adapter(sd: StableDiffusion, lora: LoraOptions) -> None:
    """Put the LoRA into the model, in float32."""
    targets = lora.targets[0] if len(lora.targets) == 1 else lora.targets
    alpha = lora.rank if lora.alpha is None else lora.alpha

    trained = add_lora(
        sd,
        lora.rank,
        alpha,
        targets,
        lora.dropout,
        lora.use_rslora,
        lora.use_dora,
        lora.init,
        text_encoder=lora.train_text_encoder,
    )

    for parameter in trained:
        parameter.data = parameter.data.float()


app = command(
    main,
    {
        "Model": LoraModel, "LoRA": LoraOptions, "Data": DataConfig, "Loss": LossConfig, "Training": TrainConfig,
        "Samples": SampleConfig,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_lora")
