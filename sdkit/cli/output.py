"""The files that commands write: where they go, whether they can be written, and the pictures themselves."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Destinations(NamedTuple):
    """The files to write; ``counted``: the next free numbers of a folder, as long as no other process takes them."""

    paths: list[Path]
    counted: bool

    @contextmanager
    def taken(self) -> Generator[list[Path]]:
        """The files, of a folder those that are free now; inside the block no other process takes them.

        What is not written until its end is free again.
        """
        folder = self.paths[0].parent
        folder.mkdir(parents=True, exist_ok=True)
        if not self.counted:
            yield self.paths
            return

        ours: list[Path] = []
        try:
            for number in count(int(self.paths[0].stem)):
                if len(ours) == len(self.paths):
                    break
                with suppress(FileExistsError):
                    (folder / f"{number:04d}.png").open("x").close()
                    ours.append(folder / f"{number:04d}.png")
            yield ours
        finally:
            for file in ours:
                if file.exists() and not file.stat().st_size:
                    file.unlink()


def destinations(out: str, number: int) -> Destinations:
    """Choose the files to write. Raises ConfigError, before the work begins, when they could not be written."""
    from sdkit.generation.png import numbered

    path = Path(out)
    counted = path.is_dir() or out.endswith("/")
    if counted:
        names = [re.fullmatch(r"(\d{4,})(-.*)?\.png", file.name) for file in path.glob("*.png")]
        first = max((int(name[1]) for name in names if name), default=0) + 1
        paths = [path / f"{first + i:04d}.png" for i in range(number)]
    elif path.suffix.lower() != ".png":
        raise ConfigError(f"{out}: expected a name that ends in .png, or a folder (with / at the end to create it)")
    else:
        paths = numbered(path, number)

    for file in paths:
        if file.exists() and not file.is_file():
            raise ConfigError(f"{file}: cannot be written: not a regular file")
    check_writable(path, is_folder=paths[0].parent == path)
    return Destinations(paths, counted)


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
    result: Output, places: Destinations, made_with: Mapping[str, Any], watch: Watch, seconds: float
) -> None:
    """Write each picture with its metadata, and beside it what ``watch`` asks for; print the names."""
    from sdkit.generation.png import write_png
    from sdkit.generation.provenance import with_parts

    with places.taken() as paths:
        for index, (path, image, seed) in enumerate(zip(paths, result.images, result.seeds, strict=True)):
            facts = with_parts(image.info, made_with)
            write_png(image, path, facts)
            print(f"{path}  seed {seed}  {seconds / len(paths):.1f} s")
            _write_beside(result, index, path, facts, watch)


def _write_beside(result: Output, index: int, path: Path, facts: Mapping[str, Any], watch: Watch) -> None:
    """The previews and sheets of a picture."""
    from sdkit.generation.png import write_png
    from sdkit.viewing.attention_sheet import attention_sheet
    from sdkit.viewing.previews import film_strip

    if watch.previews:
        for preview in result.previews:
            print(write_png(preview.images[index], _beside(path, f"step{preview.step:02d}")))
    if watch.strip:
        frames = [preview.images[index] for preview in result.previews]
        sheet = film_strip(frames, [preview.label for preview in result.previews], final=result.images[index])
        print(write_png(sheet, _beside(path, "strip"), facts))
    if watch.attention and result.attention_maps is not None:
        sheet = attention_sheet(result.images[index], result.attention_maps, index=index)
        print(write_png(sheet, _beside(path, "attention"), facts))


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}-{what}.png")
