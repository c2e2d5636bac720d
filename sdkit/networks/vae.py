"""The autoencoder between pixels and latents (arXiv 2112.10752). Parameter names are diffusers'.

Latents here are unscaled: multiply by ``config.scaling_factor`` after encoding, divide before decoding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sdkit.errors import ConfigError, NumericalError
from sdkit.graphs import Graphs
from sdkit.networks.config import VAEConfig
from sdkit.networks.vae_blocks import Decoder, Encoder
from sdkit.networks.vae_tiling import TILE, decode_tiled, encode_tiled


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents; mean and logvar [B, latent channels, H / f, W / f]."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * N(0, 1), the noise drawn on the generator's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1) in nats, summed over each sample: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """The whole autoencoder. ``encode`` and ``decode`` work in the weights' dtype and on their device."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = _checked(config)
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        latent = config.latent_channels
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @classmethod
    def from_config(cls, config: VAEConfig | Mapping[str, Any] | str | Path) -> Self:
        """Build with random weights from a config, its dict, or the path of a diffusers config.json."""
        return cls(_read(config))

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def encode(self, x: Tensor, tile: int | None = None) -> Posterior:
        """Pixels [B, 3, H, W] in [-1, 1], H and W multiples of ``config.factor`` -> the posterior over latents.

        ``tile``: latent cells along a tile's side (`sdkit.networks.vae_tiling`), to save memory; no gradients.
        """
        h = self.encoder(x) if tile is None else encode_tiled(self.encoder, x, tile)
        mean, logvar = (h if self.quant_conv is None else self.quant_conv(h)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Unscaled latents [B, latent channels, h, w] -> pixels [B, 3, f h, f w], about [-1, 1], not clamped.

        ``tile``: latent cells along a tile's side (`sdkit.networks.vae_tiling`), to save memory; no gradients.
        """
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z) if tile is None else decode_tiled(self.decoder, z, tile)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``x`` through the posterior's mean."""
        return self.decode(self.encode(x).mode())


def _read(config: VAEConfig | Mapping[str, Any] | str | Path) -> VAEConfig:
    if isinstance(config, VAEConfig):
        return config
    return VAEConfig.from_dict(config) if isinstance(config, Mapping) else VAEConfig.load(config)


def _checked(config: VAEConfig) -> VAEConfig:
    expected = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, name in expected.items():
        types = getattr(config, key)
        if set(types) != {name} or len(types) != len(config.block_out_channels):
            raise ConfigError(
                f"AutoencoderKL config: {key} must be {name} for each of the {len(config.block_out_channels)} "
                f"block_out_channels, found {types}"
            )
    return config


def run_dtype(config: VAEConfig, dtype: torch.dtype) -> torch.dtype:
    """What a VAE is kept in where the model is in ``dtype``: float32 instead of float16 under ``force_upcast``."""
    return torch.float32 if config.force_upcast and dtype == torch.float16 else dtype


def decode_latents(
    vae: AutoencoderKL, latents: Tensor, tiling: bool | None = None, graphs: Graphs | None = None
) -> Tensor:
    """Decode latents in the noise predictor's scale to pixels [B, 3, f h, f w], float32 or wider, about [-1, 1].

    ``tiling``: whether to work tile by tile; None: where a picture would not fit in the free memory (`choose_tile`).
    ``graphs``: the decoder runs by them, if not tile by tile. A float16 VAE that overflows decodes again in float32,
    with a warning. Raises NumericalError, with what to do about it, for pixels that are not finite even so.
    """
    z = latents / vae.config.scaling_factor
    tile = choose_tile(vae, z.shape[2] * vae.config.factor, z.shape[3] * vae.config.factor, tiling)
    decode = partial(vae.decode, tile=tile)
    if graphs is not None and tile is None:
        decode = partial(graphs.call, "decode", vae, vae.decode)
    pixels = _finite(vae, "decoder", z, lambda: (decode(z.to(vae.device, vae.dtype)),))[0]
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def encode_pictures(vae: AutoencoderKL, pictures: Tensor, tiling: bool | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents [B, C, h, w] of pictures [B, 3, f h, f w] in [-1, 1], unscaled.

    Arguments, a second run in float32 and errors as in `decode_latents`.
    """
    tile = choose_tile(vae, pictures.shape[2], pictures.shape[3], tiling)

    def run() -> tuple[Tensor, ...]:
        posterior = vae.encode(pictures.to(vae.device, vae.dtype), tile)
        return posterior.mean, posterior.std

    mean, std = _finite(vae, "encoder", pictures, run)
    return mean, std


def _finite(vae: AutoencoderKL, part: str, given: Tensor, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The finite results of ``run``, which calls the VAE's encoder or decoder (``part``) on ``given`` in ``vae.dtype``.

    A float16 VAE that overflows runs again in float32, with a warning. Raises NumericalError with the remedy.
    """
    results = run()
    if vae.dtype == torch.float16 and not _all_finite(results):
        warnings.warn(f"the VAE {part} overflowed in float16; it runs again in float32", stacklevel=3)
        try:
            vae.float()
            results = run()
        finally:
            vae.half()

    if not _all_finite(results):
        what, source = ("pixels", "latents") if part == "decoder" else ("latents", "pictures")
        if not _all_finite((given,)):
            raise NumericalError(f"VAE {part}: {what} are not finite: the {source} that it was given are not")
        found = str(vae.dtype).removeprefix("torch.")
        bad = next((name for name, value in vae.state_dict().items() if not _all_finite((value,))), None)
        cause = f"its weights {bad} are not finite" if bad else f"found NaN or infinity in {found}"
        wider = "" if vae.dtype in (torch.float32, torch.float64) or bad else "use float32 (--dtype float32), or "
        raise NumericalError(f"VAE {part}: {what} are not finite: {cause}; {wider}give another VAE (--vae, load_vae)")
    return results


def _all_finite(tensors: tuple[Tensor, ...]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def choose_tile(
    vae: AutoencoderKL, height: int, width: int, tiling: bool | None = None, budget: int | None = None
) -> int | None:
    """The ``tile`` for ``vae.decode`` and ``vae.encode`` of pictures of height x width pixels; None for no tiles.

    tiling: True and False decide. None tiles if one picture may take more than ``budget`` bytes (`untiled_bytes`), by
    default the memory that is free on the VAE's device.
    """
    if tiling is None:
        limit = _free_bytes(vae.device) if budget is None else budget
        tiling = untiled_bytes(vae.config, height, width, vae.dtype) > limit
    return TILE if tiling else None


def untiled_bytes(config: VAEConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """The most bytes of activations that one picture of height x width pixels takes, encoded or decoded as a whole.

    At a level's first norm these are its input, in the decoder as wide as the level below, and two maps as wide:
    normed, and normed with SiLU. At later norms they are still the input, and four maps of the level's own width.
    """
    widths = config.block_out_channels
    levels = enumerate(zip((*widths[1:], widths[-1]), widths, strict=True))
    values = [(below + max(2 * below, 4 * own)) * height * width // 4**i for i, (below, own) in levels]
    return max(values) * dtype.itemsize


def _free_bytes(device: torch.device) -> float:
    """Free memory, on a GPU with what PyTorch's cache holds of it; infinite where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached

    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return math.inf
    fields = dict(line.split(":") for line in meminfo.read_text("ascii").splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])
