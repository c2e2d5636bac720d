"""The command line: what it passes on, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdkit import adapter_kinds
from sdkit.adapter_kinds import AdapterKind
from sdkit.cli import main as cli
from sdkit.errors import CheckpointError, SDKitError
from sdkit.generation.png import read_parameters, write_png
from sdkit.stable_diffusion import StableDiffusion
from sdkit.viewing.previews import Preview

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


class FakeStableDiffusion:
    """Stands in for the pipeline: remembers how it was called, paints each picture from its seed."""

    calls: list[dict[str, Any]] = []
    loaded: list[tuple[str, dict[str, Any]]] = []
    added: list[tuple[Any, ...]] = []
    error: BaseException | None = None

    @classmethod
    def load(cls, path: str, **options: Any) -> FakeStableDiffusion:
        cls.loaded.append((path, {name: value for name, value in options.items() if value is not None}))
        return cls()

    def _paint(self, task: str, num_images_per_prompt: int, preview_every: int, **arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        shown = {"num_images_per_prompt": num_images_per_prompt, "preview_every": preview_every}
        self.calls.append({"task": task, **arguments, **shown})
        first = 7 if arguments["seed"] is None else arguments["seed"]
        seeds = [first + i for i in range(num_images_per_prompt)]
        images = [Image.new("RGB", (8, 8), (s % 256, 0, 0)) for s in seeds]
        not_held = ("progress", "attention_maps", "max_batch_size", "vae_tiling")
        for image, seed in zip(images, seeds, strict=True):
            image.info.update({k: v for k, v in arguments.items() if k not in not_held})
            image.info.update({"task": task, "seed": seed, "width": 8})
        steps = range(0, arguments["num_inference_steps"], preview_every) if preview_every else []
        previews = [Preview(step, 999 - step, images) for step in steps]
        return types.SimpleNamespace(images=images, seeds=seeds, previews=previews)

    text_to_image = partialmethod(_paint, "text_to_image")
    image_to_image = partialmethod(_paint, "image_to_image")
    inpaint = partialmethod(_paint, "inpaint")
    depth_to_image = partialmethod(_paint, "depth_to_image")

    def load_vae(self, path: str) -> None:
        self.added.append(("vae", path))

    def load_textual_inversion(self, path: str) -> None:
        self.added.append(("embedding", path))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeStableDiffusion]]:
    module = types.ModuleType("sdkit.stable_diffusion")
    module.StableDiffusion = FakeStableDiffusion
    monkeypatch.setitem(sys.modules, "sdkit.stable_diffusion", module)
    for name, value in (("calls", []), ("loaded", []), ("added", []), ("error", None)):
        monkeypatch.setattr(FakeStableDiffusion, name, value)
    yield FakeStableDiffusion


def test_every_option_reaches_the_pipeline(run: Run, fake: type[FakeStableDiffusion]) -> None:
    status, out, err = run(
        "txt2img",
        "a cube",
        "--model",
        "m",
        "--steps",
        "12",
        "--guidance",
        "3",
        "--negative",
        "blur",
        "--seed",
        "5",
        "--sampler",
        "euler",
        "--num",
        "2",
        "--width",
        "24",
        "--height",
        "16",
        "--clip-skip",
        "1",
        "--rescale",
        "0.5",
        "--sigmas",
        "karras",
        "--spacing",
        "trailing",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        "--backend",
        "eager",
        "--preview-every",
        "3",
        "--no-progress",
        "--eta",
        "0.5",
        "--interval",
        "0.3:5",
        "--dynamic-threshold",
        "0.9",
        "--sample-max-value",
        "4",
        "--clip-sample-range",
        "3",
        "--variation-seed",
        "8",
        "--variation-strength",
        "0.1",
        "--max-batch",
        "1",
        "--tiling",
        "--hires",
        "2",
        "--hires-strength",
        "0.4",
        "--hires-steps",
        "7",
        "--hires-upscaler",
        "nearest",
    )
    assert (status, err) == (0, "")
    assert fake.loaded == [("m", {"device": torch.device("cpu"), "dtype": torch.bfloat16, "backend": "eager"})]
    assert fake.calls == [
        {
            "task": "text_to_image",
            "prompt": "a cube",
            "negative_prompt": "blur",
            "num_inference_steps": 12,
            "guidance_scale": 3.0,
            "guidance_rescale": 0.5,
            "guidance_interval": (0.3, 5.0),
            "dynamic_threshold": 0.9,
            "sample_max_value": 4.0,
            "clip_sample_range": 3.0,
            "seed": 5,
            "variation_seed": 8,
            "variation_strength": 0.1,
            "sampler": "euler",
            "sigmas": "karras",
            "timestep_spacing": "trailing",
            "eta": 0.5,
            "width": 24,
            "height": 16,
            "clip_skip": 1,
            "max_batch_size": 1,
            "vae_tiling": True,
            "hires_scale": 2.0,
            "hires_strength": 0.4,
            "hires_steps": 7,
            "hires_upscaler": "nearest",
            "attention_maps": False,
            "progress": False,
            "num_images_per_prompt": 2,
            "preview_every": 3,
        }
    ]
    assert "out-0001.png  seed 5" in out and "out-0002.png  seed 6" in out
    assert read_parameters("out-0002.png")["seed"] == 6 and read_parameters("out-0002.png")["model"] == "m"
    steps = [f"out-000{n}-step{s:02d}.png" for n in (1, 2) for s in (0, 3, 6, 9)]
    assert sorted(os.listdir()) == sorted(["out-0001.png", "out-0002.png", *steps])


def test_defaults_and_the_film_strip(run: Run, fake: type[FakeStableDiffusion]) -> None:
    status, out, _ = run("txt2img", "a cube", "--strip")
    assert status == 0 and fake.loaded[0] == ("tabletop", {})
    assert fake.calls[0]["preview_every"] == 4 and fake.calls[0]["num_inference_steps"] == 30
    assert sorted(os.listdir()) == ["out-strip.png", "out.png"] and "out-strip.png" in out
    assert Image.open("out-strip.png").width > 8 * 160


def test_folders_are_numbered_and_created(run: Run, fake: type[FakeStableDiffusion], tmp_path: Path) -> None:
    assert run("txt2img", "x", "--out", "new/deep/", "--num", "2")[0] == 0
    assert run("txt2img", "x", "--out", "new/deep")[0] == 0
    assert sorted(os.listdir("new/deep")) == ["0001.png", "0002.png", "0003.png"]
    assert run("txt2img", "x", "--out", str(tmp_path / "named.png"))[0] == 0
    assert (tmp_path / "named.png").is_file()


def test_the_prediction_is_for_single_files_alone(run: Run, fake: type[FakeStableDiffusion]) -> None:
    assert run("txt2img", "x", "--model", "some/v1-5.safetensors", "--prediction", "epsilon")[0] == 0
    assert fake.loaded == [("some/v1-5.safetensors", {"prediction_type": "epsilon"})]
    status, _, err = run("txt2img", "x", "--model", "some/v1.5", "--prediction", "epsilon")
    assert status == 1 and "--prediction: only for single files; some/v1.5 says it itself" in err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("missing/a.png", "missing/a.png: cannot be written: missing: no such folder"),
        ("a.jpg", "a.jpg: expected a name that ends in .png"),
        ("a", "a: expected a name that ends in .png"),
        ("a-file.txt/x.png", "a-file.txt: not a directory"),
        ("/proc/a.png", "/proc/a.png: cannot be written"),
        ("/proc/deep/", "/proc/deep: cannot be written"),
        ("fifo.png", "fifo.png: cannot be written: not a regular file"),
    ],
)
def test_a_bad_destination_is_found_before_the_work(
    run: Run, fake: type[FakeStableDiffusion], out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a-file.txt").touch()
    os.mkfifo(tmp_path / "fifo.png")
    status, stdout, err = run("txt2img", "x", "--out", out)
    assert (status, stdout) == (1, "") and err.count("\n") == 1 and err.startswith("sdkit: error: ")
    assert message in err and not fake.loaded and sorted(os.listdir()) == ["a-file.txt", "fifo.png"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SDKitError("width 13\nis wrong"), 1, "sdkit: error: width 13 is wrong\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "No such file or directory: 'x'"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 1, "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_one_line(
    run: Run, fake: type[FakeStableDiffusion], error: BaseException, status: int, message: str
) -> None:
    fake.error = error
    got, out, err = run("txt2img", "x")
    assert (got, out) == (status, "") and message in err and err.count("\n") == (1 if message else 0)
    assert os.listdir() == []


def test_bugs_keep_their_traceback(fake: type[FakeStableDiffusion], tmp_path: Path) -> None:
    fake.error = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["txt2img", "x", "--out", str(tmp_path / "a.png")])


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("txt2img",),
        ("txt2img", "x", "--steps", "many"),
        ("txt2img", "x", "--num", "0"),
        ("txt2img", "x", "--dtype", "int8"),
        ("txt2img", "x", "--colour"),
        ("convert", "only-one"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and err.startswith("sdkit: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("device", ["warp9", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there(run: Run, fake: type[FakeStableDiffusion], device: str) -> None:
    status, _, err = run("txt2img", "x", "--device", device)
    assert status == 1 and f"device {device!r} cannot be used" in err and err.count("\n") == 1 and not fake.loaded


def test_reproduce_passes_on_what_the_picture_says(run: Run, fake: type[FakeStableDiffusion]) -> None:
    run("txt2img", "a cube", "--seed", "3", "--steps", "9", "--num", "2", "--sampler", "heun", "--model", "m")
    status, out, _ = run("reproduce", "out-0002.png", "again.png")
    assert status == 0 and "again.png  seed 4" in out
    first, again = fake.calls
    not_held = ("max_batch_size", "vae_tiling")
    held = {name: value for name, value in first.items() if name not in not_held}
    assert again == {**held, "seed": 4, "width": 8, "num_images_per_prompt": 1}
    assert read_parameters("again.png") == read_parameters("out-0002.png")
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("out-0002.png")))
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


@pytest.mark.parametrize(
    ("command", "options", "call"),
    [
        (("img2img",), ("--strength", "0.3"), {"task": "image_to_image", "image": "a.png", "strength": 0.3}),
        (
            ("inpaint",),
            ("--mask", "m.png", "--mask-blur", "4"),
            {"task": "inpaint", "image": "a.png", "mask_image": "m.png", "strength": 1.0, "mask_blur": 4},
        ),
        (("depth2img",), ("--depth", "d.png"), {"task": "depth_to_image", "depth_map": "d.png", "strength": 0.75}),
        (("depth2img",), (), {"task": "depth_to_image", "image": "a.png"}),
    ],
)
def test_the_image_tasks(
    run: Run, fake: type[FakeStableDiffusion], command: tuple[str], options: tuple[str, ...], call: dict[str, Any]
) -> None:
    status, _, err = run(*command, "a cube", "--image", "a.png", "--steps", "5", "--negative", "blur", *options)
    assert (status, err) == (0, "")
    expected = {**call, "prompt": "a cube", "negative_prompt": "blur", "num_inference_steps": 5}
    assert {name: fake.calls[0][name] for name in expected} == expected
    assert ("depth_map" in fake.calls[0]) == ("--depth" in options)
    status, _, err = run(*command, "a cube", *options)
    assert status == 2 and "--image" in err and err.count("\n") == 1


def test_adapters_come_through_entry_points(
    run: Run, fake: type[FakeStableDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the picture says what went in, so that it is put in again, and is refused when a file is another."""
    for name in ("a.safetensors", "b:c", "h.pt", "e.pt", "v.safetensors"):
        Path(name).write_text(name)
    options = (
        "--lora",
        "a.safetensors:0.8",
        "--lora",
        "b:c",
        "--hypernetwork",
        "h.pt:-1",
        "--vae",
        "v.safetensors",
        "--embedding",
        "e.pt",
    )
    monkeypatch.setattr(adapter_kinds, "_installed", lambda: ())
    status, _, err = run("txt2img", "x", *options)
    assert status == 2 and "No such option: --lora" in err and err.count("\n") == 1

    def loader(name: str) -> AdapterKind:
        module = types.ModuleType(f"tests.{name}_verbs")
        module.load = lambda sd, path, weight: sd.added.append((name, path, weight))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return AdapterKind(name, tag=name, verbs=module.__name__)

    kinds = (loader("lora"), loader("hypernetwork"))
    monkeypatch.setattr(adapter_kinds, "_installed", lambda: kinds)
    assert run("txt2img", "x", "--seed", "1", *options)[0] == 0
    added = [
        ("vae", "v.safetensors"),
        ("lora", "a.safetensors", 0.8),
        ("lora", "b:c", 1.0),
        ("hypernetwork", "h.pt", -1.0),
        ("embedding", "e.pt"),
    ]
    assert fake.added == added
    assert read_parameters("out.png")["lora"] == ["a.safetensors:0.8", "b:c"]
    assert run("reproduce", "out.png", "again.png")[0] == 0
    assert fake.added == 2 * added and read_parameters("again.png") == read_parameters("out.png")
    Path("h.pt").write_text("another")
    status, _, err = run("reproduce", "out.png", "again.png")
    assert status == 1 and "h.pt: not the file that made out.png: expected SHA-256" in err and len(fake.added) == 10


