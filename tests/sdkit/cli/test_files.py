"""The commands convert and inspect."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

from sdkit.errors import CheckpointError
from sdkit.generation.png import write_png
from sdkit.stable_diffusion import StableDiffusion
from tests.sdkit.cli.conftest import Run


def test_inspect_a_picture(run: Run) -> None:
    write_png(Image.new("RGB", (8, 8)), "a.png", {"prompt": "a cube", "seed": 123456})
    status, out, _ = run("inspect", "a.png")
    assert status == 0 and out == "kind    picture\nprompt  a cube\nseed    123456\n"
    assert json.loads(run("inspect", "a.png", "--json")[1]) == {"kind": "picture", "prompt": "a cube", "seed": 123456}


def test_inspect_a_picture_of_another_program(run: Run) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(
        "parameters", "a cat\nNegative prompt: rain\nSteps: 9, Sampler: Euler, Seed: 3, ENSD: 31337, RNG: CPU"
    )
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=chunks)
    status, out, _ = run("inspect", "a.png")
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["kind", "picture", "by", "A1111"],
        ["prompt", "a", "cat"],
        ["negative_prompt", "rain"],
        ["num_inference_steps", "9"],
        ["seed", "3"],
        ["sampler", "euler"],
        ["timestep_spacing", "linspace"],
        ["not", "followed"],
        ["ENSD", "31337"],
        ["RNG", "CPU"],
    ]


def test_inspect_says_what_triggers_an_embedding(run: Run) -> None:
    torch.save({"<toy>": torch.ones(2, 16)}, "ink.pt")
    assert "in prompts  <toy>, ink\n" in run("inspect", "ink.pt")[1]


def test_inspect_a_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"kind": "vae", "shapes": {"conv_in": [8, 3, 3, 3]}, "parameters": 83653863, "parts": ["a", "b"]}

    def inspect_file(path: Path) -> dict[str, Any]:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: empty file")
        return facts

    module = types.ModuleType("sdkit.checkpoints.inspection")
    module.inspect_file = inspect_file
    monkeypatch.setitem(sys.modules, "sdkit.checkpoints.inspection", module)
    Path("a.safetensors").write_text("x")
    Path("b.safetensors").touch()
    status, out, _ = run("inspect", "a.safetensors")
    expected = "kind        vae\nshapes\n  conv_in  8 x 3 x 3 x 3\nparameters  83653863\nparts       a, b\n"
    assert (status, out) == (0, expected)
    assert json.loads(run("inspect", "a.safetensors", "--json")[1]) == facts
    assert run("inspect", "b.safetensors") == (1, "", "sdkit: error: b.safetensors: empty file\n")
    assert run("inspect", "c.safetensors") == (1, "", "sdkit: error: c.safetensors: no such file or folder\n")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from sdkit.checkpoints.tensors import read_state

    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.parent.name}.{key}": value for f in files for key, value in read_state(f)[0].items()}


def test_convert_folder_to_file_and_back(run: Run, tiny: Path) -> None:
    assert run("convert", tiny, "one.safetensors")[:2] == (0, "one.safetensors  from diffusers folder\n")
    assert run("convert", "one.safetensors", "deep/back")[0] == 0
    before, after = _tensors(tiny), _tensors(Path("deep/back"))
    assert len(before) > 100 and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "single file" in run("inspect", "one.safetensors")[1]
    assert run("convert", tiny, "half.safetensors", "--dtype", "float16")[0] == 0
    assert json.loads(run("inspect", "half.safetensors", "--json")[1])["dtypes"].keys() == {"F16"}
    assert sorted(os.listdir()) == ["deep", "half.safetensors", "one.safetensors"]


def test_convert_a_vae_there_and_back(run: Run, tiny: Path) -> None:
    assert run("convert", tiny / "vae", "vae.safetensors")[0] == 0
    assert run("inspect", "vae.safetensors")[1].startswith("kind        VAE (single file)")
    assert run("convert", "vae.safetensors", "back")[0] == 0
    before, after = _tensors(tiny / "vae"), _tensors(Path("back"))
    assert {k.split(".", 1)[1] for k in before} == {k.split(".", 1)[1] for k in after}
    assert all(torch.equal(value, after[key.replace("vae.", "back.", 1)]) for key, value in before.items())
    assert json.loads(Path("back/config.json").read_text())["block_out_channels"] == [8, 8, 16]
    assert sorted(os.listdir()) == ["back", "vae.safetensors"]


def test_convert_refuses_with_one_line(run: Run, tiny: Path) -> None:
    from safetensors.torch import save_file

    (Path("full")).mkdir()
    Path("full/file").touch()
    Path("empty").mkdir()
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(2, 4)}, "lora.safetensors")
    data = (tiny / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[: len(data) // 2])
    there = sorted(os.listdir())
    for source, target, message in (
        (tiny, "full", "full: already exists"),
        (tiny, "a.ckpt", "written as .safetensors"),
        (tiny, "missing/a.safetensors", "missing: no such folder"),
        ("lora.safetensors", "a", "found LoRA (kohya)"),
        ("cut.safetensors", "a", "cut.safetensors: "),
        ("empty", "a.safetensors", "empty: "),
        ("nowhere", "a.safetensors", "nowhere: "),
    ):
        status, out, err = run("convert", source, target)
        assert (status, out) == (1, "") and message in err and err.count("\n") == 1, err
        assert sorted(os.listdir()) == there


def test_convert_rewrites_a_lora_through_the_entry_point(run: Run, tmp_path: Path) -> None:
    import finetune

    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    finetune.add_lora(sd, rank=2, alpha=2)
    finetune.save_lora(sd, tmp_path / "a.safetensors", format="diffusers")
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    status, out, _ = run("convert", a, b, "--format", "kohya", "--model", "tabletop")
    assert status == 0 and "kohya" in out
    assert any(".lora_down.weight" in key for key in load_file(b))
    status, _, err = run("convert", a, str(tmp_path / "c.safetensors"))
    assert status == 1 and "--format" in err


def test_convert_casts_a_lora(run: Run, tmp_path: Path) -> None:
    """In its own format, or another; options that say nothing about a LoRA are refused."""
    import finetune

    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    for parameter in finetune.add_lora(sd, rank=2, alpha=3):
        parameter.data.normal_()
    finetune.save_lora(sd, tmp_path / "kohya.safetensors", format="kohya")
    finetune.save_lora(sd, tmp_path / "peft", format="peft")
    wide = load_file(tmp_path / "kohya.safetensors")
    for source, more in (("kohya.safetensors", ()), ("peft", ("--format", "kohya"))):
        target = tmp_path / f"{source}-half.safetensors"
        options = ("--dtype", "float16", "--model", "tabletop", *more)
        assert run("convert", tmp_path / source, target, *options)[1] == f"{target}  as kohya\n"
        half = load_file(target)
        assert half.keys() == wide.keys() and {v.dtype for v in half.values() if v.dim()} == {torch.float16}
        assert all(torch.equal(half[k], v.half() if v.dim() else v) for k, v in wide.items())

    for options, message in (
        (("--format", "kohya", "--prediction", "epsilon"), "--prediction: only for models"),
        (("--prediction", "epsilon"), "found LoRA (kohya) (--format converts LoRAs)"),
        (("--model", "tabletop"), "--model: only for adapters that are rewritten by --format"),
    ):
        status, _, err = run("convert", tmp_path / "kohya.safetensors", tmp_path / "no.safetensors", *options)
        assert status == 1 and message in err and not (tmp_path / "no.safetensors").exists()
