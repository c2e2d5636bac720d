"""The commands that make pictures, and make them again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
from PIL import Image, PngImagePlugin

from sdkit import adapter_kinds
from sdkit.adapter_kinds import AdapterKind
from sdkit.cli import main as cli
from sdkit.diffusion_model import DiffusionModel
from sdkit.generation.png import read_parameters, write_png
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import read_image
from tests.sdkit.cli.conftest import FakeStableDiffusion, Run
from tests.sdkit.generation.test_comfyui import FACTS, WORKFLOW


def test_defaults_and_the_film_strip(run: Run, fake: type[FakeStableDiffusion]) -> None:
    status, out, _ = run("txt2img", "a cube", "--strip")
    assert status == 0 and fake.loaded[0] == ("tabletop", {})
    assert fake.calls[0]["preview_every"] == 4 and fake.calls[0]["num_inference_steps"] == 30
    assert sorted(os.listdir()) == ["out-strip.png", "out.png"] and "out-strip.png" in out
    assert read_image("out-strip.png").width > 8 * 160


def test_reproduce_passes_on_what_the_picture_says(run: Run, fake: type[FakeStableDiffusion]) -> None:
    run("txt2img", "a cube", "--seed", "3", "--steps", "9", "--num", "2", "--sampler", "heun", "--model", "m")
    status, out, _ = run("reproduce", "out-0002.png", "again.png")
    assert status == 0 and "again.png  seed 4" in out
    first, again = fake.calls
    not_held = ("max_batch_size", "vae_tiling")
    held = {name: value for name, value in first.items() if name not in not_held}
    assert again == {**held, "seed": 4, "width": 8, "num_images_per_prompt": 1}
    assert read_parameters("again.png") == read_parameters("out-0002.png")
    assert np.array_equal(np.asarray(read_image("again.png")), np.asarray(read_image("out-0002.png")))
    assert run("reproduce", "out-0001.png", "b.png", "--model", "other.ckpt")[0] == 0
    assert [entry[0] for entry in fake.loaded] == ["m", "m", "other.ckpt"]


def test_reproduce_says_what_is_missing(run: Run, fake: type[FakeStableDiffusion]) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.save("plain.png")
    write_png(picture, "half.png", {"prompt": "x", "seed": 1})
    write_png(picture, "anonymous.png", {"prompt": "x", "seed": 1, "num_inference_steps": 2})
    for name, message in (
        ("plain.png", "plain.png: no sdkit metadata"),
        ("half.png", "half.png: the metadata lacks num_inference_steps"),
        ("anonymous.png", "anonymous.png: the metadata names no model"),
        ("missing.png", "missing.png: no such file"),
    ):
        status, _, err = run("reproduce", name, "b.png")
        assert status == 1 and message in err and err.count("\n") == 1
    assert not fake.loaded and not Path("b.png").exists()


def test_the_real_pipeline_end_to_end(run: Run, tiny: Path) -> None:
    common = ("--model", tiny, "--steps", "4", "--seed", "11", "--device", "cpu")
    status, out, err = run("txt2img", "a red cube", *common, "--negative", "blur", "--sampler", "euler_a")
    assert (status, err) == (0, "") and out.startswith("out.png  seed 11"), err
    assert read_image("out.png").size == (16, 16)
    assert run("reproduce", "out.png", "again.png", "--device", "cpu")[0] == 0
    assert np.array_equal(np.asarray(read_image("again.png")), np.asarray(read_image("out.png")))
    assert read_parameters("again.png") == read_parameters("out.png")
    status, out, err = run(
        "txt2img", "x", *common, "--num", "2", "--strip", "--preview-every", "2", "--width", "24", "--height", "8"
    )
    assert (status, err) == (0, ""), err
    names = [f"out-000{n}{what}.png" for n in (1, 2) for what in ("", "-step00", "-step02", "-strip")]
    assert sorted(os.listdir()) == sorted(["again.png", "out.png", *names])
    assert read_image("out-0001-step02.png").size == read_image("out-0002.png").size == (24, 8)


def test_image_tasks_end_to_end_and_again(run: Run, tiny: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(colours).save("a.png")
    white = np.zeros((16, 24), np.uint8)
    white[4:, 8:] = 255
    Image.fromarray(white).save("m.png")
    assert run("convert", tiny / "vae", "vae.safetensors")[0] == 0
    common = ("--image", "a.png", "--model", tiny, "--steps", "5", "--seed", "3", "--device", "cpu")
    common += ("--vae", "vae.safetensors")
    for name, command in (("b", ("img2img", "x", "--strength", "0.4")), ("c", ("inpaint", "x", "--mask", "m.png"))):
        status, _, err = run(*command, *common, "--out", f"{name}.png")
        assert (status, err) == (0, ""), err
        assert read_image(f"{name}.png").size == (24, 16)
        assert run("reproduce", f"{name}.png", f"{name}2.png", "--device", "cpu")[0] == 0
        pair = [np.asarray(read_image(file)) for file in (f"{name}.png", f"{name}2.png")]
        assert np.array_equal(*pair) and not np.array_equal(pair[0], colours)
        assert read_parameters(f"{name}.png") == read_parameters(f"{name}2.png")
    assert np.array_equal(pair[0][white == 0], colours[white == 0])
    assert read_parameters("c.png")["files"].keys() == {"a.png", "m.png", "vae.safetensors"}
    Image.fromarray(colours[::-1].copy()).save("a.png")
    status, _, err = run("reproduce", "b.png", "again.png", "--device", "cpu")
    assert status == 1 and "a.png: not the file that made b.png" in err and err.count("\n") == 1
    Path("a.png").unlink()
    status, _, err = run("reproduce", "b.png", "again.png", "--device", "cpu")
    assert status == 1 and "a.png: no such file" in err and not Path("again.png").exists()


def test_a_lora_may_be_a_folder_of_peft(run: Run, tiny: Path) -> None:
    """And its picture is known by all that is in the folder."""
    network = StableDiffusion.from_pretrained(tiny, device="cpu").unet
    config = peft.LoraConfig(r=2, target_modules=r".*attn2\.to_k", init_lora_weights=False)
    peft.get_peft_model(cast("Any", network), config).save_pretrained("ink")

    common = ("--model", tiny, "--device", "cpu", "--steps", "2", "--seed", "4")
    for name, more in (("plain.png", ()), ("inked.png", ("--lora", "ink:0.8"))):
        status, _, err = run("txt2img", "a cat", *common, "--out", name, *more)
        assert status == 0, err
    assert not np.array_equal(np.asarray(read_image("plain.png")), np.asarray(read_image("inked.png")))

    assert run("reproduce", "inked.png", "again.png", "--device", "cpu")[0] == 0
    assert np.array_equal(np.asarray(read_image("again.png")), np.asarray(read_image("inked.png")))
    Path("ink/adapter_config.json").write_text(Path("ink/adapter_config.json").read_text().replace('"r": 2', '"r": 3'))
    status, _, err = run("reproduce", "inked.png", "again.png", "--device", "cpu")
    assert status == 1 and "ink: not the file that made inked.png" in err


@pytest.mark.parametrize("command", ["txt2img", "grid"])
def test_the_command_line_asks_first(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def load(*given: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(DiffusionModel, "load", load)
    more = ("--num", "2") if command == "grid" else ()
    status, _, err = run(command, "a cat", "--model", tiny, "--width", "33", *more)
    assert status == 1 and "width 33 is not a positive multiple of 4" in err and err.count("\n") == 1
    if command == "grid":
        status, _, err = run(command, "a cat", "--model", tiny, "--vary", "sampler=euler,magic")
        assert status == 1 and "sampler: expected one of" in err and not Path("grid.png").exists()


def save_with(name: str, **texts: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(name, pnginfo=chunks)


INFOTEXT = (
    "a [cat:dog:0.5] AND rain :0.5\nNegative prompt: [snow|fog]\nSteps: 4, Sampler: Euler, CFG scale: 6, Seed: 3, "
    "Size: 24x16, Model hash: abc, Model: theirs, Clip skip: 2, ENSD: 31337"
)


def test_reproduce_draws_what_a1111_says(run: Run, tiny: Path) -> None:
    save_with("theirs.png", parameters=INFOTEXT)
    status, _, err = run("reproduce", "theirs.png", "again.png")
    assert status == 1 and "theirs.png: made by A1111: give its model, called theirs, by --model" in err
    status, _, err = run("reproduce", "theirs.png", "again.png", "--model", tiny, "--device", "cpu")
    assert status == 0, err
    assert err.splitlines() == [
        f"theirs.png: not followed: {pair}" for pair in ("Model hash: abc", "Model: theirs", "ENSD: 31337")
    ]
    options = ("--negative", "[snow|fog]", "--steps", "4", "--sampler", "euler", "--guidance", "6", "--seed", "3")
    options += ("--width", "24", "--height", "16", "--clip-skip", "1", "--spacing", "linspace")
    common = ("--model", tiny, "--device", "cpu")
    assert run("txt2img", "a [cat:dog:0.5] AND rain :0.5", *options, *common, "--out", "ours.png")[0] == 0
    assert np.array_equal(np.asarray(read_image("again.png")), np.asarray(read_image("ours.png")))
    assert read_parameters("again.png") == read_parameters("ours.png")
    assert run("reproduce", "again.png", "once-more.png", "--device", "cpu")[0] == 0
    assert read_parameters("once-more.png") == read_parameters("again.png")


def test_reproduce_draws_what_comfyui_says(run: Run, fake: type[FakeStableDiffusion]) -> None:
    save_with("theirs.png", prompt=json.dumps(WORKFLOW), workflow="{}")
    Path("ink.v2.safetensors").write_text("x")
    status, _, err = run("reproduce", "theirs.png", "again.png", "--model", "m")
    assert (status, err) == (0, "") and fake.loaded == [("m", {})]
    assert {name: fake.calls[0][name] for name in FACTS} == FACTS


def test_reproduce_puts_in_the_files_that_are_given(
    run: Run, fake: type[FakeStableDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ink.pt", "toy.pt", "v.pt"):
        Path(name).write_text(name)
    module = types.ModuleType("tests.ink_verbs")
    module.load = lambda sd, path, weight: sd.added.append(("lora", path, weight))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(adapter_kinds, "_installed", lambda: (AdapterKind("lora", tag="lora", verbs=module.__name__),))
    save_with("theirs.png", parameters=INFOTEXT)
    files = ("--lora", "ink.pt:0.5", "--embedding", "toy.pt", "--vae", "v.pt")
    status, out, _ = run("reproduce", "theirs.png", "again.png", "--model", "m", *files)
    assert status == 0 and out.startswith("toy.pt  in prompts: <toy>, toy\nagain.png  seed 3")
    assert fake.added == [("vae", "v.pt"), ("lora", "ink.pt", 0.5), ("embedding", "toy.pt")]
    assert read_parameters("again.png")["lora"] == ["ink.pt:0.5"]


def test_reproduce_refuses_what_is_not_there(run: Run, fake: type[FakeStableDiffusion]) -> None:
    whole = {"prompt": "x", "seed": 1, "num_inference_steps": 2, "model": "m"}
    save_with("img2img.png", parameters="a\nSteps: 4, Seed: 3, CFG scale: 7, Denoising strength: 0.5")
    save_with("damaged.png", prompt="{")
    write_png(Image.new("RGB", (8, 8)), "ink.png", whole | {"adapters": {"lora": {"ink": 0.5}}})
    write_png(Image.new("RGB", (8, 8)), "toy.png", whole | {"triggers": ["<toy>"]})
    write_png(Image.new("RGB", (8, 8)), "array.png", whole | {"not_held": ["depth_map"]})
    for name, message in (
        ("img2img.png", "the metadata lacks image"),
        ("damaged.png", "damaged ComfyUI metadata"),
        ("ink.png", "made with lora ink, of which no file is known: give --lora"),
        ("toy.png", "made with embedding <toy>, of which no file is known: give --embedding"),
        ("array.png", "made with depth_map, which no metadata can hold"),
    ):
        status, _, err = run("reproduce", name, "b.png", "--model", "m")
        assert status == 1 and f"{name}: {message}" in err and err.count("\n") == 1
    Path("toy.pt").write_text("x")
    assert run("reproduce", "toy.png", "b.png", "--embedding", "toy.pt")[0] == 0
    assert len(fake.calls) == 1


def test_embeddings_and_warnings_are_told(tiny: Path, tmp_path: Path) -> None:
    """What triggers an embedding; and one line for a warning, without the place in our code."""
    torch.save({"<toy>": torch.ones(2, 16)}, tmp_path / "ink.pt")
    root = Path(cli.__file__).parents[2]
    command = [sys.executable, "-m", "sdkit", "txt2img", "a cat", "--model", str(tiny), "--device", "cpu"]
    command += ["--embedding", "ink.pt", "--steps", "1", "--guidance", "0"]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ink.pt  in prompts: <toy>, ink\nout.png  seed ")
    assert done.stderr.splitlines() == [
        "sdkit: warning: prompt: ignored at guidance_scale 0, which is unconditional",
        "sdkit: warning: embedding '<toy>' or 'ink': loaded, but in no prompt and no negative prompt",
    ]
