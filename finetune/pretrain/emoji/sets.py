"""Emoji in three styles, read from npm packages and drawn with a random place, size, turn and background.

Noto and its first version are Google's, Apache-2.0; Fluent flat is Microsoft's, MIT; all three come as SVG from Iconify
(`@iconify-json/…`). Names of subjects are Unicode's, from `emojibase-data`, MIT. None of it is in this repository.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sdkit.errors import ConfigError

STYLES = {"noto": "noto", "classic": "noto-v1", "fluent": "fluent-emoji-flat"}  # the word in captions, the package
BASE, LEARNT = ("noto", "classic"), "fluent"
GROUPS = (3, 4)  # of emojibase: animals and nature, food and drink
BACKGROUNDS = ("#ffffff", "#f4f1de", "#e0ecf4", "#e8f3e1", "#fbe4e4", "#ece6f5", "#d9d9d9")


@dataclass(frozen=True)
class Icon:
    """An emoji's SVG ``body``, on a canvas of ``width`` x ``height``."""

    body: str
    width: float
    height: float


Sets = dict[str, dict[str, Icon]]
"""Of each style the icons by subject: {"noto": {"cat": …}}."""


def caption(subject: str, style: str) -> str:
    """What a picture's caption says: "cat, noto style"."""
    return f"{subject}, {style} style"


def read_sets(modules: Path) -> Sets:
    """The subjects of GROUPS that all styles have. ``modules`` is the folder node_modules that npm has filled.

    Raises ConfigError for a missing package.
    """
    names = json.loads(_file(modules, "@iconify-json/noto/chars.json").read_text(encoding="utf-8"))
    emoji = json.loads(_file(modules, "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    icons = {
        style: json.loads(_file(modules, f"@iconify-json/{package}/icons.json").read_text(encoding="utf-8"))
        for style, package in STYLES.items()
    }

    sets: Sets = {style: {} for style in STYLES}
    for one in emoji:
        name = names.get(one["hexcode"].lower())
        if one.get("group") in GROUPS and name and all(name in icons[style]["icons"] for style in STYLES):
            for style in STYLES:
                sets[style][one["label"].lower()] = _icon(icons[style], name)
    return sets


def _file(modules: Path, name: str) -> Path:
    if not (modules / name).is_file():
        raise ConfigError(f"{modules / name}: not found; npm install --prefix {modules.parent} puts it there")
    return modules / name


def _icon(package: dict[str, Any], name: str) -> Icon:
    own = package["icons"][name]
    width, height = (float(own.get(side, package.get(side, 16))) for side in ("width", "height"))
    return Icon(own["body"], width, height)


def draw(icon: Icon, size: int, rng: random.Random) -> Image.Image:
    """The icon on a picture of ``size`` pixels: nine tenths of it wide to six, turned by up to 12 degrees, now and then
    mirrored, on one of BACKGROUNDS."""
    import resvg_py

    scale = rng.uniform(0.6, 0.9) * size / max(icon.width, icon.height)
    turn, flip = rng.uniform(-12, 12), rng.choice((-1, 1))
    free = size * 0.9 - scale * max(icon.width, icon.height)
    x, y = (size / 2 + rng.uniform(-0.5, 0.5) * free for _ in range(2))

    place = f"translate({x} {y}) rotate({turn}) scale({flip * scale} {scale})"
    place += f" translate({-icon.width / 2} {-icon.height / 2})"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {size} {size}" width="{size}" height="{size}">'
        f'<rect width="{size}" height="{size}" fill="{rng.choice(BACKGROUNDS)}"/>'
        f'<g transform="{place}">{icon.body}</g></svg>'
    )
    return Image.open(BytesIO(resvg_py.svg_to_bytes(svg_string=svg))).convert("RGB")
