"""PNG files that remember how their picture was made."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from sdkit.errors import ConfigError, SDKitError
from sdkit.generation.infotext import a1111_parameters
from sdkit.generation.png import read_foreign, read_parameters, write_png
from tests.conftest import read_image

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


PARAMETERS: dict[str, Any] = {
    "prompt": "ein grüner Würfel, 赤い球 😀",
    "negative_prompt": "blurry, text:\nugly",
    "num_inference_steps": 30,
    "sampler": "dpmpp_2m",
    "sigmas": "karras",
    "guidance_scale": 7.5,
    "seed": 18446744073709551615,
    "width": 64,
    "height": 96,
    "model": "tabletop",
    "clip_skip": 1,
    "eta": 0.1 + 0.2,
}


def test_png_metadata_round_trip(tmp_path: Path) -> None:
    path = write_png(Image.fromarray(RGB), tmp_path / "a.png", PARAMETERS)
    assert read_parameters(path) == PARAMETERS
    assert np.array_equal(np.asarray(read_image(path)), RGB)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a1111_reads_the_parameters_chunk(tmp_path: Path) -> None:
    """Parsed by the rules of the web UI's ``parse_generation_parameters``."""
    path = write_png(Image.fromarray(RGB), tmp_path / "a.png", PARAMETERS)
    with Image.open(path) as image:
        *lines, last = image.info["parameters"].strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert values == {
        "Steps": "30",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Model": "tabletop",
        "Seed": "18446744073709551615",
        "Size": "64x96",
        "Clip skip": "2",
        "Version": "sdkit",
    }
    start = next(i for i, line in enumerate(lines) if line.startswith("Negative prompt:"))
    assert "\n".join(lines[:start]) == PARAMETERS["prompt"]
    assert "\n".join(lines[start:]).removeprefix("Negative prompt: ") == PARAMETERS["negative_prompt"]
    assert 'Model: "a, b: c"' in a1111_parameters({"model": "a, b: c"})
    facts = {"strength": 0.6, "mask_blur": 4, "variation_seed": 3, "variation_strength": 0.2}
    expected = "Denoising strength: 0.6, Mask blur: 4, Variation seed: 3, Variation seed strength: 0.2"
    assert expected in a1111_parameters(facts)
    hires = {"hires_scale": 2.0, "hires_strength": 0.5, "hires_steps": 9}
    assert "Denoising strength: 0.5, Hires upscale: 2.0, Hires steps: 9" in a1111_parameters(hires)
    assert a1111_parameters({"sampler": "tcd", "seed": 1}) == "\nSampler: TCD, Seed: 1, Version: sdkit"


def test_pictures_without_our_metadata_say_so(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "plain.png")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sdkit", "{")
    Image.fromarray(RGB).save(tmp_path / "damaged.png", pnginfo=chunks)
    for name, message in (("plain.png", "no sdkit metadata"), ("damaged.png", "damaged sdkit metadata")):
        with pytest.raises(SDKitError, match=f"{name}: {message}"):
            read_parameters(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_png(Image.fromarray(RGB), tmp_path / "a.png", {"seed": 1})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="metadata that JSON cannot hold"):
        write_png(Image.fromarray(RGB), path, {"seed": float("nan")})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        SDKitError, match=r"a\.png: cannot be written \(No space left on device: make room, or write elsewhere\)"
    ):
        write_png(Image.fromarray(RGB), path, {"seed": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("target", ["missing/a.png", "folder"])
def test_unwritable_targets_are_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SDKitError, match=f"{target}: cannot be written"):
        write_png(Image.fromarray(RGB), tmp_path / target)
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


INFOTEXT = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 64x64"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_of_a1111(suffix: str, tmp_path: Path) -> None:
    """In JPEG and WebP the text is an EXIF comment in UTF-16, as the library writes it that A1111 takes."""
    file = tmp_path / f"a{suffix}"
    if suffix == ".png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", INFOTEXT)
        Image.fromarray(RGB).save(file, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + INFOTEXT.encode("utf-16-be")
        Image.fromarray(RGB).save(file, exif=exif)
    found = read_foreign(file)
    assert found is not None and found.program == "A1111"
    assert (found.facts["prompt"], found.facts["seed"], found.facts["sampler"]) == ("a cat", 3, "euler")


def test_whose_a_picture_is(tmp_path: Path) -> None:
    """Ours before A1111's text, which we write too; that before ComfyUI's workflow; others are nobody's."""
    ours = write_png(Image.fromarray(RGB), tmp_path / "ours.png", PARAMETERS)
    Image.fromarray(RGB).save(tmp_path / "plain.png")
    assert read_foreign(ours) is None and read_foreign(tmp_path / "plain.png") is None
    workflow = {"1": {"class_type": "EmptyLatentImage", "inputs": {}}}
    for texts, program in (({"prompt": json.dumps(workflow)}, "ComfyUI"), ({"parameters": INFOTEXT}, "A1111")):
        chunks = PngImagePlugin.PngInfo()
        for name, text in (texts | {"workflow": "{}"}).items():
            chunks.add_text(name, text)
        Image.fromarray(RGB).save(tmp_path / "theirs.png", pnginfo=chunks)
        found = read_foreign(tmp_path / "theirs.png")
        assert found is not None and found.program == program
