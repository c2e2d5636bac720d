"""Measure a tabletop model's editing of given pictures: ``python -m finetune.pretrain.editing``.

Inpainting: in a render of one object, the box around it is repainted by the prompt for another object; it is right when
the object that the probe is surest of has the new colour and shape. Image-to-image: the same without a mask, at growing
strength; the share of pictures that show the prompt's object rises as that of the input's falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from finetune.pretrain.probe import Probe, load_probe, look
from finetune.pretrain.world.captions import single_prompt
from finetune.pretrain.world.pictures import SIZE
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, TABLES, sample_scenes
from sdkit.checkpoints.loading import MODELS
from sdkit.files import replace_section, section
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet, enlarged
from sdkit.stable_diffusion import StableDiffusion

SCENE_SEED = 4_000_001
STRENGTHS = (0.0, 0.2, 0.5, 0.8, 1.0)
MARGIN = SIZE // 16  # pixels of the mask around the object
SECTION = "editing"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Cases:
    """Renders of one object each, and another object that is to take its place."""

    pictures: Tensor  # [N, 3, SIZE, SIZE] in [0, 1]
    masks: Tensor  # [N, 1, SIZE, SIZE], 1 in the box around the object
    old: list[Pair]  # colour and shape
    new: list[Pair]  # both of them others
    tables: list[str]

    @property
    def prompts(self) -> list[str]:
        """The plain captions of the new objects."""
        return [f"{single_prompt(*pair)} on a {table} table" for pair, table in zip(self.new, self.tables, strict=True)]

    def __len__(self) -> int:
        return len(self.new)

    def __getitem__(self, part: slice) -> Cases:
        return Cases(self.pictures[part], self.masks[part], self.old[part], self.new[part], self.tables[part])


def cases(count: int, seed: int = SCENE_SEED) -> Cases:
    """``count`` cases, on scenes that training never saw."""
    scenes = sample_scenes(count, seed, counts=(1.0, 0.0, 0.0))
    rendered = render(scenes, SIZE)
    g = torch.Generator().manual_seed(seed)
    color = (scenes.color[:, 0] + torch.randint(1, len(COLORS), (count,), generator=g)) % len(COLORS)
    shape = (scenes.shape[:, 0] + torch.randint(1, len(SHAPES), (count,), generator=g)) % len(SHAPES)

    masks = torch.zeros(count, 1, SIZE, SIZE)
    for mask, instance in zip(masks, rendered.masks, strict=True):
        rows, columns = (instance > 0).any(1).nonzero(), (instance > 0).any(0).nonzero()
        top, left = max(0, int(rows.min()) - MARGIN), max(0, int(columns.min()) - MARGIN)
        mask[:, top : int(rows.max()) + MARGIN + 1, left : int(columns.max()) + MARGIN + 1] = 1

    old = [(COLORS[scenes.color[i, 0]], SHAPES[scenes.shape[i, 0]]) for i in range(count)]
    new = [(COLORS[color[i]], SHAPES[shape[i]]) for i in range(count)]
    tables = [TABLES[table] for table in scenes.table.tolist()]
    return Cases((rendered.images * 255).round() / 255, masks, old, new, tables)


def shown(probe: Probe, images: list[Image.Image]) -> list[Pair | None]:
    """Colour and shape of the object that the probe is surest of."""
    pixels = _pixels(images).permute(0, 3, 1, 2) / 127.5 - 1
    first = [verdict.objects[0] if verdict.objects else None for verdict in look(probe, pixels)]
    return [None if seen is None else (seen["color"], seen["shape"]) for seen in first]


def share(seen: list[Pair | None], wanted: list[Pair]) -> float:
    """How many of the objects are the wanted ones, in per cent."""
    return 100 * sum(a == b for a, b in zip(seen, wanted, strict=True)) / len(wanted)


def inpaint(sd: StableDiffusion, which: Cases, seed: int, steps: int, guidance: float) -> list[Image.Image]:
    """The cases, their boxes repainted."""
    return sd.inpaint(
        which.prompts,
        which.pictures,
        which.masks,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=seed,
        progress=False,
        max_batch_size=50,
    ).images


def kept_are_identical(which: Cases, images: list[Image.Image]) -> bool:
    """Whether every pixel outside the masks is the render's, to the bit."""
    originals = to_pil(which.pictures * 2 - 1)
    return bool((_pixels(originals) == _pixels(images))[which.masks[:, 0] == 0].all())


