"""Folders of pictures and captions: what is in them, and everything that is wrong with them, before training starts.

A picture's caption is the first of: its line in a ``metadata.jsonl`` (Hugging Face's imagefolder), a ``.txt`` or
``.caption`` file beside it, the name of a folder like ``10_name`` (kohya's; 10 repeats), the caption given for all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sdkit.errors import ConfigError, SDKitError, one_line
from sdkit.images.pixels import open_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
METADATA = "metadata.jsonl"
REPEATS = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Picture:
    """One file: its caption, how often an epoch shows it, its size upright in pixels, the hash of its bytes.

    ``is_prior``: it shows the class that must not be forgotten (prior preservation), not the new subject.
    """

    path: Path
    caption: str
    repeats: int
    size: tuple[int, int]
    digest: str
    is_prior: bool = False


def read_folder(folder: Path, caption: str | None, caption_column: str = "text", prior: bool = False) -> list[Picture]:
    """Every picture below ``folder``, in the order of their paths; each is decoded once to see that it is whole.

    ``caption`` is for pictures that have none. Raises ConfigError that lists every missing or damaged picture and
    caption, one a line.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of pictures")

    problems: list[str] = []
    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in SUFFIXES and not _hidden(f, folder)]
    captions = _metadata(sorted(folder.rglob(METADATA)), caption_column, problems)
    problems += [f"{path}: no such picture ({where})" for path, (_, where) in captions.items() if not path.is_file()]
    if not files and not problems:
        raise ConfigError(f"{folder}: no pictures here; expected {', '.join(sorted(SUFFIXES))}")

    def look(path: Path) -> Picture | list[str]:
        own: list[str] = []
        repeats, name = _repeats(path, folder)
        text = captions[path][0] if path in captions else _caption_beside(path, own)
        text = text or name or caption
        if text is None and not own:
            own.append(f"{path}: no caption: no line in a {METADATA}, no {path.with_suffix('.txt').name} beside it")

        try:
            size = open_image(path).size
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except SDKitError as error:
            return [*own, one_line(error)]

        return own or Picture(path, text or "", repeats, size, digest, prior)

    with ThreadPoolExecutor() as pool:
        looked = list(pool.map(look, files))

    problems += [problem for found in looked if isinstance(found, list) for problem in found]
    _raise(folder, problems)
    return [found for found in looked if isinstance(found, Picture)]


def _raise(folder: Path, problems: Iterable[str]) -> None:
    lines = sorted(problems)
    if lines:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{folder}: {count} with the training data", *lines]))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)


def _repeats(path: Path, folder: Path) -> tuple[int, str | None]:
    """The repeats and the name that the nearest folder like 10_name stands for; 1 and None without one."""
    below = path.parent.relative_to(folder).parts
    for part in (*reversed(below), folder.resolve().name):
        match = REPEATS.fullmatch(part)
        if match:
            return int(match[1]), match[2]
    return 1, None


def _caption_beside(path: Path, problems: list[str]) -> str | None:
    for suffix in (".txt", ".caption"):
        file = path.with_suffix(suffix)
        if file.is_file():
            try:
                text = " ".join(file.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError:
                problems.append(f"{file}: expected a caption in UTF-8")
                return None
            if not text:
                problems.append(f"{file}: the caption is empty")
            return text
    return None


def _metadata(files: list[Path], column: str, problems: list[str]) -> dict[Path, tuple[str, str]]:
    """Picture -> (caption, "file, line n") of every metadata.jsonl."""
    found: dict[Path, tuple[str, str]] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            problems.append(f"{file}: expected JSON lines in UTF-8")
            continue

        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue

            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry[column]
            except (ValueError, KeyError, TypeError):
                problems.append(f'{where}: expected {{"file_name": …, "{column}": …}}')
                continue

            if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
                problems.append(f"{where}: file_name and {column} must be text, and not empty")
                continue
            found[file.parent / name] = (" ".join(text.split()), where)
    return found
