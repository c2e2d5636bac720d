"""Teach a model new things by LoRA: ``python -m finetune.train_lora --data pictures --output runs/mine``.

Writes OUTPUT/lora.safetensors, and beside it what one wants to know: report.md with the loss curve and sample sheets
from before and after, config.toml (``--config`` makes the run again), losses.csv, and the checkpoints from which a
killed run goes on. Runs on several GPUs as ``accelerate launch -m finetune.train_lora …``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

from finetune.buckets import Size
from finetune.cache import LatentCache, TextCache, weights_hash
from finetune.checkpoints import saved_states
from finetune.data import DataConfig, TrainingData, describe, read_pictures
from finetune.folders import SUFFIXES
from finetune.history import History
from finetune.loop import TrainConfig, make_accelerator, train
from finetune.lora import add_lora, save_lora
from finetune.losses import DiffusionLoss, LossConfig, TrainedText
from finetune.memory import checkpoint_activations, estimate_memory, peak_memory, saved_bytes, size
from finetune.options import command, to_toml
from sdkit.attention import Transformer2DModel
from sdkit.image import grid
from sdkit.layers import ResnetBlock2D
from sdkit.pipeline import StableDiffusion

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECOMPUTED = (ResnetBlock2D, Transformer2DModel)  # under gradient checkpointing
FILE = "lora.safetensors"


@dataclass(frozen=True)
class ModelConfig:
    """What is adapted, and where the results go."""

    model: Annotated[str, "A model that ships with sdkit, a diffusers folder or a single file."] = "tabletop"
    output: Annotated[Path, "Folder for everything that the run writes."] = Path("out/lora")
    clip_skip: Annotated[int, "Last layers of the text encoder that are left out (A1111's number - 1)."] = 0
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass: less memory, slower."] = False


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
    format: Annotated[Literal["diffusers", "kohya", "peft"], "Format of the file."] = "diffusers"


@dataclass(frozen=True)
class SampleConfig:
    """The pictures that show what was learnt."""

    validation_prompt: Annotated[tuple[str, ...], "A prompt of the sample sheets (default: some captions)."] = ()
    num_validation_images: Annotated[int, "How many captions are taken where no prompt is given; 0: no sheets."] = 4
    num_inference_steps: Annotated[int, "Sampling steps."] = 20
    guidance_scale: Annotated[float, "How hard the prompt pulls."] = 5.0


def main(
    model: ModelConfig,
    lora: LoraOptions,
    data_config: DataConfig,
    loss_config: LossConfig,
    config: TrainConfig,
    sampling: SampleConfig,
) -> None:
    """Teach a model new things by LoRA, from a folder of pictures with captions."""
    accelerator = make_accelerator(config)
    sd = load_model(model.model, accelerator.device, DTYPES[accelerator.mixed_precision])
    with accelerator.main_process_first():
        make_class_pictures(sd, data_config)
    data = training_data(sd, data_config, config.seed, accelerator)
    identity = {
        "data": data.fingerprint,
        "lora": str(lora),
        "loss": str(loss_config),
        "clip_skip": str(model.clip_skip),
    }
    identity |= {name: weights_hash(getattr(sd, name)) for name in ("unet", "vae", "text_encoder")}
    adapt(sd, lora, config.seed)
    latents, context = encoders(sd, data_config.cache_dir or model.output / "cache", model, lora)
    fill_caches(latents, context, data, accelerator)
    loss = DiffusionLoss(sd.unet, context, sd.schedule, loss_config)
    about = summary(sd, loss, data, config, model, accelerator.num_processes)
    if accelerator.is_main_process:
        print(about, flush=True)
        model.output.mkdir(parents=True, exist_ok=True)
        (model.output / "config.toml").write_text(to_toml(model, lora, data_config, loss_config, config, sampling))
    if model.gradient_checkpointing:
        checkpoint_activations(sd.unet, RECOMPUTED)
    prompts = sampling.validation_prompt or tuple(data.captions()[: sampling.num_validation_images])
    text_factor = 1.0 if lora.text_encoder_lr is None else lora.text_encoder_lr / config.learning_rate
    started = time.monotonic()
    history = train(
        accelerator, loss, lambda n: data.batch(n, latents), config, model.output, identity=identity,
        rate_factor=lambda name: text_factor if name.startswith("context.") else 1.0,
        export=lambda folder: save_lora(sd, folder / FILE, lora.format),
        validate=partial(sample_sheet, sd, prompts, sampling, model.clip_skip) if prompts else None,
    )  # fmt: skip
    if accelerator.is_main_process:
        report(model.output, about, history, time.monotonic() - started, peak_memory(accelerator.device))


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """A shipped model, a diffusers folder or a single file. Raises CheckpointError."""
    load = StableDiffusion.from_single_file if Path(name).is_file() else StableDiffusion.from_pretrained
    return load(name, device=device, dtype=dtype)


def adapt(sd: StableDiffusion, lora: LoraOptions, seed: int) -> None:
    """Add the adapter, the same in every process, in float32."""
    torch.manual_seed(seed)
    targets = lora.targets[0] if len(lora.targets) == 1 else lora.targets
    alpha = lora.rank if lora.alpha is None else lora.alpha
    trained = add_lora(sd, lora.rank, alpha, targets, lora.dropout, lora.use_rslora, lora.use_dora, lora.init,
                       text_encoder=lora.train_text_encoder)  # fmt: skip
    for parameter in trained:
        parameter.data = parameter.data.float()


def make_class_pictures(sd: StableDiffusion, config: DataConfig) -> None:
    """Draw pictures of the class prompt until the class folder holds as many as were asked for."""
    if config.class_data is None or not config.num_class_images:
        return
    config.class_data.mkdir(parents=True, exist_ok=True)
    there = sum(file.suffix.lower() in SUFFIXES for file in config.class_data.rglob("*"))
    for index in tqdm(range(there, config.num_class_images), desc="class pictures"):
        picture = sd.text_to_image(config.class_prompt, seed=index, progress=False).images[0]
        picture.save(config.class_data / f"class-{index:05d}.png")


def training_data(sd: StableDiffusion, config: DataConfig, seed: int, accelerator: Accelerator) -> TrainingData:
    """The pictures in buckets that suit the model. Raises ConfigError that lists all that is wrong with them."""
    factor, own = sd.vae.config.factor, sd.unet.config.sample_size or 64
    resolution = config.resolution or factor * (own if isinstance(own, int) else max(own))
    step = factor * 2 ** (len(sd.unet.config.block_out_channels) - 1)  # so that every level halves evenly
    return TrainingData(
        read_pictures(config), config, resolution, step, seed, accelerator.process_index, accelerator.num_processes
    )


def encoders(
    sd: StableDiffusion, cache: Path, model: ModelConfig, lora: LoraOptions
) -> tuple[LatentCache, TextCache | TrainedText]:
    """What gives the loss its latents and contexts: caches, but for a text encoder that is trained."""
    text = TrainedText if lora.train_text_encoder else partial(TextCache, folder=cache)
    return LatentCache(sd.vae, cache), text(sd.tokenizer, sd.text_encoder, clip_skip=model.clip_skip)


def fill_caches(
    latents: LatentCache, context: TextCache | TrainedText, data: TrainingData, accelerator: Accelerator
) -> None:
    """Encode what is not there yet: each process its share, then, where the disk is not shared, what it still lacks."""
    for share in (slice(accelerator.process_index, None, accelerator.num_processes), slice(None)):
        latents.fill(data.views(), share, accelerator.is_local_main_process)
        if isinstance(context, TextCache):
            context.fill(data.captions(), share, accelerator.is_local_main_process)
        accelerator.wait_for_everyone()


def sample_sheet(sd: StableDiffusion, prompts: Sequence[str], sampling: SampleConfig, clip_skip: int) -> Image.Image:
    """A picture of each prompt, the n-th with seed n."""
    pictures = [
        sd.text_to_image(
            prompt, seed=seed, num_inference_steps=sampling.num_inference_steps, clip_skip=clip_skip,
            guidance_scale=sampling.guidance_scale, prompt_weighting=False, progress=False,
        ).images[0]
        for seed, prompt in enumerate(prompts)
    ]  # fmt: skip
    return grid(pictures, 4, prompts)


def summary(
    sd: StableDiffusion, loss: DiffusionLoss, data: TrainingData, config: TrainConfig, model: ModelConfig, world: int
) -> str:
    """What is about to happen: parameters, pictures, steps, memory."""
    trained = [p for p in loss.parameters() if p.requires_grad]
    batch = data.config.train_batch_size
    each = batch * config.gradient_accumulation_steps * world
    widest, tallest = max(data.buckets, key=lambda bucket: bucket[0] * bucket[1])
    activations = activation_bytes(sd, batch, (widest, tallest), RECOMPUTED if model.gradient_checkpointing else ())
    memory = estimate_memory([sd.unet, sd.vae, sd.text_encoder], activations, config.ema_decay is not None)
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


def activation_bytes(sd: StableDiffusion, batch: int, bucket: Size, recomputed: tuple[type[Any], ...]) -> int:
    """What the UNet keeps for the backward pass of a batch of pictures of this size."""
    config, factor = sd.unet.config, sd.vae.config.factor
    width, height = (side // factor for side in bucket)

    def forward() -> object:
        sample = torch.empty(batch, config.in_channels, height, width, dtype=sd.dtype)
        states = config.per_block(config.cross_attention_dim)[0]
        context = torch.empty(batch, 77, states, dtype=sd.dtype)
        return sd.unet(sample, torch.zeros(batch), context)

    return saved_bytes(sd.unet, forward, recomputed)


def report(output: Path, about: str, history: History, seconds: float, peak: int) -> None:
    """Write the adapter and what one wants to know about the run; the newest checkpoint holds the adapter."""
    shutil.copyfile(saved_states(output)[-1] / FILE, output / FILE)
    history.write_csv(output / "losses.csv")
    history.draw(output / "loss.png")
    tenth = max(1, len(history.rows) // 10)
    first = sum(row.loss for row in history.rows[:tenth]) / tenth
    sheets = sorted((output / "samples").glob("step-*.png"))
    shown = [("Before", sheets[0]), ("After", sheets[-1])] if sheets else []
    parts = [
        f"# {output.name}", f"```\n{about}\n```",
        f"Mean loss of the first {tenth} steps {first:.4f}, of the last {history.recent(tenth):.4f}. "
        f"{seconds:.0f} s in the last session, at most {size(peak)} of memory. The adapter: `{FILE}`.",
        "![The loss curve](loss.png)",
        *(f"## {title}\n\n![Sample sheet](samples/{sheet.name})" for title, sheet in shown),
    ]  # fmt: skip
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{output / FILE} written; see {output / 'report.md'}")


app = command(
    main,
    {
        "Model": ModelConfig, "LoRA": LoraOptions, "Data": DataConfig, "Loss": LossConfig,
        "Training": TrainConfig, "Samples": SampleConfig,
    },
)  # fmt: skip

if __name__ == "__main__":
    app(prog_name="python -m finetune.train_lora")