def _pixels(images: list[Image.Image]) -> Tensor:
    """[N, SIZE, SIZE, 3], uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def seams(which: Cases, images: list[Image.Image]) -> float:
    """The mean absolute difference, of 255, of two neighbours of which the mask keeps one: what a seam adds to the few
    that there are on a table."""
    values, mask = _pixels(images).float().mean(3), which.masks[:, 0]
    jumps = [values.diff(dim=axis).abs()[mask.diff(dim=axis) != 0] for axis in (1, 2)]
    return torch.cat(jumps).mean().item()


def along_strength(
    sd: StableDiffusion, which: Cases, seed: int, steps: int, guidance: float
) -> dict[float, list[Image.Image]]:
    """The cases by image-to-image at each of STRENGTHS."""
    images: dict[float, list[Image.Image]] = {}
    for strength in STRENGTHS:
        out = sd.image_to_image(
            which.prompts,
            which.pictures,
            strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            progress=False,
            max_batch_size=50,
        )
        images[strength] = out.images

    return images


def difference(which: Cases, images: list[Image.Image]) -> float:
    """Root mean square difference to the renders, of 255."""
    originals = to_pil(which.pictures * 2 - 1)
    return float((_pixels(originals).float() - _pixels(images).float()).square().mean().sqrt())


def sheet(which: Cases, columns: dict[str, list[Image.Image]]) -> Image.Image:
    """A row for each case: the input, then its pictures under their headings; the prompt stands below the last."""
    inputs = to_pil(which.pictures * 2 - 1)
    pictures: list[Image.Image] = []
    texts: list[str] = []
    for i, prompt in enumerate(which.prompts):
        row = [("input", inputs[i]), *((name, images[i]) for name, images in columns.items())]
        pictures += [enlarged(image, 128) for _, image in row]
        texts += [name for name, _ in row[:-1]] + [f"{row[-1][0]}: {prompt}"]
    return contact_sheet(pictures, len(columns) + 1, texts)


def main(
    model: Annotated[Path, typer.Argument(help="The model's folder, with its README.md.")] = MODELS / "tabletop",
    count: Annotated[int, typer.Option(help="Cases.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.", min=0)] = 1000,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    out: Annotated[Path, typer.Option(help="Folder for inpaint.png and img2img.png.")] = Path("docs"),
) -> None:
    """Measure the model, draw its figures, and write the table into its README.md; of a network that sees the mask
    inpainting alone."""
    readme = model / "README.md"
    section(readme, SECTION)  # that it has one is known before hours have passed
    sd, probe, which = StableDiffusion.from_pretrained(model, device="cpu"), load_probe(), cases(count)
    painted = inpaint(sd, which, seed, steps, guidance)
    lines = [
        f"Inpainting: {share(shown(probe, painted), which.new):.0f} % of {count} show the new object; kept pixels "
        f"identical: {'yes' if kept_are_identical(which, painted) else 'NO'}; neighbours across the mask's edge differ "
        f"by {seams(which, painted):.1f} of 255, in the renders by {seams(which, to_pil(which.pictures * 2 - 1)):.1f}."
    ]
    out.mkdir(exist_ok=True)
    few = which[:4]
    sheet(few, {"repainted": painted[:4]}).save(out / "inpaint.png", optimize=True)

    if sd.unet.config.in_channels == sd.vae.config.latent_channels:
        moved = along_strength(sd, which, seed, steps, guidance)
        lines += [
            "",
            "| image-to-image at strength | input's object seen, % | prompt's object seen, % | RMS change of 255 |",
            "|---|---|---|---|",
        ]
        for strength, images in moved.items():
            seen = shown(probe, images)
            lines.append(
                f"| {strength} | {share(seen, which.old):.0f} | {share(seen, which.new):.0f} "
                f"| {difference(which, images):.1f} |"
            )
        sheet(few, {f"{s:g}": images[:4] for s, images in moved.items()}).save(out / "img2img.png", optimize=True)

    text = "\n".join(lines)
    print(text)
    replace_section(readme, SECTION, text)


if __name__ == "__main__":
    typer.run(main)
