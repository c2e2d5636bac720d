"""The VAE in tiles against itself on the whole picture, with the shipped weights and with weights drawn by name."""

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdkit.errors import ConfigError
from sdkit.networks.vae import AutoencoderKL, choose_tile, decode_latents, untiled_bytes
from sdkit.networks.vae_tiling import TILE
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, draw_weights, relative_error
from tests.sdkit.networks.test_vae import levels

EXACT = 1e-12  # of the norm, in float64

CONFIGS = {
    "sd1": levels(8, 16, 24, 24, layers_per_block=2),
    "one layer, no attention, no quantisation convolutions": levels(
        8, 16, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False
    ),
    "three layers, sixteen latent channels": levels(8, 16, 24, layers_per_block=3, latent_channels=16),
    "one level": levels(16),
}


@functools.cache
def drawn(name: str) -> AutoencoderKL:
    return draw_weights(AutoencoderKL.from_config(CONFIGS[name]).double().requires_grad_(False))


@functools.cache
def tabletop() -> AutoencoderKL:
    return StableDiffusion.from_pretrained("tabletop", device="cpu").vae.requires_grad_(False)


def latents(vae: AutoencoderKL, batch: int, height: int, width: int) -> Tensor:
    """Random latents that get brighter from one corner to the other, so that every tile has statistics of its own."""
    z = draw("latents", (batch, vae.config.latent_channels, height, width))
    return z + torch.linspace(-2, 2, height)[:, None] + torch.linspace(-1, 1, width)


def painting(side: int) -> Tensor:
    """A picture [1, 3, side, side] in [-1, 1]: 48 rectangles of one colour each on a background that fades."""
    x = torch.linspace(-0.8, 0.6, side).expand(1, 3, side, side).clone()
    places = (draw("places", (48, 2)).sigmoid() * side).long().tolist()
    sizes = (draw("sizes", (48, 2)).sigmoid() * side / 4 + 4).long().tolist()
    for i, ((top, left), (height, width)) in enumerate(zip(places, sizes, strict=True)):
        colour = draw(f"colour {i}", (1, 3, 1, 1)).tanh().float()
        x[:, :, top : top + height, left : left + width] = colour
    return x


def psnr(actual: Tensor, expected: Tensor) -> float:
    """In dB, of pixels in [-1, 1]."""
    return 10 * math.log10(4 / float((actual - expected).square().mean()))


