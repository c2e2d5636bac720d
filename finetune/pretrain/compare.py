"""Teach the shipped model the striped zorb in every way: ``python -m finetune.pretrain.compare`` (hours on two cores).

Each way is its training script, run as a user would run it, on the same 24 pictures for the same number of steps.
Beside them stand pictures that the base drew from its own captions, so that it does not forget them. After every part
of a run `concept_probe` counts how many of 100 unseen prompts show the concept, and what has become of the base's
own. All figures lie in compare.json, from which the table, the curves and the pictures in finetune/README.md are
made, and two sections of docs/latent-diffusion.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from PIL import Image

import finetune
from finetune.pretrain.concept import concept_prompts, write_concept_folder
from finetune.pretrain.concept_probe import base_accuracy, load_concept_probe, measure_concept
from finetune.pretrain.probe import load_probe
from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.scenes import sample_scenes
from finetune.training.states import saved_states
from sdkit.files import replace_section, write_text
from sdkit.images.sheet import contact_sheet, enlarged
from sdkit.stable_diffusion import StableDiffusion

RESULTS = Path(__file__).with_suffix(".json")
DOCS = Path("docs")
SECTION, LORA, HYPERNETWORK = "comparison", "lora", "hypernetwork"
PICTURES, PRIOR = 24, 400
STEPS, PARTS = 1600, 4
GUIDANCE, SAMPLING_STEPS, SAMPLER, SEED = 3.5, 20, "dpmpp_2m", 20_000
SHOWN = (
    "a striped red zorb on a white table", "a striped blue zorb", "a photo of a striped green zorb on a wooden table",
    "a striped yellow zorb and a red cube", "a red cube on a white table", "a large shiny blue sphere",
)  # fmt: skip
BASE = "the base"


@dataclass(frozen=True)
class Way:
    """A training script with its options; ``file`` is what it writes."""

    name: str
    script: str
    file: str
    options: tuple[str, ...] = ()
    remembers: bool = True
    """Whether the base's pictures stand beside the concept's."""


COMMON = ("--train-batch-size", "8", "--random-flip", "--lr-scheduler", "cosine", "--lr-warmup-steps", "50",
          "--num-validation-images", "0")  # fmt: skip
AVERAGE = ("--ema-decay", "0.99")


def lora(rank: int, *more: str) -> tuple[str, ...]:
    """Options of a LoRA that has worked: LoRA+ at 16 times the rate."""
    return ("--rank", str(rank), "--learning-rate", "1e-3", "--loraplus-lr-ratio", "16", *AVERAGE, *more)


WAYS = (
    Way("LoRA, rank 8", "train_lora", "lora.safetensors", lora(8)),
    Way("LoRA, rank 2", "train_lora", "lora.safetensors", lora(2)),
    Way("LoRA, rank 32", "train_lora", "lora.safetensors", lora(32)),
    Way("LoRA, rank 8, all layers", "train_lora", "lora.safetensors",
        lora(8, "--targets", "all", "--learning-rate", "3e-4")),
    Way("hypernetwork", "train_hypernetwork", "hypernetwork.pt",
        ("--layer-structure", "1", "--layer-structure", "0.25", "--layer-structure", "1", "--learning-rate", "1e-2",
         "--max-grad-norm", "0.05", "--adam-beta2", "0.99", *AVERAGE)),
    Way("full cross-attention", "train_unet", "model", ("--learning-rate", "1e-3", *AVERAGE)),
    Way("textual inversion", "train_textual_inversion", "zorb.safetensors",
        ("--token", "zorb", "--init", "torus", "--vectors", "4", "--learning-rate", "5e-3"), remembers=False),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One measurement: how much a model shows after some steps, in per cent; seconds of training; the file's bytes."""

    way: str
    seed: int
    step: int
    concept: float
    zorb: float
    striped: float
    in_its_color: float
    base: float
    seconds: float
    size: int


