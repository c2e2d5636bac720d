"""The files that commands write: where they go, whether they can be written, and the pictures themselves."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.errors import ConfigError, one_line

if TYPE_CHECKING:
    from sdkit.generation.output import Output


@dataclass(frozen=True)
class Watch:
    """The previews and sheets to show and write beside the pictures; ``every``: steps between previews, 0 for none."""

    progress: bool = True
    every: int = 0
    previews: bool = False
    strip: bool = False
    attention: bool = False


def destinations(out: str, count: int) -> list[Path]:
    """Choose the files to write. Raises ConfigError, before the work begins, when they could not be written."""
    from sdkit.generation.png import numbered

    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        taken = [int(f.name[:4]) for f in path.glob("*.png") if re.fullmatch(r"\d{4}(-.*)?\.png", f.name)]
        first = max(taken, default=0) + 1
        paths = [path / f"{first + i:04d}.png" for i in range(count)]
    elif path.suffix.lower() != ".png":
        raise ConfigError(f"{out}: expected a name that ends in .png, or a folder (with / at the end to create it)")
    else:
        paths = numbered(path, count)

    for file in paths:
        if file.exists() and not file.is_file():
            raise ConfigError(f"{file}: cannot be written: not a regular file")
    check_writable(path, is_folder=paths[0].parent == path)
    return paths


def check_writable(path: Path, is_folder: bool) -> None:
    """Try to write beside ``path`` (in it, or where it would be made, for a folder). Leaves nothing behind."""
    folder = path if is_folder else path.parent
    while is_folder and not folder.exists():
        folder = folder.parent

    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "no such folder" if not folder.exists() else one_line(error).lower()
        raise ConfigError(f"{path}: cannot be written: {folder}: {reason}") from None


def write_pictures(
    result: Output, paths: list[Path], made_with: Mapping[str, Any], watch: Watch, seconds: float
) -> None:
    """Write each picture with its metadata, and beside it what ``watch`` asks for; print the names."""
    from sdkit.generation.png import write_png
    from sdkit.generation.provenance import with_parts
    from sdkit.viewing.attention_sheet import attention_sheet
    from sdkit.viewing.previews import film_strip

    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for index, (path, image, seed) in enumerate(zip(paths, result.images, result.seeds, strict=True)):
        facts = with_parts(image.info, made_with)
        write_png(image, path, facts)
        print(f"{path}  seed {seed}  {seconds / len(paths):.1f} s")

        if watch.previews:
            for preview in result.previews:
                print(write_png(preview.images[index], _beside(path, f"step{preview.step:02d}")))
        if watch.strip:
            frames = [preview.images[index] for preview in result.previews]
            sheet = film_strip(frames, [preview.label for preview in result.previews], final=image)
            print(write_png(sheet, _beside(path, "strip"), facts))
        if watch.attention and result.attention_maps is not None:
            sheet = attention_sheet(image, result.attention_maps, index=index)
            print(write_png(sheet, _beside(path, "attention"), facts))


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}-{what}.png")
