"""The command line in an empty folder, a pipeline that only remembers its calls, and a small untrained model."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdkit.cli import main as cli
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
        given = {name: value for name, value in options.items() if value is not None}
        cls.loaded.append((path, given))
        cls.added += [(name, given[name]) for name in ("vae", "text_encoder") if name in given]
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
        previews = [Preview(step, 999 - step, images, torch.zeros(1, 4, 8, 8)) for step in steps]
        return types.SimpleNamespace(images=images, seeds=seeds, previews=previews)

    text_to_image = partialmethod(_paint, "text_to_image")
    image_to_image = partialmethod(_paint, "image_to_image")
    inpaint = partialmethod(_paint, "inpaint")
    depth_to_image = partialmethod(_paint, "depth_to_image")

    def load_textual_inversion(self, path: str) -> str:
        self.added.append(("embedding", path))
        return "<toy>"

    def triggers_of(self, token: str) -> list[str]:
        return [token, "toy"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeStableDiffusion]]:
    module = types.ModuleType("sdkit.stable_diffusion")
    module.StableDiffusion = FakeStableDiffusion
    monkeypatch.setitem(sys.modules, "sdkit.stable_diffusion", module)
    for name, value in (("calls", []), ("loaded", []), ("added", []), ("error", None)):
        monkeypatch.setattr(FakeStableDiffusion, name, value)
    yield FakeStableDiffusion


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
