"""How good pictures out of the VAE are, against those that went in: PSNR, SSIM, and with weights LPIPS and rFID."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from finetune.vae_decoder.perceptual import LPIPS, ssim
from sdkit.errors import CheckpointError, one_line
from sdkit.networks.vae import AutoencoderKL

Features = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] in [-1, 1] -> features [B, D]."""


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B], of pictures [B, 3, H, W] in [-1, 1]; infinite for equal ones."""
    return 10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m - n|² + tr(S + T - 2 (S T)^½) of the means and covariances of features [N, D] and [M, D], in float64
    (Heusel et al., arXiv 1706.08500). N and M are at least 2; with few pictures it is biased upwards.
    """
    x, y = x.double(), y.double()
    s, t = x.T.cov(), y.T.cov()

    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    # S T has the eigenvalues of the symmetric S^½ T S^½, which are found more exactly.
    mixed = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + s.trace() + t.trace() - 2 * mixed)


def load_inception(path: str | Path, device: torch.device) -> Features:
    """The Inception network of FID from the TorchScript file ``inception-2015-12-05.pt`` of StyleGAN2-ADA.

    It takes pictures of any size in 8 bits and gives 2048 features. Raises CheckpointError.
    """
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected Inception as TorchScript: {one_line(error)}") from None

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        return network(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), return_features=True)

    return features


@torch.no_grad()
def measure(
    vae: AutoencoderKL, pictures: Iterable[Tensor], lpips: LPIPS | None = None, inception: Features | None = None
) -> dict[str, float]:
    """Means over ``pictures``, each [1, 3, H, W] in [-1, 1], of the measures of its reconstruction through the
    posterior's mean, clamped to [-1, 1]; rFID is one number for all, and needs two.
    """
    rows: list[dict[str, Tensor]] = []
    features: list[Tensor] = []
    for picture in pictures:
        x = picture.to(vae.device)
        y = vae(x).clamp(-1, 1)
        row = {"PSNR": psnr(x, y), "SSIM": ssim(x, y)}
        rows.append(row if lpips is None else row | {"LPIPS": lpips(x, y)})
        if inception is not None:
            features.append(torch.cat([inception(x), inception(y)]))

    figures = {name: torch.cat([row[name] for row in rows]).mean().item() for name in rows[0]}
    if inception is not None:
        real, made = torch.stack(features, 1)
        figures["rFID"] = frechet_distance(real, made)
    return figures
