"""Measure the gain of fine-tuning the shipped VAE's decoder: ``python -m finetune.pretrain.compare_decoder`` (minutes).

Two cases that the VAE has never seen: a new surface (striped zorbs), and real photographs, cut from the two that come
with scikit-learn (by danielbuechele and vultilion on Flickr, CC BY 2.0). What is measured was not trained on: other
renders, and the right part of each photograph. The figures lie in compare_decoder.json, from which the table in
finetune/README.md and docs/latent-diffusion.md is made; the picture is docs/decoder.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

import finetune
from finetune.pretrain.concept import write_concept_folder
from finetune.pretrain.world.pictures import SIZE
from finetune.train_vae_decoder import DecoderData, pixels, validation_views
from finetune.vae_decoder.metrics import measure
from sdkit.checkpoints.loading import load_vae
from sdkit.checkpoints.vae_file import load_vae_file
from sdkit.files import replace_section, write_text
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet, enlarged
from sdkit.networks.vae import AutoencoderKL

RESULTS = Path(__file__).with_suffix(".json")
SECTION = "decoder"
OPTIONS = ("--max-train-steps", "150", "--train-batch-size", "8", "--random-flip", "--learning-rate", "5e-4",
           "--lr-scheduler", "cosine", "--lr-warmup-steps", "20", "--ema-decay", "0.99", "--num-validation-images",
           "0")  # fmt: skip
TRAINED, UNSEEN = 48, 24
CASES = {"striped": "a new surface, striped", "photographs": "real photographs"}


def write_photographs(folder: Path) -> None:
    """Write both photographs in pieces of SIZE × SIZE: ``folder/data``, and of the right part ``folder/unseen``."""
    from sklearn.datasets import load_sample_images

    for kind in ("data", "unseen"):
        (folder / kind).mkdir(parents=True, exist_ok=True)

    for number, array in enumerate(load_sample_images().images):
        whole = Image.fromarray(array)
        columns, rows = whole.width // SIZE, whole.height // SIZE
        for column in range(columns):
            for row in range(rows):
                x, y = column * SIZE, row * SIZE
                kind = "unseen" if column >= columns - 2 else "data"
                whole.crop((x, y, x + SIZE, y + SIZE)).save(folder / kind / f"{number}-{column}-{row}.png")


def write_striped(folder: Path) -> None:
    """Write renders of striped zorbs: ``folder/data`` to train on, ``folder/unseen`` to measure."""
    write_concept_folder(folder / "data", TRAINED, seed=0)
    write_concept_folder(folder / "unseen", UNSEEN, seed=77)


def unseen(vae: AutoencoderKL, folder: Path) -> list[Tensor]:
    """The pictures that are measured, each [1, 3, SIZE, SIZE] in [-1, 1]."""
    return [pixels(view) for view in validation_views(vae, DecoderData(folder / "unseen"))]


def train(folder: Path) -> float:
    """Run the script on ``folder/data``; returns its seconds. It writes ``folder/run/vae.safetensors``."""
    command = [
        sys.executable,
        "-m",
        "finetune.train_vae_decoder",
        "--data",
        str(folder / "data"),
        "--validation-data",
        str(folder / "unseen"),
        "--output",
        str(folder / "run"),
        *OPTIONS,
    ]

    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def table(results: dict[str, dict[str, float]]) -> str:
    """A row for each case."""
    lines = [
        "| unseen pictures of | PSNR before, dB | after | SSIM before | after | file | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        lines.append(
            f"| {CASES[name]} | {r['PSNR before']:.2f} | {r['PSNR after']:.2f} | {r['SSIM before']:.3f} "
            f"| {r['SSIM after']:.3f} | {r['bytes'] / 1e6:.1f} MB | {r['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def sheet(rows: Sequence[tuple[Sequence[Tensor], AutoencoderKL, AutoencoderKL]]) -> Image.Image:
    """For each case three of its pictures: as they are, out of the base's decoder, out of the new one."""
    images: list[Image.Image] = []
    for pictures, base, trained in rows:
        for x in pictures:
            images += [enlarged(to_pil(y.clamp(-1, 1))[0], 128) for y in (x, base(x), trained(x))]
    return contact_sheet(images, 9, ("picture", "before", "after") * (len(images) // 3))


def main(work: Annotated[Path, typer.Option(help="Pictures and runs.")] = Path("build/compare_decoder")) -> None:
    """Train both decoders, measure them, and make the table and the figure."""
    base = load_vae("tabletop", dtype=torch.float32)
    results: dict[str, dict[str, float]] = {}
    rows: list[tuple[list[Tensor], AutoencoderKL, AutoencoderKL]] = []

    for name, write in (("striped", write_striped), ("photographs", write_photographs)):
        folder = work / name
        write(folder)
        pictures, seconds = unseen(base, folder), train(folder)
        file = folder / "run" / "vae.safetensors"
        trained = load_vae_file(file)
        found = {
            f"{k} {when}": v
            for when, vae in (("before", base), ("after", trained))
            for k, v in measure(vae, pictures).items()
        }
        results[name] = {**found, "seconds": seconds, "bytes": file.stat().st_size}
        rows.append((pictures[:: len(pictures) // 3][:3], base, trained))

    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    print(table(results))
    sheet(rows).save("docs/decoder.png", optimize=True)
    for document in (Path(finetune.__file__).parent / "README.md", Path("docs/latent-diffusion.md")):
        replace_section(document, SECTION, table(results))


if __name__ == "__main__":
    typer.run(main)