def write_prior(folder: Path, count: int = PRIOR, seed: int = 77) -> None:
    """Write pictures that the base draws from captions of fresh scenes, as an image folder, once."""
    if (folder / "metadata.jsonl").is_file():
        return

    scenes = sample_scenes(count, seed, counts=(0.7, 0.3, 0.0))
    texts, sd = captions(scenes, seed), StableDiffusion.from_pretrained("tabletop")
    images = sd.text_to_image(texts, seed=seed, num_inference_steps=20, guidance_scale=3.0, max_batch_size=50).images

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:03}.png")
    rows = [json.dumps({"file_name": f"{i:03}.png", "text": text}) for i, text in enumerate(texts)]
    write_text(folder / "metadata.jsonl", "\n".join(rows) + "\n")


def folder_of(way: Way, seed: int, work: Path) -> Path:
    """Where a run of the way's script writes."""
    return work / f"{way.name.replace(',', '').replace(' ', '-')}-{seed}"


def train(way: Way, seed: int, steps: int, work: Path) -> float:
    """Run the way's script; returns its seconds. A run that was killed goes on."""
    command = [
        sys.executable,
        "-m",
        f"finetune.{way.script}",
        "--data",
        str(work / "zorb"),
        "--output",
        str(folder_of(way, seed, work)),
        "--seed",
        str(seed),
        "--max-train-steps",
        str(steps),
        "--checkpointing-steps",
        str(steps // PARTS),
        "--checkpoints-total-limit",
        str(PARTS),
        "--cache-dir",
        str(work / "cache"),
        *COMMON,
        *way.options,
    ]

    if way.remembers:
        command += ["--class-data", str(work / "prior"), "--prior-target", "base"]

    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def taught(way: Way, folder: Path) -> StableDiffusion:
    """The shipped model with what a run wrote into ``folder``."""
    if way.script == "train_unet":
        return StableDiffusion.from_pretrained(folder / way.file)

    sd = StableDiffusion.from_pretrained("tabletop")
    if way.script == "train_lora":
        finetune.load_lora(sd, folder / way.file)
        finetune.merge(sd)
    elif way.script == "train_hypernetwork":
        finetune.load_hypernetwork(sd, folder / way.file)
    else:
        sd.load_textual_inversion(folder / way.file)
    return sd


def nbytes(path: Path) -> int:
    """The size of a file; of a model's folder that of its UNet alone, as the rest is the base's."""
    return sum(f.stat().st_size for f in (path / "unet").iterdir()) if path.is_dir() else path.stat().st_size


def measure(sd: StableDiffusion, prompts: Sequence[str]) -> dict[str, float]:
    """How much of the concept and of the base's own a model shows, in per cent of the prompts."""
    shares = measure_concept(sd, load_concept_probe(), prompts, SEED, GUIDANCE, SAMPLING_STEPS, SAMPLER)
    base = base_accuracy(sd, load_probe(), SEED, GUIDANCE, SAMPLING_STEPS, SAMPLER)
    found = {
        "concept": shares["concept"],
        "zorb": shares["zorb"],
        "striped": shares["striped"],
        "in_its_color": shares["concept in its colour"],
        "base": base,
    }
    return {name: round(value, 3) for name, value in found.items()}  # whole pictures of 100, out of float32


def read_results() -> list[Result]:
    """All that is on record, none where there is no record."""
    return [Result(**row) for row in json.loads(RESULTS.read_text())] if RESULTS.is_file() else []


def keep(result: Result) -> None:
    """Put a result among those that are there, in place of one of the same run and step."""
    rows = {(r.way, r.seed, r.step): r for r in [*read_results(), result]}
    text = ",\n".join(json.dumps(asdict(rows[key])) for key in sorted(rows))
    write_text(RESULTS, f"[\n{text}\n]\n")


def learning_curves(results: Sequence[Result]) -> Figure:
    """Concept shown, and base kept, over steps, for every LoRA."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    base = next(r for r in results if r.way == BASE)

    for axes, kind, title in zip(
        figure.subplots(1, 2), ("concept", "base"), ("new concept shown", "base's own prompts right"), strict=True
    ):
        for name in dict.fromkeys(r.way for r in results if r.way.startswith("LoRA")):
            runs = [base, *sorted((r for r in results if r.way == name and r.seed == 0), key=lambda r: r.step)]
            axes.plot([r.step for r in runs], [getattr(r, kind) for r in runs], marker="o", label=name)
        axes.set(xlabel="step", ylabel="per cent of 100 prompts", title=title, ylim=(0, 103))
        axes.spines[["top", "right"]].set_visible(False)

    figure.axes[0].legend(frameon=False)
    return figure


def table(results: Sequence[Result], only: str = "") -> str:
    """A row for each way after its last step; where there are several seeds, from the lowest to the highest.

    only: the base, and the ways whose names begin so.
    """
    lines = [
        "| way | concept, % | in its colour, % | base's own prompts, % | file | minutes | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    last = max(r.step for r in results)
    for name in (BASE, *(way.name for way in WAYS if way.name.startswith(only))):
        runs = [r for r in results if r.way == name and r.step in (0, last)]
        if not runs:
            continue

        def span(kind: str, runs: list[Result] = runs) -> str:
            values = sorted(f"{getattr(r, kind):3.0f}" for r in runs)
            return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}".replace("  ", " ")

        size = f"{runs[0].size / 1e3:,.0f} kB" if runs[0].size else ""
        minutes = f"{sum(r.seconds for r in runs) / len(runs) / 60:.1f}" if runs[0].seconds else ""
        cells = (name, span("concept"), span("in_its_color"), span("base"), size, minutes, str(len(runs)))
        lines.append(f"| {' | '.join(cell.strip() for cell in cells)} |")
    return "\n".join(lines)


def sheet(work: Path) -> Image.Image:
    """A row for the base and for each way that has been trained; the prompts stand below the last."""
    done = [way for way in WAYS if (folder_of(way, 0, work) / way.file).exists()]
    models = {BASE: StableDiffusion.from_pretrained("tabletop")}
    models |= {way.name: taught(way, folder_of(way, 0, work)) for way in done}

    pictures: list[Image.Image] = []
    texts: list[str] = []
    for name, sd in models.items():
        images = sd.text_to_image(
            list(SHOWN),
            seed=1,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            sampler=SAMPLER,
            progress=False,
        ).images
        pictures += [enlarged(image, 128) for image in images]
        texts += [f"{name}: {SHOWN[0]}", *SHOWN[1:]]
    return contact_sheet(pictures, len(SHOWN), texts)


def write_tables() -> None:
    """Put the table into finetune/README.md, and the rows of LoRA and of hypernetworks into the page."""
    results, page = read_results(), DOCS / "latent-diffusion.md"
    replace_section(Path(finetune.__file__).parent / "README.md", SECTION, table(results))
    replace_section(page, LORA, table(results, "LoRA"))
    replace_section(page, HYPERNETWORK, table(results, "hypernetwork"))


def main(
    ways: Annotated[list[str] | None, typer.Argument(help="Names of ways, as in the table (default: all).")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of the training (default: 0).", min=0)] = None,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = STEPS,
    work: Annotated[Path, typer.Option(help="Pictures and runs.")] = Path("build/compare"),
    every: Annotated[bool, typer.Option(help="Also measure what a run had learnt on its way.")] = True,
) -> None:
    """Train and measure what compare.json lacks; then make the table and both figures of all that it holds.

    A run that was killed goes on, but its seconds are then those of its last session: begin it anew for the table.
    """
    unlike = write_concept_folder(work / "zorb", PICTURES)
    write_prior(work / "prior")
    prompts = concept_prompts(100, unlike=unlike)

    if not any(r.way == BASE for r in read_results()):
        keep(Result(BASE, 0, 0, **measure(StableDiffusion.from_pretrained("tabletop"), prompts), seconds=0.0, size=0))

    for way in (way for way in WAYS if not ways or way.name in ways):
        for number in seed or [0]:
            if any((r.way, r.seed, r.step) == (way.name, number, steps) for r in read_results()):
                continue
            seconds, folder = train(way, number, steps, work), folder_of(way, number, work)
            for state in saved_states(folder) if every else saved_states(folder)[-1:]:
                step = int(state.name.split("-")[1])
                found = measure(taught(way, state), prompts)
                result = Result(
                    way.name, number, step, **found, seconds=seconds * step / steps, size=nbytes(state / way.file)
                )
                print(result, flush=True)
                keep(result)

    write_tables()
    learning_curves(read_results()).savefig(DOCS / "learning.png", dpi=100)
    sheet(work).save(DOCS / "concept.png", optimize=True)


if __name__ == "__main__":
    typer.run(main)
