"""Painted pictures, a small VAE, and the training data made of both."""

from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.batches import TrainingData
from finetune.data.cache import LatentCache
from finetune.data.config import DataConfig
from finetune.data.folders import read_pictures
from sdkit import AutoencoderKL, VAEConfig
from tests.conftest import draw_weights

STEP = 16


def paint(path: Path, size: tuple[int, int] = (48, 48), seed: int = 0) -> Path:
    """A picture of smooth random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def vae(seed: int = 0) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False, **blocks)
    return draw_weights(AutoencoderKL(config), seed)


def dataset(folder: Path, config: DataConfig | None = None, **arguments) -> TrainingData:
    config = config or DataConfig(data=folder)
    found, rules = read_pictures(config), {"resolution": 48, "step": STEP, "seed": 0}
    return TrainingData(found.pictures, config, **(rules | {"left_out": found.left_out} | arguments))


def filled(data: TrainingData, folder: Path) -> LatentCache:
    cache = LatentCache(vae(), folder.parent)
    cache.fill(data.views(), progress=False)
    return cache
