"""Compile what a GPU will launch before it is there, in parallel: ``python -m bench.compile --cache FOLDER``.

No GPU is needed. The launches are those of SD1's networks first, then those of the registry's hot cases of one picture
in float16 and bfloat16, then what the tests launch, and last the candidates of tuning. FOLDER is a cache of Triton's
(``TRITON_CACHE_DIR``), valid for this triton and until a kernel's lines move; it may be carried to another machine,
where this command finds what lies there, or in FOLDER.tar.xz, and compiles what is missing. It holds machine code
alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from triton import knobs

import finetune
from bench.record import Clock
from sdkernels import tuned
from sdkernels.compilation import build
from sdkernels.launches import Launch, launch_of, launches, noting
from sdkernels.op_spec import OpSpec
from sdkernels.registry import OPS
from sdkit.checkpoints.components import Components, build_text
from sdkit.checkpoints.presets import read_preset
from sdkit.networks.memory_layout import lay_out
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.stable_diffusion import StableDiffusion

HALF = (torch.float16, torch.bfloat16)
STAGES = (
    ("networks", HALF[:1]),
    ("hot", HALF),
    ("networks", HALF[1:]),
    ("tests", (*HALF, torch.float32)),
    ("tuning", HALF[:1]),
)
PURPOSES = tuple(dict.fromkeys(purpose for purpose, _ in STAGES))

_todo: list[Launch] = []  # a child of the fork finds here what to compile: a launch cannot be pickled


def wanted(purposes: Sequence[str], ops: Sequence[str], arch: int) -> list[Launch]:
    """One launch for each binary, in the order in which they are needed."""
    found: dict[str, Launch] = {}
    for purpose, dtypes in STAGES:
        for dtype in dtypes if purpose in purposes else ():
            for launch in _launches_for(purpose, [OPS[name] for name in ops], dtype, arch):
                found.setdefault(launch.binary, launch)
    return list(found.values())


def _launches_for(purpose: str, specs: Sequence[OpSpec], dtype: torch.dtype, arch: int) -> Iterator[Launch]:
    if purpose == "networks":
        yield from of_networks(dtype, arch)
    for spec in specs if purpose in ("hot", "tests") else ():
        for case in spec.one_picture if purpose == "hot" else spec.odd:
            yield from launches(spec, case, dtype, arch)
    for name, choice in tuned.CHOICES.items() if purpose == "tuning" else ():
        for tiles in choice.candidates:
            with tuned.forced(name, tiles):
                asked = [spec for spec in specs if name.startswith(spec.name)]
                yield from (one for s in asked for case in s.one_picture for one in launches(s, case, dtype, arch))


def of_networks(dtype: torch.dtype, arch: int) -> Iterator[Launch]:
    """What SD1's UNet and decoder launch for a picture with guidance, and for a LoRA training step of 4 pictures."""
    preset = read_preset("sd1")
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(preset["unet"]), AutoencoderKL.from_config(preset["vae"])
    for network in (unet, vae):
        lay_out(network.to(dtype).eval().requires_grad_(False), torch.channels_last)

    def of(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    time, width = torch.empty(1, device="meta"), preset["unet"]["cross_attention_dim"]
    with noting(arch, "auto") as noted:
        with torch.no_grad():
            contexts, times = unet.context_kv(of(2, 77, width)), unet.time_projections(time)
            unet(of(2, 4, 64, 64), time, None, context_kv=contexts, time_projections=times)
            vae.decode(of(1, 4, 64, 64))

        text = build_text(preset["text_encoder"], "sd1")
        sd = StableDiffusion(Components(unet, vae, text, clip_tokenizer(), preset["scheduler"]))
        for parameter in finetune.add_lora(sd, rank=8):
            parameter.data = parameter.data.float()
        unet(of(4, 4, 64, 64), time, of(4, 77, width)).float().square().mean().backward()

    known = {"op": "", "case": "SD1", "ideal": 0, "dtype": str(dtype).removeprefix("torch."), "backward": False}
    return (launch_of(one, arch, **known) for one in noted)


def archive_of(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}.tar.xz")


def settle(cache: Path) -> None:
    """Unpack a cache that was carried here, and let its entries name the files that lie here."""
    if archive_of(cache).is_file() and not cache.is_dir():
        shutil.unpack_archive(archive_of(cache), cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))


def _compile(number: int) -> str:
    """Compile a launch of ``_todo``; returns what went wrong."""
    launch = _todo[number]
    try:
        build(launch)
    except Exception as error:  # whatever the compiler raises is the finding
        return f'{launch.name} {launch.dtype} ({launch.op} "{launch.case}"): {type(error).__name__}: {error}'
    return ""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m bench.compile", description="Compile ahead, in parallel.")
    found.add_argument("--cache", type=Path, required=True, help="folder, as TRITON_CACHE_DIR will name it")
    found.add_argument("--pack", action="store_true", help="put it into FOLDER.tar.xz too, 15 times smaller")
    found.add_argument("--arch", type=int, default=90, help="90 for sm_90 (default)")
    found.add_argument("--purposes", nargs="+", choices=PURPOSES, default=PURPOSES[:3])
    found.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="the networks launch what they launch")
    found.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    found.add_argument("--seconds", type=float, default=3600.0, help="stop after this time (default: an hour)")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compile until all is there or the time is up; returns 1 where something does not compile."""
    options = parser()
    arguments = options.parse_args(argv)
    if knobs.runtime.interpret:
        options.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")

    # The cache: what lies there, and machine code alone.
    clock = Clock(arguments.seconds)
    knobs.cache.dir = str(arguments.cache.resolve())
    knobs.compilation.store_binary_only = True
    settle(arguments.cache)
    _todo[:] = wanted(arguments.purposes, arguments.op, arguments.arch)

    # By fork, so that the launches need not be found again.
    problems: list[str] = []
    done = 0
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
        for problem in pool.imap_unordered(_compile, range(len(_todo))):
            done += 1
            problems += [problem] if problem else []
            if clock.left < 0:
                break

    for problem in problems:
        print(f"FAILED: {problem}")
    if arguments.pack:
        shutil.make_archive(str(arguments.cache), "xztar", arguments.cache)
    print(f"{done} of {len(_todo)} launches compiled, {len(problems)} problems; {arguments.cache}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
