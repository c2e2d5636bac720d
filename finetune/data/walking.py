"""One way through a folder of training data: every file below it, once, sorted by what it looks like."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

CAPTIONS = (".txt", ".caption")
"""Endings of captions beside pictures; of two the first is read."""

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of tables of captions (Hugging Face's imagefolder), in any case."""

STUBS = {"BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Formats that Pillow tells but does not read."""

SURE = ("AVIF", "GIF", "JPEG", "JPEG2000", "PNG", "PSD", "QOI", "TIFF", "WEBP")
"""Formats whose first bytes are enough to tell that a file is meant as one, be the rest of it damaged."""

FOREIGN = {
    ".ai", ".arw", ".avif", ".cr2", ".cr3", ".dng", ".emf", ".exr", ".hdr", ".heic", ".heif",
    ".jxl", ".kra", ".nef", ".orf", ".raf", ".raw", ".rw2", ".svg", ".wmf", ".xcf",
}  # fmt: skip
"""Endings of pictures that Pillow does not read everywhere; those that it does read here are read."""

TABLES = {
    ".arrow", ".cap", ".csv", ".json", ".jsonl", ".parquet", ".tag", ".tags", ".text", ".toml", ".tsv",
    ".xml", ".yaml", ".yml",
}  # fmt: skip
"""Endings of files that other programs keep captions in."""

FOREIGN_PICTURES = "pictures of a format that Pillow does not read"
OTHER_TABLES = "tables that are not read (expected metadata.jsonl, metadata.csv or metadata.parquet)"

HIDDEN = (".", "__MACOSX")
"""How the names of hidden files and folders begin."""


class LeftOut(NamedTuple):
    """A file or folder that looks like training data and is not used, and why, in the plural: "hidden files"."""

    path: Path
    why: str


@dataclass(frozen=True)
class Tree:
    """What lies below a folder, by the paths under which it was found; sorted.

    folders: the real path of every folder that was read -> the path under which it was; hidden ones are not in it.
    left_out: hidden files, files that nobody reads, links that lead nowhere or where something was read before.
    problems: what has to be mended first, one line each.
    """

    pictures: list[Path] = field(default_factory=list[Path])
    captions: list[Path] = field(default_factory=list[Path])
    metadata: list[Path] = field(default_factory=list[Path])
    folders: dict[Path, Path] = field(default_factory=dict[Path, Path])
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])
    problems: list[str] = field(default_factory=list[str])


def walk(root: Path) -> Tree:
    """Everything below ``root``, links followed.

    A folder is read once, however many links lead to it: first where it lies, else under the first link in the order
    of names, and hidden ones last. So links in a circle end, and a folder that a visible link shows is not hidden.
    """
    tree, looks = Tree(), Looks()
    seen: set[Path] = set()
    folders, links, hidden = deque([root]), deque[Path](), deque[Path]()

    while folders or links or hidden:
        queue = folders or links or hidden
        folder, visible = queue.popleft(), queue is not hidden
        real = Path(os.path.realpath(folder))
        if real in seen:
            if visible:
                tree.left_out.append(LeftOut(folder, "links to folders that are read under another name"))
            continue

        seen.add(real)
        if visible:
            tree.folders[real] = folder
        for path in _entries(folder, tree, visible):
            shown = visible and not path.name.startswith(HIDDEN)
            if os.path.isdir(path):
                (hidden if not shown else links if os.path.islink(path) else folders).append(path)
            elif shown:
                _sort(path, looks, tree)
            elif looks.like(path) not in (None, OTHER_TABLES):
                tree.left_out.append(LeftOut(path, "hidden files"))

    for found in (tree.pictures, tree.captions, tree.metadata, tree.left_out):
        found.sort()
    return tree


def _entries(folder: Path, tree: Tree, visible: bool) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError as error:
        if visible:
            tree.problems.append(f"{folder}: the folder cannot be read ({error.strerror})")
        else:
            tree.left_out.append(LeftOut(folder, "hidden folders that cannot be read"))
        return []


def _sort(path: Path, looks: Looks, tree: Tree) -> None:
    """Put a visible file where it belongs."""
    like = looks.like(path)
    if not os.path.exists(path):
        if like is None:  # it may have been a folder of pictures
            tree.left_out.append(LeftOut(path, "links that lead nowhere"))
        else:
            tree.problems.append(f"{path}: the link leads nowhere")
    elif like is not None and not os.path.isfile(path):
        tree.left_out.append(LeftOut(path, "devices, pipes and sockets"))
    elif like == "picture":
        tree.pictures.append(path)
    elif like == "caption":
        tree.captions.append(path)
    elif like == "metadata":
        tree.metadata.append(path)
    elif like is not None:
        tree.left_out.append(LeftOut(path, like))


class Looks:
    """What files look like, for the formats that Pillow reads now (plugins register theirs)."""

    def __init__(self) -> None:
        endings = Image.registered_extensions()
        self.endings = {ending for ending, kind in endings.items() if kind in Image.OPEN and kind not in STUBS}
        self.sure = [Image.OPEN[kind][1] for kind in SURE if kind in Image.OPEN]
        # Without a signature a format takes any bytes for its own.
        self.signed = [kind for kind, (_, accept) in Image.OPEN.items() if accept is not None and kind not in STUBS]

    def like(self, path: Path) -> str | None:
        """ "picture", "caption", "metadata", the plural of something that nobody reads, or None for anything else."""
        name, ending = path.name.lower(), path.suffix.lower()
        if name in METADATA:
            return "metadata"
        if ending in CAPTIONS:
            return "caption"
        if ending in self.endings:
            return "picture"
        if ending in FOREIGN:
            return FOREIGN_PICTURES
        if ending in TABLES:
            return OTHER_TABLES
        return "picture" if os.path.isfile(path) and self.holds_picture(path) else None

    def holds_picture(self, path: Path) -> bool:
        """Whether the content is a picture's, whatever the name is."""
        try:
            with path.open("rb") as file:
                start = file.read(16)
                if any(accept is not None and accept(start) is True for accept in self.sure):
                    return True

                file.seek(0)
                with Image.open(file, formats=self.signed):
                    return True
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            return False