def test_inspect_a_picture(run: Run) -> None:
    write_png(Image.new("RGB", (8, 8)), "a.png", {"prompt": "a cube", "seed": 123456})
    status, out, _ = run("inspect", "a.png")
    assert status == 0 and out == "kind    picture\nprompt  a cube\nseed    123456\n"
    assert json.loads(run("inspect", "a.png", "--json")[1]) == {"kind": "picture", "prompt": "a cube", "seed": 123456}


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


# ---- the real thing, on a small untrained model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Stable Diffusion 1's shape with random weights: 16 x 16 pixels, VAE factor 4."""
    from sdkit.checkpoints.components import Components
    from sdkit.checkpoints.diffusers_folder import save_folder
    from sdkit.networks.config import UNetConfig, VAEConfig
    from sdkit.networks.text_encoder import build_text_encoder
    from sdkit.networks.unet import UNet2DConditionModel
    from sdkit.networks.vae import AutoencoderKL
    from sdkit.prompts.tokenizer import _byte_symbols, load_tokenizer

    torch.manual_seed(0)
    unet = UNetConfig(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = VAEConfig(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=16,
    )
    text = build_text_encoder(
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 514,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        }
    )
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "prediction_type": "epsilon",
    }
    folder = tmp_path_factory.mktemp("models") / "tiny"
    symbols = _byte_symbols()  # a tokenizer that knows letters alone is quick to load
    words = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    letters = tmp_path_factory.mktemp("tokenizer")
    (letters / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (letters / "merges.txt").write_text("#version: 0.2\n")
    networks = (UNet2DConditionModel(unet), AutoencoderKL(vae))
    save_folder(Components(*networks, text, load_tokenizer(letters), scheduler), folder)
    return folder


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


def test_the_real_pipeline_end_to_end(run: Run, tiny: Path) -> None:
    common = ("--model", tiny, "--steps", "4", "--seed", "11", "--device", "cpu")
    status, out, err = run("txt2img", "a red cube", *common, "--negative", "blur", "--sampler", "euler_a")
    assert (status, err) == (0, "") and out.startswith("out.png  seed 11"), err
    assert Image.open("out.png").size == (16, 16)
    assert run("reproduce", "out.png", "again.png", "--device", "cpu")[0] == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("out.png")))
    assert read_parameters("again.png") == read_parameters("out.png")
    status, out, err = run(
        "txt2img", "x", *common, "--num", "2", "--strip", "--preview-every", "2", "--width", "24", "--height", "8"
    )
    assert (status, err) == (0, ""), err
    names = [f"out-000{n}{what}.png" for n in (1, 2) for what in ("", "-step00", "-step02", "-strip")]
    assert sorted(os.listdir()) == sorted(["again.png", "out.png", *names])
    assert Image.open("out-0001-step02.png").size == Image.open("out-0002.png").size == (24, 8)


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
        assert Image.open(f"{name}.png").size == (24, 16)
        assert run("reproduce", f"{name}.png", f"{name}2.png", "--device", "cpu")[0] == 0
        pair = [np.asarray(Image.open(file)) for file in (f"{name}.png", f"{name}2.png")]
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


