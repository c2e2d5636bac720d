"""The objective of a noise predictor's training: a module from a batch to its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn

import sdkernels
from finetune.data.batches import Batch
from finetune.data.cache import text_encoding
from finetune.options import check_options
from finetune.training.min_snr import min_snr_weight
from sdkit.checks import POSITIVE, Range, refuse_unread
from sdkit.errors import ConfigError
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.sampling.schedule import NoiseSchedule

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class LossConfig:
    """How the squared error of a noise predictor is weighted, and what noise it is shown."""

    snr_gamma: Annotated[float | None, "Min-SNR weights (arXiv 2303.09556); the paper's gamma is 5.", POSITIVE] = None
    noise_offset: Annotated[
        float, "Add to each channel's noise a normal times this, for darker darks; about 0.05.", Range(0)
    ] = 0.0
    prior_target: Annotated[
        Literal["picture", "base"],
        "Pictures of --class-data teach what they show, as all pictures do, or what the untouched model makes of them, "
        "which keeps it better and costs a forward pass.",
    ] = "picture"

    def __post_init__(self) -> None:
        check_options(self)


def draw_noise(
    shape: torch.Size, generators: Sequence[torch.Generator], steps: int, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(timesteps [B] below ``steps``, noise [B, C, h, w]) on the CPU, each sample's from its own generator.

    With an offset each channel's noise is shifted as a whole, by a normal times ``offset``: without it a network hardly
    learns to change a picture's mean brightness (Guttenberg, "Diffusion with offset noise", 2023).
    """
    timesteps: list[Tensor] = []
    noise: list[Tensor] = []
    for generator in generators:
        timesteps.append(torch.randint(steps, (1,), generator=generator))
        noise.append(torch.randn(shape[1:], generator=generator))
        if offset:
            noise[-1] += offset * torch.randn(shape[1], *(1,) * (len(shape) - 2), generator=generator)

    return torch.cat(timesteps), torch.stack(noise)


class DiffusionLoss(nn.Module):
    """forward(batch) -> the mean over samples of weight * squared error, a scalar in float32.

    ``context`` gives captions their hidden states [B, M, D]: a cache, or a module whose parameters are then trained
    with the UNet's. Trained are the parameters that require a gradient.

    ``base()`` is a block in which everything, ``context`` too, is as before training; it gives the UNet to ask. Under
    ``prior_target`` "base" the samples of the prior class have that UNet's prediction as their target, in place of the
    noise that they were given: learning without forgetting (arXiv 1606.09282). At first their loss is 0; and unlike the
    noise, which no network can know, this target has no random part, so it pulls back nothing else.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        context: Callable[[Sequence[str]], Tensor],
        schedule: NoiseSchedule,
        config: LossConfig,
        base: Callable[[], AbstractContextManager[nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        if config.prior_target == "base" and base is None:
            raise ConfigError("prior_target: expected picture, as what is trained here has no base beside it")
        if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
            raise ConfigError("prediction_type: epsilon has no meaning at zero terminal SNR; expected v_prediction")
        if schedule.prediction_type == "epsilon" and (config.snr_gamma or 0) >= (most := float(schedule.snr(0))):
            refuse_unread(
                "snr_gamma", config.snr_gamma, None, f"from the schedule's largest SNR on, which is {most:.4g}"
            )

        self.unet, self.context, self.schedule, self.config, self.base = unet, context, schedule, config, base
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.clone(), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        steps, device, dtype = self.schedule.num_train_timesteps, self.unet.device, self.unet.dtype
        t, noise = draw_noise(batch.latents.shape, batch.generators, steps, self.config.noise_offset)

        weights = batch.weights.double()
        if self.config.snr_gamma is not None:
            weights = weights * min_snr_weight(self.schedule, t, self.config.snr_gamma)

        x0, noise, t = (x.to(device, non_blocking=True) for x in (batch.latents, noise, t))
        x_t, target = sdkernels.add_noise(x0, noise, t, self.alphas_cumprod, self.schedule.prediction_type)  # type: ignore[arg-type]
        x_t, target = x_t.to(dtype), target.float()
        if self.config.prior_target == "base":
            target = self._kept(target, x_t, t, batch)

        prediction = self.unet(x_t, t, self.context(batch.captions).to(device, dtype))
        error = (prediction.float() - target).square().flatten(1).mean(1)
        return (error * weights.to(device, torch.float32)).mean()

    @torch.no_grad()
    def _kept(self, target: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """``target`` [B, C, h, w], where the samples of the prior class have the base's prediction."""
        rows = batch.prior.nonzero().flatten()
        if self.base is None or not len(rows):
            return target

        captions, rows = [batch.captions[i] for i in rows.tolist()], rows.to(x_t.device)
        with self.base() as unet:
            prediction = unet(x_t[rows], t[rows], self.context(captions).to(x_t))
        return target.index_copy(0, rows, prediction.float())


class TrainedText(nn.Module):
    """A text encoder that is trained with the UNet: forward(captions) -> hidden states [B, M, D]."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, clip_skip: int = 0) -> None:
        super().__init__()
        self.text_encoder: nn.Module = text_encoder
        self.encode = text_encoding(tokenizer, text_encoder, clip_skip)

    def forward(self, captions: Sequence[str]) -> Tensor:
        return self.encode(captions)
