"""What a larger text encoder buys: ``python -m finetune.pretrain.versions build/v1 build/v2``.

Each folder is the work of `finetune.pretrain.clip` (one of them with ``--text v2``) and of
`finetune.pretrain.noise_predictor`, with the same pictures and steps. The table is written to versions.json and into
docs/latent-diffusion.md, the pictures to docs/versions.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from finetune.pretrain.clip import RESULTS as OF_CLIP
from finetune.pretrain.evaluate import PROMPT_SEED, both_right, draw, relation_prompts, relation_right, single
from finetune.pretrain.probe import load_probe
from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.scenes import sample_scenes
from sdkit.files import read_json, replace_section, write_text
from sdkit.images.sheet import contact_sheet
from sdkit.stable_diffusion import StableDiffusion

RESULTS = Path(__file__).with_suffix(".json")
DOCS = Path("docs")
SECTION = "versions"
NAMES = ("v1, last layer", "v2, last but one")
PROMPTS = (
    "a red cube and a blue sphere", "a green cone and a yellow torus", "a white cylinder behind a purple sphere",
    "a cyan torus to the left of a red cone", "three blue cubes", "a blue cube to the right of a yellow cone",
)  # fmt: skip
SEED, GUIDANCE, STEPS = 1000, 7.5, 30

Figures = dict[str, float]


def measure(sd: StableDiffusion, count: int) -> Figures:
    """What the pictures of a model show, in per cent of ``count`` for each kind of prompt."""
    probe, figures = load_probe(size=sd.picture_size[0]), Figures()
    one = sample_scenes(count, PROMPT_SEED, counts=(1.0, 0.0, 0.0))
    texts = captions(one, PROMPT_SEED)
    found = single(texts, one, draw(sd, probe, texts, SEED, GUIDANCE, STEPS))
    figures["one object: colour and shape right"] = found["colour and shape right"]

    two = sample_scenes(count, PROMPT_SEED + 2, counts=(0.0, 1.0, 0.0))
    verdicts = draw(sd, probe, captions(two, PROMPT_SEED + 2), SEED, GUIDANCE, STEPS)
    figures["two objects: both right"] = both_right(two, verdicts)

    for name, sides in (("left and right", ("left", "right")), ("in front and behind", ("front", "behind"))):
        pairs, chosen, prompts = relation_prompts(count, sides)
        verdicts = draw(sd, probe, prompts, SEED, GUIDANCE, STEPS)
        figures[f"{name}, where both are there (chance 50)"] = relation_right(pairs, chosen, verdicts)
    return figures


def parameters_of(sd: StableDiffusion) -> float:
    """Of the text encoder, in millions."""
    return sum(p.numel() for p in sd.text_encoder.parameters()) / 1e6


def table(results: dict[str, Figures]) -> str:
    """A row a figure, a column a version."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    rows = next(iter(results.values()))
    lines += [f"| {row} | " + " | ".join(f"{own[row]:.1f}" for own in results.values()) + " |" for row in rows]
    return "\n".join(lines)


def sheet(models: dict[str, StableDiffusion]) -> Image.Image:
    """A row of PROMPTS for each version."""
    images: list[Image.Image] = []
    for sd in models.values():
        images += sd.text_to_image(list(PROMPTS), seed=1, num_inference_steps=STEPS, progress=False).images
    texts = [f"{name}: {prompt}" for name in models for prompt in PROMPTS]
    return contact_sheet(images, len(PROMPTS), texts)


def main(
    works: Annotated[tuple[Path, Path], typer.Argument(help="The work folders of v1 and of v2.")],
    count: Annotated[int, typer.Option(help="Pictures for each figure.", min=1)] = 100,
) -> None:
    """Measure both and write the table and the pictures."""
    models = {
        name: StableDiffusion.from_pretrained(work / "model", device="cpu")
        for name, work in zip(NAMES, works, strict=True)
    }
    results: dict[str, Figures] = {}
    for (name, sd), work in zip(models.items(), works, strict=True):
        of_text = {f"CLIP: {key}, %": float(value) for key, value in read_json(work / "clip" / OF_CLIP).items()}
        drawn = {f"{key}, %": value for key, value in measure(sd, count).items()}
        results[name] = {"text encoder, million parameters": parameters_of(sd)} | of_text | drawn

    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    replace_section(DOCS / "latent-diffusion.md", SECTION, table(results))
    sheet(models).save(DOCS / "versions.png", optimize=True)
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
