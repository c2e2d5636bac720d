"""Fine-tune the weights of the UNet itself: ``python -m finetune.train_unet --data pictures --output runs/mine``.

Writes OUTPUT/model, a whole model in diffusers' layout, and beside it the same as `finetune.train_lora`. Trained is the
cross-attention alone, as in Custom Diffusion (arXiv 2212.04488), or all of it, as in DreamBooth (arXiv 2208.12242).
Weights stay in float32; under mixed precision the layers compute in half precision by autocast.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from finetune.data.config import DataConfig
from finetune.lora.targets import match_targets, targets_of
from finetune.options import check_options
from finetune.recipe.command_line import command
from finetune.recipe.diffusion_loss import LossConfig
from finetune.recipe.run import ModelConfig, SampleConfig, Student, teach
from finetune.training.config import TrainConfig
from finetune.training.freezing import freeze
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.stable_diffusion import StableDiffusion

FOLDER = "model"
FULL = {"no": torch.float32, "fp16": torch.float32, "bf16": torch.float32}


@dataclass(frozen=True)
class UNetModel(ModelConfig):
    """The model that is trained, and where the results go."""

    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/unet")


@dataclass(frozen=True)
class UNetOptions:
    """Which of the weights are trained."""

    targets: Annotated[
        tuple[str, ...],
        "cross_attention, attention, transformer, all (norms too) or a regular expression; several: ends of names.",
    ] = ("cross_attention",)

    def __post_init__(self) -> None:
        check_options(self)


def main(
    model: UNetModel,
    options: UNetOptions,
    data: DataConfig,
    loss: LossConfig,
    config: TrainConfig,
    sampling: SampleConfig,
) -> None:
    """Fine-tune the UNet's own weights on a folder of pictures with captions."""

    def adapt(sd: StableDiffusion, _: object) -> Student:
        unfreeze(sd, options)
        base = untrained(sd.unet) if loss.prior_target == "base" else None
        return Student(
            (FOLDER,), lambda folder: sd.save_pretrained(folder / FOLDER), base=base and partial(nullcontext, base)
        )

    teach(adapt, options, model, data, loss, config, sampling, FULL)


def unfreeze(sd: StableDiffusion, options: UNetOptions) -> None:
    """Let the layers that ``targets`` name train, and nothing else. Raises ConfigError for what matches none."""
    targets = options.targets[0] if len(options.targets) == 1 else options.targets
    chosen = match_targets(targets_of(sd.unet, "unet"), targets)
    freeze(sd)
    for module in [sd.unet] if targets == "all" else [sd.unet.get_submodule(target.path) for target in chosen]:
        module.requires_grad_(True)


def untrained(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy that stays as it is. It shares what does not train."""
    shared = {id(p): p for p in unet.parameters() if not p.requires_grad}
    return copy.deepcopy(unet, shared).requires_grad_(False)


app = command(
    main,
    {
        "Model": UNetModel, "UNet": UNetOptions, "Data": DataConfig, "Loss": LossConfig, "Training": TrainConfig,
        "Samples": SampleConfig,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_unet")
