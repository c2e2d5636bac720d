"""Record pictures, files and the weights after 20 steps of each trainer, to compare two versions to the bit.

python -m tests.recording FOLDER [part ...]         parts: pictures files trainers (all by default)
python -m tests.recording --compare BEFORE AFTER    exit 1 where anything differs
python -m tests.recording --small                   writes tests/recorded.npz and .json, which test_recording.py reads

Run it on one machine with OMP_NUM_THREADS=1: the last bit depends on the processor and on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune
import sdkernels
import sdkit

TESTS = Path(__file__).parent
SAMPLERS = [
    "ddpm",
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm2",
    "dpm2_a",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_2s_a",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "unipc",
    "deis",
    "lcm",
    "tcd",
]
PROMPT = "a large shiny red sphere on a wooden table"


def picture(seed: int, side: int = 64) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def mask(side: int = 64) -> Image.Image:
    white = np.zeros((side, side), np.uint8)
    white[12:45, 20:52] = 255
    return Image.fromarray(white)


def redder(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))], 1)


def depth_model(folder: Path) -> sdkit.StableDiffusion:
    """The shipped model with a fifth channel."""
    sdkit.StableDiffusion.from_pretrained("tabletop").save_pretrained(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 5}))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, 0.3 * weight[:, :1]], 1).contiguous()
    save_file(state, file, {"format": "pt"})
    return sdkit.StableDiffusion.from_pretrained(folder)


def cases(folder: Path, steps: int = 8) -> dict[str, Callable[[], sdkit.Output]]:
    """Functions by name that make pictures, of every sampler, task and option. A depth model is laid in ``folder``."""
    sd = sdkit.StableDiffusion.from_pretrained("tabletop")
    common: dict[str, Any] = {"num_inference_steps": steps, "seed": 11, "progress": False}
    two = ["a red cube and a blue sphere", "(a green cone:1.4) and [a torus] BREAK on a black table"]
    found: dict[str, Callable[[], sdkit.Output]] = {
        f"sampler {name}": (lambda name=name: sd.text_to_image(PROMPT, sampler=name, **common)) for name in SAMPLERS
    }
    more: dict[str, dict[str, Any]] = {
        "two prompts": {"prompt": two, "negative_prompt": "a white cube", "num_images_per_prompt": 2},
        "long": {"prompt": "a red sphere and " * 30, "negative_prompt": ["a (black:0.5) table"]},
        "clip skip": {"prompt": PROMPT, "clip_skip": 1, "prompt_weighting": False},
        "karras": {"prompt": PROMPT, "sampler": "dpmpp_2m", "sigmas": "karras"},
        "beta": {"prompt": PROMPT, "sampler": "euler", "sigmas": "beta", "timestep_spacing": "linspace"},
        "eta": {"prompt": PROMPT, "sampler": "ddim", "eta": 0.7},
        "no guidance": {"prompt": PROMPT, "guidance_scale": 1.0},
        "unconditional": {"prompt": "", "guidance_scale": 0.0},
        "rescale": {"prompt": PROMPT, "guidance_rescale": 0.7, "guidance_interval": (0.3, 6.0)},
        "threshold": {"prompt": PROMPT, "dynamic_threshold": 0.99, "clip_sample_range": 3.0, "sample_max_value": 6.0},
        "classifier": {
            "prompt": "",
            "guidance_scale": 0,
            "classifier": redder,
            "class_labels": [1],
            "classifier_scale": 30.0,
        },
        "variation": {"prompt": PROMPT, "variation_seed": 5, "variation_strength": 0.3, "num_images_per_prompt": 2},
        "hires": {"prompt": PROMPT, "hires_scale": 1.5, "hires_strength": 0.4, "hires_steps": 6},
        "size": {"prompt": PROMPT, "height": 96, "width": 128, "vae_tiling": True},
        "split": {"prompt": PROMPT, "num_images_per_prompt": 3, "max_batch_size": 2},
        "seeds": {
            "prompt": PROMPT,
            "seed": [4, 9],
            "num_images_per_prompt": 2,
            "attention_maps": True,
            "preview_every": 3,
        },
        "generator": {"prompt": PROMPT, "seed": None, "generator": torch.Generator().manual_seed(3)},
    }
    found |= {name: (lambda a=arguments: sd.text_to_image(**common | a)) for name, arguments in more.items()}
    for strength in (0.0, 0.4, 1.0):
        found[f"img2img {strength}"] = lambda s=strength: sd.image_to_image(PROMPT, picture(1), s, **common)
    found["img2img many"] = lambda: sd.image_to_image(
        two, [picture(1, 80), picture(2, 96)], 0.6, height=64, width=64, sampler="pndm", **common
    )
    found["inpaint"] = lambda: sd.inpaint(PROMPT, picture(1), mask(), 0.9, mask_blur=3, **common)
    found["inpaint unipc"] = lambda: sd.inpaint(PROMPT, picture(1), mask(), sampler="unipc", **common)
    deep = depth_model(folder / "depth-model")
    depth = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    found["depth"] = lambda: deep.depth_to_image(PROMPT, picture(1), depth, 0.7, **common)
    return found


def record_pictures(folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, make in cases(folder).items():
        out = make()
        arrays[f"{name}/latents"] = out.latents.numpy()
        arrays[f"{name}/pictures"] = np.stack([np.asarray(image) for image in out.images])
        facts = [json.dumps({k: v for k, v in i.info.items() if k != "files"}, sort_keys=True) for i in out.images]
        arrays[f"{name}/facts"] = np.array(facts)
        for n, preview in enumerate(out.previews):
            arrays[f"{name}/preview {n}"] = np.stack([np.asarray(image) for image in preview.images])
        if out.attention_maps is not None:
            arrays[f"{name}/maps"] = out.attention_maps.values.numpy()
    np.savez_compressed(folder / "pictures.npz", **arrays)


def digest(path: Path) -> str:
    """Of a file's bytes; of a pickle the content's, as its bytes hold addresses."""
    if path.suffix in (".pt", ".bin"):
        return hashlib.sha256(repr(_plain(torch.load(path, weights_only=True))).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), list(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def write_digests(folder: Path, name: str) -> None:
    found = {str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder.parent / f"{name}.json").write_text(json.dumps(found, indent=1))


def record_files(folder: Path) -> None:
    out = folder / "files"
    out.mkdir()
    sd = sdkit.StableDiffusion.from_pretrained("tabletop")
    sd.save_pretrained(out / "folder")
    sd.save_pretrained(out / "half", dtype=torch.float16)
    sd.save_single_file(out / "single.safetensors")
    sdkit.StableDiffusion.from_single_file(out / "single.safetensors").save_pretrained(out / "again")
    torch.manual_seed(1)
    finetune.add_lora(sd, rank=4, alpha=2, targets="transformer", text_encoder=True)
    for network in (sd.unet, sd.text_encoder):
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
    for format, name in (("diffusers", "lora-d"), ("kohya", "lora-k.safetensors"), ("peft", "lora-p")):
        finetune.save_lora(sd, out / name, format=format)
    images = sd.text_to_image("a red sphere", seed=2, num_inference_steps=4, progress=False).latents
    finetune.merge(sd)
    merged = sd.text_to_image("a red sphere", seed=2, num_inference_steps=4, progress=False).latents
    finetune.remove(sd)
    finetune.load_lora(sd, out / "lora-k.safetensors", scale=0.7, name="style")
    tagged = sd.text_to_image("a red sphere<lora:style:-0.5>", seed=2, num_inference_steps=4, progress=False).latents
    finetune.remove(sd)
    torch.manual_seed(2)
    network = finetune.Hypernetwork([128], (1, 2, 1), "swish", "Normal", is_layer_norm=True)
    network.save(out / "hyper.pt")
    finetune.load_hypernetwork(sd, out / "hyper.pt", 0.8, name="h")
    hyper = sd.text_to_image("a red sphere<hypernet:h:0.4>", seed=2, num_inference_steps=4, progress=False).latents
    save_file({"lora": images, "merged": merged, "tagged": tagged, "hyper": hyper}, out / "latents.safetensors")
    write_digests(out, "files")


TRAINERS: dict[str, tuple[str, ...]] = {
    "train_lora": (
        "--random-flip",
        "--caption-dropout",
        "0.1",
        "--train-text-encoder",
        "--loraplus-lr-ratio",
        "4",
        "--learning-rate",
        "1e-3",
        "--ema-decay",
        "0.9",
        "--snr-gamma",
        "5",
    ),
    "train_hypernetwork": ("--learning-rate", "1e-3", "--lr-warmup-steps", "5"),
    "train_textual_inversion": ("--token", "zorb", "--init", "torus", "--vectors", "2"),
    "train_unet": ("--learning-rate", "1e-4", "--noise-offset", "0.05"),
    "train_vae_decoder": ("--learning-rate", "1e-4", "--ema-decay", "0.9", "--lr-scheduler", "cosine"),
}


def record_trainers(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    for n in range(6):
        picture(n, 64 if n % 2 else 80).save(data / f"{n}.png")
        (data / f"{n}.txt").write_text(f"a zorb number {n}, on a table")
    for script, options in TRAINERS.items():
        out = folder / script
        command = [
            sys.executable,
            "-m",
            f"finetune.{script}",
            "--data",
            str(data),
            "--output",
            str(out),
            "--max-train-steps",
            "20",
            "--train-batch-size",
            "2",
            "--num-validation-images",
            "0",
            *options,
        ]
        path = os.pathsep.join(str(Path(p.__file__).parents[1]) for p in (sdkit, sdkernels))
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=folder)

        tensors = {p.name: p for p in (*out.rglob("*.safetensors"), *out.rglob("*.pt")) if "cache" not in p.parts}
        files = {n: digest(p) for n, p in sorted(tensors.items()) if "checkpoint" not in str(p.relative_to(out))}
        losses = (out / "losses.csv").read_text()
        (folder / f"{script}.json").write_text(json.dumps({"files": files, "losses": losses}, indent=1))


PARTS = {"pictures": record_pictures, "files": record_files, "trainers": record_trainers}


def compare(before: Path, after: Path) -> list[str]:
    """What differs."""
    found: list[str] = []
    if (before / "pictures.npz").exists():
        a, b = np.load(before / "pictures.npz"), np.load(after / "pictures.npz")
        found += [f"pictures: {name} is in one alone" for name in set(a.files) ^ set(b.files)]
        found += [f"pictures: {n}" for n in a.files if n in b.files and not np.array_equal(a[n], b[n])]
    for file in sorted(before.glob("*.json")):
        if not (after / file.name).exists():
            found.append(f"{file.name} is missing")
            continue
        found += _different(json.loads(file.read_text()), json.loads((after / file.name).read_text()), file.stem)
    return found


def _different(a: Any, b: Any, where: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in _different(a.get(k), b.get(k), f"{where}: {k}")]
    return [] if a == b else [where]


# A small recording, which lies in the repository


def small_pictures(folder: Path) -> dict[str, np.ndarray]:
    """The latents of each of the cases in 3 steps, in float16."""
    return {name: make().latents.numpy().astype(np.float16) for name, make in cases(folder, steps=3).items()}


def small_files(folder: Path) -> dict[str, str]:
    """Digests of the shipped model as it is saved in each layout."""
    sd = sdkit.StableDiffusion.from_pretrained("tabletop")
    sd.save_pretrained(folder / "folder")
    sd.save_pretrained(folder / "half", dtype=torch.float16)
    sd.save_single_file(folder / "single.safetensors")
    return {str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> None:
    """Record, or compare."""
    if sys.argv[1] == "--compare":
        found = compare(Path(sys.argv[2]), Path(sys.argv[3]))
        print("\n".join(found) or "equal")
        sys.exit(bool(found))

    if sys.argv[1] == "--small":
        with tempfile.TemporaryDirectory() as folder:
            np.savez_compressed(TESTS / "recorded.npz", **small_pictures(Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            (TESTS / "recorded.json").write_text(json.dumps(small_files(Path(folder)), indent=1) + "\n")
        return

    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for part in sys.argv[2:] or PARTS:
        PARTS[part](folder)


if __name__ == "__main__":
    main()
