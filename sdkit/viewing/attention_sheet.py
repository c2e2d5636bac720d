"""A sheet of a picture and, beside it, where in it each word of its prompt was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from sdkit.errors import ConfigError
from sdkit.images.sheet import contact_sheet
from sdkit.viewing.attention_maps import AttentionMaps, Word

MapScale = Literal["word", "shared"]

# Words that name nothing one could point at; a sheet leaves them out unless it is asked for them.
FUNCTION_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "into", "is", "it", "its", "of", "on", "onto", "or",
    "over", "that", "the", "their", "this", "to", "under", "with",
})  # fmt: skip

MOST_PANELS = 12


def attention_sheet(
    image: Image.Image,
    maps: AttentionMaps,
    words: Sequence[str] | None = None,
    index: int = 0,
    scale: MapScale = "word",
    min_side: int = 256,
) -> Image.Image:
    """Make a sheet: the picture, then for each word its map over the greyed picture, with the map's range below.

    image: picture number ``index`` of the batch, scaled up by a whole factor to at least ``min_side`` pixels.
    words: words or phrases of its prompt; by default the first 12 that are more than marks and function words.
    scale: colours run from dark (least) to bright (most attention). "word": over each word's own range, which shows
        where it lies; "shared": over the range of all words shown, which shows which are looked at more.
    Raises ConfigError for another scale, or a word that is not in the prompt.
    """
    if scale not in ("word", "shared"):
        raise ConfigError(f"attention sheet: expected the scale 'word' or 'shared', found {scale!r}")

    shown = _telling_words(maps.words[index]) if words is None else list(words)
    heat = [maps.word(word, index).float().numpy() for word in shown]
    ranges = [(float(h.min()), float(h.max())) for h in heat]
    if scale == "shared" and ranges:
        ranges = [(min(low for low, _ in ranges), max(high for _, high in ranges))] * len(ranges)

    factor = max(1, -(-min_side // min(image.size)))
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    panels = [overlay(picture, h, *limits) for h, limits in zip(heat, ranges, strict=True)]
    captions = [f"{word} ({100 * h.min():.1f} to {100 * h.max():.1f} %)" for word, h in zip(shown, heat, strict=True)]
    note = "colours over each word's own range" if scale == "word" else "colours over one range for all words"

    count = len(panels) + 1
    rows = -(-count // 5)
    return contact_sheet(
        [picture, *panels], -(-count // rows), [note, *captions], gap=max(8, picture.width // 32), font_size=14
    )


def _telling_words(words: Sequence[Word]) -> list[str]:
    texts = dict.fromkeys(word.text for word in words)
    return [t for t in texts if t not in FUNCTION_WORDS and any(c.isalnum() for c in t)][:MOST_PANELS]


def overlay(picture: Image.Image, heat: np.ndarray, low: float, high: float) -> Image.Image:
    """The map [H, W] in colours over the greyed picture: dark at ``low``, bright at ``high``."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    smooth = np.asarray(Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC))
    colour = ScalarMappable(Normalize(low, high, clip=True), "inferno").to_rgba(smooth)[..., :3]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    mixed = 0.35 * grey + 0.65 * colour
    return Image.fromarray((mixed * 255).round().astype(np.uint8))
