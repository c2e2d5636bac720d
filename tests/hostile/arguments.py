"""Public functions called with arguments that make no sense: `python -m tests.hostile.arguments FIRST COUNT`."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import finetune
import sdkit
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.textual_inversion import load_textual_inversion
from sdkit.checkpoints.vae_file import load_vae_file
from sdkit.generation.options import Settings
from sdkit.images.sheet import contact_sheet
from sdkit.stable_diffusion import StableDiffusion
from tests.hostile.mutations import ODD
from tests.hostile.subjects import shared
from tests.hostile.trying import verdict

PICTURE = Image.new("RGB", (16, 16), "red")
MASK = Image.new("L", (16, 16), 255)
STRANGE: tuple[Any, ...] = (
    *ODD, -5, 0.5, 10**12, 1e30, float("-inf"), b"bytes", object(), ..., lambda: None, lambda *a, **k: 1 / 0, int,
    set(), {1, 2}, (), (1, 2), (0.0, 1.0), range(3), torch.zeros(0), torch.zeros(3), torch.zeros(1, 4, 8, 8),
    torch.ones(2, 77, 16), torch.full((1, 4, 8, 8), float("nan")), torch.zeros(1, 3, 16, 16, dtype=torch.int64),
    torch.zeros(1, dtype=torch.complex64), torch.float16, torch.int8, "float16", "cuda:99", "meta",
    torch.device("meta"), PICTURE, Path("nowhere"), Path("."), "a red sphere", ["a", "b", "c"], ["a", 1], [None],
    [PICTURE, PICTURE], "euler", "karras", "pt", torch.nn.Linear(2, 2), torch.Generator(), [torch.Generator()],
    complex(1, 2), 2**64, True,
)  # fmt: skip
"""What no argument is, or another one is."""


@dataclass(frozen=True)
class Call:
    """run(**arguments) with ``good`` arguments works; any of them, or of ``others``, is replaced."""

    run: Callable[..., Any]
    good: Mapping[str, Any]
    others: tuple[str, ...] = ()


def tensors_of(found: Any) -> Iterable[Tensor]:
    """The pictures of an output."""
    images = getattr(found, "images", None)
    return [images] if isinstance(images, Tensor) else []


@cache
def files() -> Path:
    """A folder with a file of each kind."""
    folder = Path(tempfile.mkdtemp())
    sd = shared()
    sd.save_pretrained(folder / "model")
    finetune.add_lora(sd, 2, name="it")
    finetune.save_lora(sd, folder / "it.safetensors", name="it")
    finetune.remove(sd)
    PICTURE.save(folder / "a.png")
    return folder


def with_lora(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(sd, …)`` on the shared model, with a LoRA in it that is taken out afterwards."""

    def call(**arguments: Any) -> Any:
        sd = shared()
        finetune.add_lora(sd, 2, name="it")
        try:
            return run(sd, **arguments)
        finally:
            finetune.remove(sd)

    return call


def and_out(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(sd, …)`` on the shared model, which is left without adapters."""

    def call(**arguments: Any) -> Any:
        sd = shared()
        try:
            return run(sd, **arguments)
        finally:
            finetune.remove(sd) if finetune.list_adapters(sd) else None

    return call


@cache
def calls() -> dict[str, Call]:
    """The functions by their names."""
    sd, folder = shared(), files()
    settings = tuple(Settings.__dataclass_fields__)
    picture = {"prompt": "a red sphere", "num_inference_steps": 1, "seed": 1, "progress": False, "output_type": "pt"}
    alone = picture | {"height": 16, "width": 16}
    several = alone | {"prompt": ["a", "b"], "seed": [1, 2]}
    lora = {"path": folder / "it.safetensors"}
    layers = ("activation_func", "dropout_structure", "weight_initialization")
    plan = {"sampler": "euler", "schedule": sd.schedule, "num_inference_steps": 5}
    return {
        "text_to_image": Call(sd.text_to_image, alone, ("negative_prompt", "hires_scale", "hires_steps", *settings)),
        "text_to_image, several": Call(sd.text_to_image, several, settings),
        "image_to_image": Call(sd.image_to_image, picture | {"image": PICTURE, "strength": 0.5}, settings),
        "inpaint": Call(
            sd.inpaint, picture | {"image": PICTURE, "mask_image": MASK}, ("mask_blur", "strength", *settings)
        ),
        "make_plan": Call(sdkit.make_plan, plan, ("eta", "sigmas", "timestep_spacing", "solver_order", "steps_offset")),
        "NoiseSchedule": Call(
            sdkit.NoiseSchedule,
            {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
            ("prediction_type", "rescale_betas_zero_snr", "trained_betas"),
        ),
        "from_pretrained": Call(
            StableDiffusion.from_pretrained,
            {"model": folder / "model", "device": "cpu"},
            ("dtype", "vae", "text_encoder", "variant"),
        ),
        "load_lora": Call(and_out(finetune.load_lora), lora, ("scale", "name")),
        "load_adapter": Call(and_out(finetune.load_adapter), lora, ("scale", "name")),
        "add_lora": Call(and_out(finetune.add_lora), {"rank": 2}, ("alpha", "targets", "name", "dropout")),
        "set_scale": Call(with_lora(finetune.set_scale), {"scale": 0.5}, ("name",)),
        "enable": Call(with_lora(finetune.enable), {"name": "it"}),
        "save_adapter": Call(with_lora(finetune.save_adapter), {"path": folder / "out" / "it.safetensors"}, ("name",)),
        "Hypernetwork": Call(finetune.Hypernetwork, {"widths": [16], "layer_structure": [1, 2, 1]}, layers),
        "load_textual_inversion": Call(load_textual_inversion, lora, ("token", "width")),
        "load_vae_file": Call(load_vae_file, lora, ("dtype",)),
        "inspect_file": Call(inspect_file, lora),
        "save_pretrained": Call(sd.save_pretrained, {"folder": folder / "again"}, ("dtype",)),
        "contact_sheet": Call(contact_sheet, {"images": [PICTURE], "columns": 1}, ("captions",)),
    }  # fmt: skip


def try_case(case: int) -> dict[str, Any]:
    """Call one function with one or two strange arguments, as the number ``case`` says."""
    rng, known = random.Random(f"arguments {case}"), calls()
    name = rng.choice(list(known))
    call = known[name]
    names = rng.sample(pool := [*call.good, *call.others], min(rng.choice((1, 1, 1, 2)), len(pool)))
    strange = {key: rng.choice(STRANGE) for key in names}
    found, said = verdict(lambda: tensors_of(call.run(**dict(call.good) | strange)), 1 << 20)
    return {"case": case, "verdict": found, "subject": name, "what": f"{name}({str(strange)[:200]}): {said}"}


def main(first: int, count: int) -> None:
    """Try ``count`` cases."""
    torch.set_num_threads(1)
    for name, call in calls().items():
        if name not in ("load_textual_inversion", "load_vae_file"):  # there is no such file
            call.run(**call.good)
    for case in range(first, first + count):
        print(json.dumps({"case": case, "begins": True}), flush=True)
        print(json.dumps(try_case(case)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
