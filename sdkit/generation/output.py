"""What a task gives back: pictures that say how they were made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.generation.png import numbered, write_png
from sdkit.images.sheet import contact_sheet
from sdkit.viewing.attention_maps import AttentionMaps
from sdkit.viewing.previews import Preview


@dataclass(frozen=True, repr=False)
class Output:
    """The result of a task. A notebook shows its pictures.

    images: a list of Pillow images ("pil"; `save` keeps in the PNG how they were made), a tensor [B, 3, H, W] in [0, 1]
        ("pt"), or the latents ("latent").
    latents: the final ones [B, C, h, w], in the noise predictor's scale.
    seeds: one for each image; empty when generators or latents were given.
    num_steps_run: whole sampling steps.
    attention_maps: `sdkit.attention_sheet` shows them; None where none were asked for.
    """

    images: Any
    latents: Tensor
    seeds: list[int]
    num_steps_run: int
    previews: list[Preview] = field(default_factory=list[Preview])
    attention_maps: AttentionMaps | None = None

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the pictures as PNG with their metadata, by which ``sdkit reproduce`` makes them again: one as
        ``path``, several as NAME-0001.png and so on. Returns their paths.

        Raises ConfigError for another ending, or images that are tensors; SDKitError where a file cannot be written.
        """
        file = Path(path)
        if not isinstance(self.images, list):
            raise ConfigError('save: expected pictures, found a tensor (output_type "pil" gives pictures)')
        if file.suffix.lower() != ".png":
            raise ConfigError(f"{file}: expected a name that ends in .png, which can hold how a picture was made")
        paths = numbered(file, len(self.images))
        return [write_png(image, own, image.info) for image, own in zip(self.images, paths, strict=True)]

    def __repr__(self) -> str:
        width, height = self.images[0].size if isinstance(self.images, list) else self.images.shape[:1:-1]
        what = "latents" if self.images is self.latents else "pictures" if len(self.images) > 1 else "picture"
        seeds = f", seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}" if self.seeds else ""
        return f"Output({len(self.images)} {what} of {width} x {height}{seeds}, {self.num_steps_run} steps)"

    def _repr_png_(self) -> bytes | None:
        """The pictures on one sheet, for a notebook."""
        if not isinstance(self.images, list):
            return None
        sheet = self.images[0] if len(self.images) == 1 else contact_sheet(self.images, min(4, len(self.images)))
        buffer = BytesIO()
        sheet.save(buffer, format="PNG")
        return buffer.getvalue()
