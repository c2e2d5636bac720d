"""Train a hypernetwork: ``python -m finetune.train_hypernetwork --data pictures --output runs/mine``.

Writes OUTPUT/hypernetwork.pt, which A1111 reads too, and beside it the same as `finetune.train_lora`. Hypernetworks are
known to diverge: everything they do is in series with the text, so one step that is too large ruins all of it. What
keeps them from it is the default here: first weights that change nothing, whitened contexts, a rate that rises slowly,
clipped gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from finetune.data.config import DataConfig
from finetune.hypernetwork.attach import add_hypernetwork, without_hypernetworks
from finetune.hypernetwork.network import Hypernetwork
from finetune.options import check_options, refuse_unread_options
from finetune.recipe.command_line import command
from finetune.recipe.diffusion_loss import LossConfig
from finetune.recipe.run import ModelConfig, SampleConfig, Student, teach
from finetune.training.config import TrainConfig
from finetune.training.freezing import freeze
from sdkit.checks import POSITIVE, Range, refuse_unread
from sdkit.stable_diffusion import StableDiffusion

FILE = "hypernetwork.pt"


@dataclass(frozen=True)
class HypernetworkModel(ModelConfig):
    """The model that is adapted, and where the results go."""

    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/hypernetwork")


@dataclass(frozen=True)
class HypernetworkOptions:
    """The adapter, see ``finetune.Hypernetwork``."""

    widths: Annotated[tuple[int, ...], "Widths of the contexts that it is for (default: the text's).", Range(1)] = ()
    layer_structure: Annotated[tuple[float, ...], "Sizes of its layers over the width.", POSITIVE] = (1.0, 2.0, 1.0)
    activation_func: Annotated[str, "After each layer but the last; A1111's names."] = "swish"
    weight_initialization: Annotated[
        str, "Zero (begin with what changes nothing), Normal (A1111's), XavierUniform, KaimingNormal, …"
    ] = "Zero"
    is_layer_norm: Annotated[bool, "Norm after each layer."] = False
    activate_output: Annotated[bool, "The activation after the last layer too."] = False
    dropout_structure: Annotated[
        tuple[float, ...],
        "For each entry of layer_structure the share that is dropped (default: nothing).",
        Range(0, 1, below=True),
    ] = ()
    whiten: Annotated[bool, "Train on whitened contexts, which takes fewer steps; the file is a plain one."] = True

    def __post_init__(self) -> None:
        check_options(self)
        if self.activation_func == "linear":
            refuse_unread_options(self, ("activate_output",), "with the activation_func linear")
        if self.dropout_structure:
            refuse_unread("dropout_structure", self.dropout_structure[0], 0, "in its first entry, the network's input")


@dataclass(frozen=True)
class HypernetworkTraining(TrainConfig):
    """The loop's settings, with the care that hypernetworks need as defaults.

    Measured on tabletop before contexts were whitened, batches of one, with two channels of the text 30 times as large,
    as CLIP has them in SD1: a rate of 1e-3 learns; 1e-2 ends above the loss that it began with, less so with this care
    than with A1111's settings. On whitened contexts and batches of eight 1e-2 is stable over five seeds, with gradients
    clipped at 0.05 and an ``adam_beta2`` of 0.99 (`finetune.pretrain.compare`).
    """

    learning_rate: Annotated[float, "Highest learning rate; A1111's advice without this care is 5e-6.", POSITIVE] = 1e-4
    lr_warmup_steps: Annotated[int, "Steps over which the rate rises from 0.", Range(0)] = 100


def main(
    model: HypernetworkModel,
    options: HypernetworkOptions,
    data: DataConfig,
    loss: LossConfig,
    config: HypernetworkTraining,
    sampling: SampleConfig,
) -> None:
    """Train a hypernetwork from a folder of pictures with captions; A1111 can use it too."""

    def adapt(sd: StableDiffusion, _: object) -> Student:
        network = hypernetwork(sd, options)
        network.facts |= {"name": model.output.name, "sd_checkpoint_name": Path(model.model).stem}
        return Student(
            (FILE,),
            lambda folder: network.save(folder / FILE),
            beside=network,
            prepare=network.whiten if options.whiten else None,
            base=partial(without_hypernetworks, sd),
        )

    teach(adapt, options, model, data, loss, config, sampling)


def hypernetwork(sd: StableDiffusion, options: HypernetworkOptions) -> Hypernetwork:
    """Add the hypernetwork to the model and return it; nothing else trains."""
    config = sd.unet.config
    network = Hypernetwork(
        options.widths or (config.per_block(config.cross_attention_dim)[0],),
        options.layer_structure,
        options.activation_func,
        options.weight_initialization,
        options.is_layer_norm,
        options.activate_output,
        options.dropout_structure or None,
    )

    freeze(sd)
    add_hypernetwork(sd, network, name="trained")
    return network


app = command(
    main,
    {
        "Model": HypernetworkModel, "Hypernetwork": HypernetworkOptions, "Data": DataConfig, "Loss": LossConfig,
        "Training": HypernetworkTraining, "Samples": SampleConfig,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_hypernetwork")
