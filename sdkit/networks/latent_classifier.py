"""A classifier of noisy latents, to guide sampling by: the UNet's blocks going down, then a mean over pixels.

As in arXiv 2105.05233 (section 4.1) it is trained at all noise levels and told the timestep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.checks import Range
from sdkit.errors import ConfigError
from sdkit.networks.config import Width
from sdkit.networks.convolution import Conv2d
from sdkit.networks.fusion import Sum
from sdkit.networks.layers import Downsample2D, GroupNorm, ResnetBlock2D, TimestepEmbedding, timestep_embedding
from sdkit.typed_json import checked


@dataclass(frozen=True)
class ClassifierConfig:
    """classes: their names, in the order of the logits. widths: channels of the levels, each half as large as the one
    before."""

    classes: Annotated[tuple[str, ...], Range(1, 10_000)]
    in_channels: Width = 4
    widths: Annotated[tuple[Width, ...], Range(1, 16)] = (64, 128)
    groups: Width = 16

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ClassifierConfig:
        """From config.json. Raises ConfigError for an entry that there is not, is missing, or is of another kind."""
        known = {f.name for f in fields(cls)}
        if unknown := config.keys() - known:
            raise ConfigError(f"classifier config: unsupported {', '.join(sorted(unknown))}")
        if "classes" not in config:
            raise ConfigError("classifier config: classes: expected their names, found none")
        return cls(**checked(cls, config, "classifier config"))

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)


class LatentClassifier(nn.Module):
    """forward(x_t [B, C, h, w], t [B]) -> logits [B, classes], of the latents in their variance-preserving scaling.

    So it can be given to every task as it is: ``classifier=``, with ``class_labels=`` from `labels`.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.widths[0], config.widths[-1]
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        self.conv_in = Conv2d(config.in_channels, first, 3, padding=1)

        self.resnets, self.time_projections, self.downsamplers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = first
        for level, width in enumerate(config.widths):
            for _ in range(2):
                self.resnets.append(ResnetBlock2D(before, width, config.groups, 1e-5, None))
                self.time_projections.append(nn.Linear(4 * first, width))
                before = width
            if level + 1 < len(config.widths):
                self.downsamplers.append(Downsample2D(width, 1))

        self.norm_out = GroupNorm(config.groups, last)
        self.out = nn.Linear(last, len(config.classes))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        embedding = timestep_embedding(t, self.config.widths[0]).to(self.out.weight.dtype)
        time = F.silu(self.time_embedding(embedding))

        h = Sum(self.conv_in(x_t.to(self.out.weight.dtype)))
        for j, (resnet, projection) in enumerate(zip(self.resnets, self.time_projections, strict=True)):
            h = resnet(h, projection(time))
            if j % 2 and j // 2 < len(self.downsamplers):
                h = self.downsamplers[j // 2](h.total())
        return self.out(self.norm_out(h.total(), "silu").mean(dim=(2, 3)))

    def labels(self, names: str | Sequence[str]) -> list[int]:
        """The numbers of classes, for ``class_labels``. Raises ConfigError for a name that is none."""
        wanted = [names] if isinstance(names, str) else names
        for name in wanted:
            if name not in self.config.classes:
                raise ConfigError(f"classifier: expected one of {', '.join(self.config.classes)}, found {name!r}")
        return [self.config.classes.index(name) for name in wanted]
