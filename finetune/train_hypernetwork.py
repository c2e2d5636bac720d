"""Train a hypernetwork: ``python -m finetune.train_hypernetwork --data pictures --output runs/mine``.

Writes OUTPUT/hypernetwork.pt, which A1111 reads too, and beside it the same as `finetune.train_lora`. Hypernetworks are
known to diverge: everything they do is in series with the text, so one step that is too large ruins all of it. What
keeps them from it is the default here: first weights that change nothing, a rate that rises slowly, clipped gradients.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from finetune.adapters import freeze
from finetune.buckets import Size
from finetune.cache import LatentCache, TextCache, weights_hash
from finetune.checkpoints import saved_states
from finetune.data import DataConfig, TrainingData, describe
from finetune.history import History
from finetune.hypernetwork import Hypernetwork
from finetune.hypernetwork_chain import add_hypernetwork
from finetune.loop import TrainConfig, make_accelerator, train
from finetune.losses import DiffusionLoss, LossConfig
from finetune.memory import checkpoint_activations, estimate_memory, peak_memory, saved_bytes, size
from finetune.options import command, to_toml
from finetune.train_lora import (
    DTYPES,
    RECOMPUTED,
    ModelConfig,
    SampleConfig,
    fill_caches,
    load_model,
    make_class_pictures,
    sample_sheet,
    training_data,
)
from sdkit.pipeline import StableDiffusion

FILE = "hypernetwork.pt"


@dataclass(frozen=True)
class HypernetworkModel(ModelConfig):
    """What is adapted, and where the results go."""

    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/hypernetwork")


@dataclass(frozen=True)
class HypernetworkOptions:
    """The adapter, see ``finetune.Hypernetwork``."""

    widths: Annotated[tuple[int, ...], "Widths of the contexts that it is for (default: the text's)."] = ()
    layer_structure: Annotated[tuple[float, ...], "Sizes of its layers over the width."] = (1.0, 2.0, 1.0)
    activation_func: Annotated[str, "After each layer but the last; A1111's names."] = "swish"
    weight_initialization: Annotated[
        str, "Zero (begin with what changes nothing), Normal (A1111's), XavierUniform, KaimingNormal, …"
    ] = "Zero"
    is_layer_norm: Annotated[bool, "Norm after each layer."] = False
    activate_output: Annotated[bool, "The activation after the last layer too."] = False
    dropout_structure: Annotated[
        tuple[float, ...], "For each entry of layer_structure the share that is dropped (default: nothing)."
    ] = ()


@dataclass(frozen=True)
class HypernetworkTraining(TrainConfig):
    """The loop's settings, with the care that hypernetworks need as defaults.

    Measured on tabletop, batches of one, with two channels of the text 30 times as large, as CLIP has them in SD1: a
    rate of 1e-3 learns; 1e-2 ends above the loss that it began with, less so with this care than with A1111's settings.
    """

    learning_rate: Annotated[float, "Highest learning rate; A1111's advice without this care is 5e-6."] = 1e-4
    lr_warmup_steps: Annotated[int, "Steps over which the rate rises from 0."] = 100


def main(
    model: HypernetworkModel,
    options: HypernetworkOptions,
    data_config: DataConfig,
    loss_config: LossConfig,
    config: HypernetworkTraining,
    sampling: SampleConfig,
) -> None:
    """Train a hypernetwork from a folder of pictures with captions; A1111 can use it too."""
    accelerator = make_accelerator(config)
    sd = load_model(model.model, accelerator.device, DTYPES[accelerator.mixed_precision])
    with accelerator.main_process_first():
        make_class_pictures(sd, data_config)
    data = training_data(sd, data_config, config.seed, accelerator)
    identity = {"data": data.fingerprint, "hypernetwork": str(options), "loss": str(loss_config),
                "clip_skip": str(model.clip_skip)}  # fmt: skip
    identity |= {name: weights_hash(getattr(sd, name)) for name in ("unet", "vae", "text_encoder")}
    network = adapt(sd, options, config.seed)
    network.facts |= {"name": model.output.name, "sd_checkpoint_name": Path(model.model).stem}
    cache = data_config.cache_dir or model.output / "cache"
    latents = LatentCache(sd.vae, cache)
    context = TextCache(sd.tokenizer, sd.text_encoder, cache, model.clip_skip)
    fill_caches(latents, context, data, accelerator)
    loss = DiffusionLoss(sd.unet, context, sd.schedule, loss_config)
    loss.add_module("hypernetwork", network)  # it lies beside the UNet, and is what is trained
    about = summary(sd, loss, data, config, model, accelerator.num_processes)
    if accelerator.is_main_process:
        print(about, flush=True)
        model.output.mkdir(parents=True, exist_ok=True)
        (model.output / "config.toml").write_text(to_toml(model, options, data_config, loss_config, config, sampling))
    if model.gradient_checkpointing:
        checkpoint_activations(sd.unet, RECOMPUTED)
    prompts = sampling.validation_prompt or tuple(data.captions()[: sampling.num_validation_images])
    started = time.monotonic()
    history = train(
        accelerator, loss, lambda n: data.batch(n, latents), config, model.output, identity=identity,
        export=lambda folder: network.save(folder / FILE),
        validate=partial(sample_sheet, sd, prompts, sampling, model.clip_skip) if prompts else None,
    )  # fmt: skip
    if accelerator.is_main_process:
        seconds = time.monotonic() - started
        report(model.output, about, history, seconds, peak_memory(accelerator.device), FILE)


def adapt(sd: StableDiffusion, options: HypernetworkOptions, seed: int) -> Hypernetwork:
    """Add the hypernetwork, the same in every process; nothing else trains."""
    config = sd.unet.config
    torch.manual_seed(seed)
    network = Hypernetwork(
        options.widths or (config.per_block(config.cross_attention_dim)[0],), options.layer_structure,
        options.activation_func, options.weight_initialization, options.is_layer_norm, options.activate_output,
        options.dropout_structure or None,
    )  # fmt: skip
    freeze(sd)
    add_hypernetwork(sd, network, name="trained")
    return network


# The same as train_lora's, but for any adapter and file; they are to move there.


def summary(
    sd: StableDiffusion, loss: DiffusionLoss, data: TrainingData, config: TrainConfig, model: ModelConfig, world: int
) -> str:
    """What is about to happen: parameters, pictures, steps, memory."""
    trained = [p for p in loss.parameters() if p.requires_grad]
    batch = data.config.train_batch_size
    each = batch * config.gradient_accumulation_steps * world
    widest, tallest = max(data.buckets, key=lambda bucket: bucket[0] * bucket[1])
    recomputed = RECOMPUTED if model.gradient_checkpointing else ()
    activations = activation_bytes(sd, loss, batch, (widest, tallest), recomputed)
    everything = nn.ModuleList([loss, sd.vae, sd.text_encoder])  # counts what is in two of them once
    memory = estimate_memory([everything], activations, config.ema_decay is not None)
    epochs = config.max_train_steps * config.gradient_accumulation_steps / data.batches_per_epoch
    lines = {
        "model": f"{model.model}, {str(sd.dtype).removeprefix('torch.')}, {sd.schedule.prediction_type}",
        "trained": f"{sum(p.numel() for p in trained):,} parameters in {len(trained)} tensors",
        "pictures": f"{len(set(data.samples))}: {describe(data)}",
        "steps": f"{config.max_train_steps} of {each} pictures, {epochs:.1f} epochs, {world} process(es)",
        "memory": f"about {memory} a process",
        "output": str(model.output),
    }
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def activation_bytes(
    sd: StableDiffusion, loss: nn.Module, batch: int, bucket: Size, recomputed: tuple[type[Any], ...]
) -> int:
    """What the UNet, and adapters beside it in ``loss``, keep for the backward pass of a batch of this size."""
    config, factor = sd.unet.config, sd.vae.config.factor
    width, height = (side // factor for side in bucket)

    def forward() -> object:
        sample = torch.empty(batch, config.in_channels, height, width, dtype=sd.dtype)
        states = config.per_block(config.cross_attention_dim)[0]
        context = torch.empty(batch, 77, states, dtype=sd.dtype)
        return sd.unet(sample, torch.zeros(batch), context)

    return saved_bytes(loss, forward, recomputed)


def report(output: Path, about: str, history: History, seconds: float, peak: int, file: str) -> None:
    """Write the adapter and what one wants to know about the run; the newest checkpoint holds the adapter."""
    shutil.copyfile(saved_states(output)[-1] / file, output / file)
    history.write_csv(output / "losses.csv")
    history.draw(output / "loss.png")
    tenth = max(1, len(history.rows) // 10)
    first = sum(row.loss for row in history.rows[:tenth]) / tenth
    sheets = sorted((output / "samples").glob("step-*.png"))
    shown = [("Before", sheets[0]), ("After", sheets[-1])] if sheets else []
    parts = [
        f"# {output.name}", f"```\n{about}\n```",
        f"Mean loss of the first {tenth} steps {first:.4f}, of the last {history.recent(tenth):.4f}. "
        f"{seconds:.0f} s in the last session, at most {size(peak)} of memory. The adapter: `{file}`.",
        "![The loss curve](loss.png)",
        *(f"## {title}\n\n![Sample sheet](samples/{sheet.name})" for title, sheet in shown),
    ]  # fmt: skip
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{output / file} written; see {output / 'report.md'}")


app = command(
    main,
    {
        "Model": HypernetworkModel, "Hypernetwork": HypernetworkOptions, "Data": DataConfig, "Loss": LossConfig,
        "Training": HypernetworkTraining, "Samples": SampleConfig,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_hypernetwork")