def test_attention_maps_are_written_beside_the_picture(run: Run, tiny: Path) -> None:
    common = ("--model", tiny, "--steps", "2", "--num", "2", "--device", "cpu")
    status, out, err = run("txt2img", "a cat", *common, "--attention-map")
    assert (status, err) == (0, "") and "out-0002-attention.png" in out
    assert Image.open("out-0001-attention.png").width > 2 * 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--interval", "high"), "--interval: expected LOW:HIGH"),
        (("--hires", "0"), "hires_scale"),
        (("--vae", "cut.safetensors"), "cut.safetensors"),
        (("--embedding", "nowhere.pt"), "nowhere.pt"),
        (("--sampler", "dream"), "dream"),
        (("--width", "13"), "width 13 is not a positive multiple of 4: use 12 or 16"),
        (("--height", "-8"), "height -8"),
        (("--steps", "0"), "num_inference_steps: expected an integer from 1 to 1000"),
        (("--guidance", "nan"), "nan"),
        (("--guidance", "-2"), "-2"),
        (("--rescale", "1.5"), "1.5"),
        (("--sigmas", "round"), "round"),
        (("--spacing", "wide"), "wide"),
        (("--clip-skip", "99"), "99"),
        (("--seed", "-1"), "-1"),
        (("--backend", "cuda"), "cuda"),
        (("--model", "nowhere"), "nowhere"),
        (("--model", "empty"), "empty"),
        (("--model", "cut"), "cut/unet/diffusion_pytorch_model.safetensors: "),
        (("--model", "cut.safetensors"), "cut.safetensors: "),
        (("--model", "code.ckpt"), "code.ckpt: the pickle holds code"),
    ],
)
def test_bad_input_ends_in_one_line_and_no_file(
    run: Run, tiny: Path, options: tuple[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes())
    torch.save({"state_dict": {"a": subprocess.run}}, tmp_path / "code.ckpt")
    there = sorted(os.listdir())
    status, out, err = run("txt2img", "x", "--model", tiny, "--device", "cpu", "--strip", *options)
    assert (status, out) == (1, ""), err
    assert err.startswith("sdkit: error: ") and err.count("\n") == 1 and message in err
    assert sorted(os.listdir()) == there


def test_the_shipped_model_needs_nothing_but_a_prompt(run: Run) -> None:
    status, out, err = run("txt2img", "a large red sphere on a white table", "--seed", "1", "--steps", "8")
    assert (status, err) == (0, "") and out.startswith("out.png  seed 1"), err
    picture = np.asarray(Image.open("out.png")).astype(int)
    redness = picture[..., 0] - picture[..., 1:].max(-1)
    assert (redness > 60).mean() > 0.02, "no red sphere in the picture"


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sdkit.cli.main import main\n"
        "try: main([])\nexcept SystemExit as e: assert not e.code, e\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    root = Path(cli.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": environment}
    done = subprocess.run([sys.executable, "-c", script], **options)
    assert done.stdout.endswith("[]\n"), done.stdout[-200:]
    for command in ("txt2img", "img2img", "inpaint", "depth2img", "reproduce", "inspect", "convert"):
        assert command in done.stdout
    module = subprocess.run([sys.executable, "-m", "sdkit", "--version"], **options)
    from sdkit import __version__

    assert module.stdout == f"sdkit {__version__}\n" and module.stderr == ""


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
