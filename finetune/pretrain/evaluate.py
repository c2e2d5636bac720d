"""Measure a tabletop model with the probe and write its model card: ``python -m finetune.pretrain.evaluate MODEL``.

Prompts are captions of fresh scenes. A single object counts as right when colour and shape of the object that the probe
is surest of are those of the prompt; two objects when both are among what the probe sees. A seed takes a quarter of an
hour on two cores, and its figures are written at once: a run that was killed goes on with the next one.
"""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from finetune.pretrain import word_attention
from finetune.pretrain.autoencoder import mean_psnr, unseen_renders
from finetune.pretrain.clip import build, of_towers
from finetune.pretrain.probe import WEIGHTS, Probe, Verdict, accuracy, load_probe, look
from finetune.pretrain.world.captions import NUMBERS, WORDS, captions, group_prompt, pair_prompt
from finetune.pretrain.world.scenes import COLORS, HELD_OUT, MATERIALS, SHAPES, SIZES, TABLES, Scenes, sample_scenes
from sdkit.checkpoints.loading import MODELS
from sdkit.files import file_hash, replace_section, section, write_text
from sdkit.images.sheet import contact_sheet, enlarged
from sdkit.stable_diffusion import StableDiffusion

Group = tuple[int, str, str]
"""How many objects, and their colour and shape."""

PROMPT_SEED = 2_000_001
BATCH = 50
GRID = (
    "a red sphere", "a blue cube", "a green torus", "a yellow cylinder", "a purple cone",
    "a white sphere on a black table",
    "a large shiny orange cube on a wooden table", "a small matte cyan ball on a white table",
    "a red cube and a blue sphere", "a green cone and a yellow torus", "a white cylinder behind a purple sphere",
    "a cyan torus to the left of a red cone", "an orange sphere in front of a green cylinder",
    "a small blue cube to the right of a large yellow cone", "a blue sphere", "a red torus",
)  # fmt: skip
SECTION = "results"


def draw(
    sd: StableDiffusion,
    probe: Probe,
    prompts: Sequence[str],
    seed: int,
    guidance: float,
    steps: int,
    sampler: str | None = None,
) -> list[Verdict]:
    """The probe's verdict on a picture of each prompt; the pictures' seeds start at ``seed``."""
    verdicts: list[Verdict] = []

    for start in tqdm(range(0, len(prompts), BATCH), leave=False, mininterval=5.0):
        part = list(prompts[start : start + BATCH])
        out = sd.text_to_image(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            seed=seed + start,
            output_type="pt",
            progress=False,
        )
        images: Tensor = out.images
        verdicts += look(probe, (images * 255).round() / 127.5 - 1)

    return verdicts


def _share(values: Sequence[bool]) -> float:
    return 100 * sum(values) / max(1, len(values))


