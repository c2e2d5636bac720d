"""Ours beside diffusers on a CPU, with the same weights: a call of a UNet of SD1's size, a picture, a whole process.

    python -m bench.cpu [--rounds 7] [--parts unet picture process] [--out FILE]

Implementations take turns, round by round, and a ratio is that of their medians, so that what else the machine does
falls on both. diffusers runs in each memory layout, and its faster one counts. "picture" is 30 steps of the shipped
model with guidance; "process" a new Python that imports, loads that model and draws it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.networks import SIDE, our_model, plain_pipeline
from sdkit.checkpoints.loading import MODELS, load
from sdkit.checkpoints.presets import read_preset
from sdkit.networks.memory_layout import lay_out
from sdkit.networks.unet import UNet2DConditionModel

PARTS = ("unet", "picture", "process")
PROMPT, STEPS = "a large shiny red sphere on a wooden table", 30
ALIKE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far predictions may lie apart, relative to their norm."""

OURS = f"""
from sdkit import StableDiffusion
sd = StableDiffusion.from_pretrained("tabletop")
sd.text_to_image({PROMPT!r}, num_inference_steps={STEPS}, seed=0, progress=False)
"""
THEIRS = f"""
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe({PROMPT!r}, num_inference_steps={STEPS}, height=HEIGHT, width=WIDTH)
"""

Calls = Mapping[str, Callable[[], Any]]


def take_turns(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def unet_calls(dtype: torch.dtype) -> Calls:
    """Calls of SD1's UNet for one picture with guidance; weights are random and the same.

    Raises ValueError where the predictions differ.
    """
    import diffusers

    config, generator = read_preset("sd1")["unet"], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ours = UNet2DConditionModel.from_config(config).to(dtype).eval().requires_grad_(False)
    sample = torch.randn(2, 4, 64, 64, generator=generator).to(dtype)
    text = torch.randn(2, 77, 768, generator=generator).to(dtype)
    weights = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    lay_out(ours)

    @torch.no_grad()
    def our_call() -> torch.Tensor:
        return ours(sample, 500, None, context_kv=context, time_projections=times)

    def their_call(layout: torch.memory_format) -> Callable[[], torch.Tensor]:
        with torch.device("meta"):
            theirs: Any = diffusers.UNet2DConditionModel.from_config(config)
        theirs.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
        theirs.eval().requires_grad_(False).to(memory_format=layout)
        return torch.no_grad()(lambda: theirs(sample, 500, text, return_dict=False)[0])

    with torch.no_grad():
        context, times = ours.context_kv(text), ours.time_projections(torch.tensor([500.0]))
    calls = {
        "ours": our_call,
        "diffusers": their_call(torch.contiguous_format),
        "diffusers, channels-last": their_call(torch.channels_last),
    }

    found, expected = our_call().float(), calls["diffusers"]().float()
    off = float((found - expected).norm() / expected.norm())
    if not off <= ALIKE[dtype]:
        raise ValueError(f"predictions in {dtype} differ by {off:.1e} of their norm")
    return calls


def picture_calls() -> Calls:
    """Pictures of the shipped model."""
    sd = our_model()
    pipe, side = plain_pipeline(sd), SIDE * sd.vae.config.factor
    return {
        "ours": lambda: sd.text_to_image(PROMPT, seed=0, progress=False, num_inference_steps=STEPS),
        "diffusers": lambda: pipe(PROMPT, num_inference_steps=STEPS, height=side, width=side),
    }


def process_calls() -> Calls:
    """New processes that draw a picture of the shipped model."""
    folder = MODELS / "tabletop"
    side = SIDE * load(folder).vae.config.factor
    given = f"FOLDER, HEIGHT, WIDTH = {str(folder)!r}, {side}, {side}\n"

    def run(script: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)

    return {"ours": run(OURS), "diffusers": run(given + THEIRS)}


def measured(parts: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each comparison."""
    rows: list[dict[str, Any]] = []

    def add(what: str, calls: Calls, rounds: int) -> None:
        seconds = {who: statistics.median(times) for who, times in take_turns(calls, rounds).items()}
        ratio = min(time for who, time in seconds.items() if who != "ours") / seconds["ours"]
        rows.append({"what": what, "seconds": seconds, "ratio": ratio, "rounds": rounds})
        print(f"{what}: {ratio:.2f}x; " + ", ".join(f"{who} {time:.3f} s" for who, time in seconds.items()), flush=True)

    if "unet" in parts:
        for dtype in (torch.bfloat16, torch.float32):
            add(f"UNet of SD1, {str(dtype).removeprefix('torch.')}", unet_calls(dtype), rounds)
    if "picture" in parts:
        add(f"picture of the shipped model, {STEPS} steps", picture_calls(), rounds)
    if "process" in parts:
        add("process that draws it", process_calls(), rounds)
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description="Ours beside diffusers on this CPU.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    rows = measured(arguments.parts, arguments.rounds)
    if arguments.out:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        content = {"torch": torch.__version__, "machine": machine, "rows": rows}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