class Peak(TorchDispatchMode):
    """The most bytes alive at once in tensors that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.bytes = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.bytes = max(self.bytes, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def peak(call: Callable[[], Any]) -> int:
    with Peak() as memory:
        call()
    return memory.bytes


@pytest.mark.parametrize(("height", "width", "tile"), [(9, 11, 5), (3, 16, 8), (2, 3, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_tiles_give_the_whole_picture(name: str, height: int, width: int, tile: int):
    vae = drawn(name)
    factor = vae.config.factor
    z, x = latents(vae, 2, height, width), draw("pixels", (2, 3, height * factor, width * factor))
    assert relative_error(vae.decode(z, tile), vae.decode(z)) < EXACT
    actual, expected = vae.encode(x, tile), vae.encode(x)
    assert relative_error(actual.mean, expected.mean) < EXACT
    assert relative_error(actual.logvar, expected.logvar) < EXACT


@pytest.mark.parametrize("times", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_picture_larger_than_tabletops_own_size_has_no_seams(times: int):
    vae, tile = tabletop(), 16  # the model's own size
    own = tile * vae.config.factor
    x = painting(times * own)
    encoded, encoded_tiled = vae.encode(x).mean, vae.encode(x, tile).mean
    assert relative_error(encoded_tiled, encoded) < 1e-5
    whole, tiled = vae.decode(encoded), vae.decode(encoded, tile)
    assert psnr(tiled, whole) > 100
    assert float((tiled - whole).abs().max()) < 1e-4
    for dim in (2, 3):  # steps from one pixel to the next: over the tiles' edges they are what they were
        steps, before = (p.diff(dim=dim).abs().movedim(dim, 0)[own - 1 :: own].mean() for p in (tiled, whole))
        assert abs(float(steps / before) - 1) < 1e-4


def test_a_picture_no_larger_than_a_tile_is_bit_equal():
    vae = tabletop()
    x = painting(16 * vae.config.factor)
    assert vae.encode(x, 16).mean.equal(vae.encode(x).mean)
    z = vae.encode(x).mean
    assert vae.decode(z, 16).equal(vae.decode(z))
    assert not vae.decode(z, 15).equal(vae.decode(z))  # which tiles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_lose_nothing_in_half_precision(dtype: torch.dtype):
    def network() -> AutoencoderKL:
        vae = draw_weights(AutoencoderKL.from_config(levels(8, 16)).double().requires_grad_(False))
        vae.decoder.up_blocks[0].upsamplers[0].conv.bias += 30.3  # a mean that rounds badly
        return vae

    z = draw("latents", (1, 4, 5, 8)).to(dtype)
    expected, half = network().decode(z.double()), network().to(dtype)
    tiled, whole = (relative_error(half.decode(z, tile).double(), expected) for tile in (4, None))
    assert half.decode(z, 4).dtype == dtype
    assert tiled < 1.05 * whole


def test_statistics_keep_a_small_variance_beside_a_large_mean():
    vae = draw_weights(AutoencoderKL.from_config(levels(16, 16)).requires_grad_(False))
    vae.encoder.conv_in.bias.data += 10_000
    x = draw("pixels", (1, 3, 16, 48))
    actual, expected = vae.encode(x.float(), 4).mean.double(), vae.double().encode(x).mean
    assert relative_error(actual, expected) < 1e-2  # E[x²] - E[x]² in float32 is off by more than the variance


@pytest.mark.parametrize("tile", [0, -8, 8.0, True, "8"])
def test_a_bad_tile_is_refused(tile: Any):
    vae = drawn("sd1")
    with pytest.raises(ConfigError, match="tile: expected a whole number of at least 1"):
        vae.decode(latents(vae, 1, 2, 2), tile)
    with pytest.raises(ConfigError, match="tile: expected a whole number of at least 1"):
        vae.encode(draw("pixels", (1, 3, 16, 16)), tile)


def test_encode_refuses_sides_that_tiles_do_not_divide():
    with pytest.raises(ConfigError, match=r"multiples of 8, found \[16, 20\]"):
        drawn("sd1").encode(draw("pixels", (1, 3, 16, 20)), 1)


@pytest.mark.parametrize("widths", [(32, 64, 64), (8, 16, 128)])
def test_the_estimate_is_what_the_whole_picture_takes(widths: tuple[int, ...]):
    with FakeTensorMode():
        vae = AutoencoderKL.from_config(levels(*widths, layers_per_block=2)).requires_grad_(False)
        factor = vae.config.factor
        z, x = torch.empty(1, 4, 192 // factor, 320 // factor), torch.empty(1, 3, 192, 320)
        estimate = untiled_bytes(vae.config, 192, 320, torch.float32)
        largest = max(peak(lambda: vae.decode(z)), peak(lambda: vae.encode(x)))
    assert 0.95 < estimate / largest < 1.05


def test_tiles_bound_the_memory():
    """What a tile takes, and two maps of the whole picture: one at half the resolution and the pixels."""
    vae = AutoencoderKL.from_config(levels(8, 16, 32, 32)).requires_grad_(False)
    z, x = torch.zeros(1, 4, 24, 24), torch.zeros(1, 3, 192, 192)
    whole = untiled_bytes(vae.config, 192, 192, torch.float32)
    tile = untiled_bytes(vae.config, 32 + 16, 32 + 16, torch.float32)  # margins of 6 and 8 pixels
    maps = 192 * 192 * (16 // 4 + 3) * 4
    assert peak(lambda: vae.decode(z, 4)) < 1.5 * tile + maps < 0.25 * whole
    assert peak(lambda: vae.encode(x, 4)) < 1.5 * tile + maps


def test_choose_tile_compares_with_the_budget_or_the_free_memory(monkeypatch: pytest.MonkeyPatch):
    vae = tabletop()
    needed = untiled_bytes(vae.config, 512, 256, torch.float32)
    assert needed == (64 + 128) * 512 * 256 * 4
    assert choose_tile(vae, 512, 256, budget=needed) is None
    assert choose_tile(vae, 512, 256, budget=needed - 1) == TILE
    assert choose_tile(vae, 512, 256, tiling=False, budget=0) is None
    assert choose_tile(vae, 512, 256, tiling=True, budget=needed) == TILE
    assert choose_tile(vae, 64, 64) is None
    assert choose_tile(vae, 2**20, 2**20) == TILE  # 768 TiB
    monkeypatch.setattr("sdkit.networks.vae._free_bytes", lambda device: needed - 1)
    assert choose_tile(vae, 512, 256) == TILE
    assert choose_tile(vae, 256, 256) is None


def test_decode_latents_tiles_where_it_is_told_or_memory_is_short(monkeypatch: pytest.MonkeyPatch):
    vae = drawn("one layer, no attention, no quantisation convolutions")
    z = latents(vae, 1, 3, TILE + 1)
    whole = decode_latents(vae, z, tiling=False)
    tiled = decode_latents(vae, z, tiling=True)
    assert relative_error(tiled, whole) < EXACT
    assert not tiled.equal(whole)
    assert decode_latents(vae, z).equal(whole)
    needed = untiled_bytes(vae.config, 2 * 3, 2 * (TILE + 1), torch.float64)
    monkeypatch.setattr("sdkit.networks.vae._free_bytes", lambda device: needed - 1)
    assert decode_latents(vae, z).equal(tiled)