def single(prompts: Sequence[str], scenes: Scenes, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Figures for one-object prompts, in per cent; size, material and table count where the prompt names them."""
    tally: dict[str, list[bool]] = defaultdict(list)
    for i, (prompt, verdict) in enumerate(zip(prompts, verdicts, strict=True)):
        seen = verdict.objects[0] if verdict.objects else {}
        sure = verdict.probabilities[0] if verdict.objects else {}
        wanted = {"color": COLORS[scenes.color[i, 0]], "shape": SHAPES[scenes.shape[i, 0]]}
        right = all(seen.get(name) == value for name, value in wanted.items())
        tally["colour and shape right"].append(right)
        tally["colour and shape right, each with probability over 0.9"].append(
            right and sure["color"] > 0.9 and sure["shape"] > 0.9
        )
        tally["colour right"].append(seen.get("color") == wanted["color"])
        tally["shape right"].append(seen.get("shape") == wanted["shape"])
        tally[f"{wanted['shape']}: colour and shape right"].append(right)
        tally["exactly one object"].append(len(verdict.objects) == 1)
        for name, words, value in (("size", SIZES, scenes.size[i, 0]), ("material", MATERIALS, scenes.material[i, 0])):
            if any(word in prompt.split() for word in WORDS[words[value]]):
                tally[f"{name} right, where named"].append(seen.get(name) == words[value])
        if "table" in prompt:
            tally["table right, where named"].append(verdict.table == TABLES[scenes.table[i]])

    figures = {name: _share(values) for name, values in tally.items()}
    of_shapes = [figures[name] for shape in SHAPES if (name := f"{shape}: colour and shape right") in figures]
    return figures | {"worst shape": min(of_shapes)}


def both_right(scenes: Scenes, verdicts: Sequence[Verdict]) -> float:
    """How often both objects of two-object prompts are among what the probe sees, in per cent."""
    values: list[bool] = []
    for i, verdict in enumerate(verdicts):
        wanted = {(COLORS[scenes.color[i, k]], SHAPES[scenes.shape[i, k]]) for k in range(2)}
        values.append(wanted <= {(seen["color"], seen["shape"]) for seen in verdict.objects})
    return _share(values)


def as_many_as_asked(groups: Sequence[Group], verdicts: Sequence[Verdict]) -> float:
    """How often there are as many objects of the colour and shape as asked, and no others, in per cent."""
    values: list[bool] = []
    for (number, color, shape), verdict in zip(groups, verdicts, strict=True):
        seen = [(found["color"], found["shape"]) for found in verdict.objects]
        values.append(seen == [(color, shape)] * number)
    return _share(values)


def is_well_formed(verdict: Verdict) -> bool:
    """Whether the probe sees objects, and is sure of the colour and the shape of each: probabilities over 0.9."""
    sure = [min(found["color"], found["shape"]) > 0.9 for found in verdict.probabilities]
    return bool(sure) and all(sure)


def relation_right(
    pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]], sides: Sequence[str], verdicts: Sequence[Verdict]
) -> float:
    """Of pictures that hold both objects, how often the first stands as asked, in per cent (chance: 50)."""
    values: list[bool] = []
    for (first, second), side, verdict in zip(pairs, sides, verdicts, strict=True):
        place = {
            (seen["color"], seen["shape"]): where for seen, where in zip(verdict.objects, verdict.places, strict=True)
        }
        if first in place and second in place:
            axis, sign = {"left": (0, -1), "right": (0, 1), "front": (1, -1), "behind": (1, 1)}[side]
            values.append(sign * (place[first][axis] - place[second][axis]) > 0)
    return _share(values)


def relation_prompts(count: int, sides: tuple[str, str]) -> tuple[list[Any], list[str], list[str]]:
    """Pairs of objects, sides and plain prompts that state them."""
    scenes = sample_scenes(count, PROMPT_SEED + 3, counts=(0.0, 1.0, 0.0))
    pairs = [tuple((COLORS[scenes.color[i, k]], SHAPES[scenes.shape[i, k]]) for k in range(2)) for i in range(count)]
    chosen = [sides[i % 2] for i in range(count)]
    return pairs, chosen, [pair_prompt(a, b, side) for (a, b), side in zip(pairs, chosen, strict=True)]


def measure(sd: StableDiffusion, probe: Probe, seed: int, guidance: float, steps: int) -> dict[str, float]:
    """Every figure of the table for one sampling seed, in per cent."""
    one = sample_scenes(300, PROMPT_SEED, counts=(1.0, 0.0, 0.0))
    one_texts = captions(one, PROMPT_SEED)
    figures = single(one_texts, one, draw(sd, probe, one_texts, seed, guidance, steps))

    strange = sample_scenes(100, PROMPT_SEED + 1, counts=(1.0, 0.0, 0.0), held_out="only")
    verdicts = draw(sd, probe, captions(strange, PROMPT_SEED + 1), seed, guidance, steps)
    figures["left-out pairs: colour and shape right"] = single(captions(strange, PROMPT_SEED + 1), strange, verdicts)[
        "colour and shape right"
    ]

    two = sample_scenes(200, PROMPT_SEED + 2, counts=(0.0, 1.0, 0.0))
    figures["two objects: both right"] = both_right(
        two, draw(sd, probe, captions(two, PROMPT_SEED + 2), seed, guidance, steps)
    )

    alike = sample_scenes(60, PROMPT_SEED + 4, counts=(1.0, 0.0, 0.0))
    names = [(COLORS[alike.color[i, 0]], SHAPES[alike.shape[i, 0]]) for i in range(len(alike))]
    for number, words in NUMBERS.items():
        groups = [(number, *name) for name in names]
        verdicts = draw(sd, probe, [group_prompt(*group) for group in groups], seed, guidance, steps)
        figures[f"{words[0]} alike: as many, and no others"] = as_many_as_asked(groups, verdicts)

    for name, sides in (("left and right", ("left", "right")), ("in front and behind", ("front", "behind"))):
        pairs, chosen, texts = relation_prompts(60, sides)
        figures[f"{name}, where both are there (chance 50)"] = relation_right(
            pairs, chosen, draw(sd, probe, texts, seed, guidance, steps)
        )

    unguided = draw(sd, probe, one_texts[:100], seed, 0.0, steps)
    ignored = single(one_texts[:100], one[:100], unguided)
    figures["guidance 0: colour and shape right (chance about 3)"] = ignored["colour and shape right"]
    figures["guidance 0: a well-formed scene"] = _share([is_well_formed(verdict) for verdict in unguided])
    return figures


def reconstruct_clip(model: Path) -> tuple[Any, Any]:
    """transformers' CLIPModel from the folder's text encoder, image encoder and tokenizer."""
    from safetensors.torch import load_file

    from sdkit.prompts.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model / "tokenizer")
    clip = build(tokenizer)
    state = {
        k.removeprefix("text_model."): v for k, v in load_file(model / "text_encoder" / "model.safetensors").items()
    }
    clip.text_model.load_state_dict(state)
    image = load_file(model / "image_encoder" / "model.safetensors")
    clip.load_state_dict(clip.state_dict() | image)
    return clip.float().eval(), tokenizer


def table(runs: Sequence[dict[str, float]], seeds: Sequence[int]) -> str:
    """A Markdown table, a row a figure, a column a seed."""
    lines = ["| per cent | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---|" + "---|" * len(seeds)]
    lines += [f"| {name} | " + " | ".join(f"{run[name]:.1f}" for run in runs) + " |" for name in runs[0]]
    return "\n".join(lines)


def draw_grid(sd: StableDiffusion, guidance: float, steps: int) -> Image.Image:
    """A picture of each prompt of GRID; a star marks a pair that training never showed."""
    images = sd.text_to_image(GRID, num_inference_steps=steps, guidance_scale=guidance, seed=1, progress=False).images
    marked = [f"{p} *" if any(pair in HELD_OUT for pair in pairwise(p.split())) else p for p in GRID]
    return contact_sheet([enlarged(image, 128) for image in images], 8, marked)


def main(
    model: Annotated[Path, typer.Argument(help="The model's folder, with its README.md.")] = MODELS / "tabletop",
    seeds: Annotated[int, typer.Option(help="How many sampling seeds.", min=1)] = 3,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 30,
    card: Annotated[bool, typer.Option(help="Write the table and the grid into the model's README.md.")] = True,
) -> None:
    """Measure the model; with --card, write README.md's table, grid.png and results.json in its folder."""
    readme, file = model / "README.md", model / "results.json"
    if card:
        section(readme, SECTION)  # that it has one is known before hours have passed

    # What is measured for each seed.
    sd, probe = StableDiffusion.from_pretrained(model, device="cpu"), load_probe()
    measured = {"guidance": guidance, "steps": steps, "files": files_of(model)}
    chosen, runs = [1_000 * (k + 1) for k in range(seeds)], runs_of(file, measured) if card else {}
    for seed in chosen:
        if seed not in runs:
            runs[seed] = measure(sd, probe, seed, guidance, steps)
        print(table([runs[seed]], [seed]), flush=True)
        if card:
            results = {"settings": measured | machine(), "seeds": [*runs], "runs": [*runs.values()]}
            write_text(file, json.dumps(results, indent=1))

    # And what is measured once.
    clip, tokenizer = reconstruct_clip(model)
    once = {"VAE: PSNR of unseen renders, dB": mean_psnr(sd.vae, unseen_renders())}
    once |= {f"{name} look at their objects: scenes, per cent": v for name, v in word_attention.measure(sd).items()}
    once |= {f"CLIP: {name}, per cent": value for name, value in of_towers(clip, tokenizer).items()}
    once |= {f"probe on unseen renders: {name}, per cent": value for name, value in accuracy(probe).items()}
    rows = [runs[seed] for seed in chosen]
    text = table(rows, chosen) + "\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v:.2f} |" for k, v in once.items())
    print(text)

    if not card:
        return
    draw_grid(sd, guidance, steps).save(model / "grid.png", optimize=True)
    write_text(file, json.dumps({"settings": measured | machine(), "seeds": chosen, "runs": rows} | once, indent=1))
    replace_section(readme, SECTION, text)


def files_of(model: Path) -> dict[str, str]:
    """The hashes of what is measured and of what measures it."""
    parts = {name: file_hash(model / name) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    return parts | {"probe": file_hash(WEIGHTS)}


def runs_of(file: Path, measured: dict[str, Any]) -> dict[int, dict[str, float]]:
    """The figures by seed of an earlier run that has measured the same."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if {name: found.get("settings", {}).get(name) for name in measured} != measured:
        return {}
    return dict(zip(found["seeds"], found["runs"], strict=True))


def machine() -> dict[str, str]:
    """Where the figures come from."""
    return {"torch": torch.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}


if __name__ == "__main__":
    typer.run(main)
