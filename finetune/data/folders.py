"""Folders of pictures and captions: what is in them, and everything that is wrong with them, before training starts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.captions import CaptionFiles, read_caption
from finetune.data.config import DataConfig
from finetune.data.metadata import Entry, captions_of
from finetune.data.walking import METADATA, LeftOut, walk
from finetune.options import refuse_unread_options
from sdkit.errors import ConfigError, SDKitError, one_line
from sdkit.images.pixels import open_image, unit_floats

REPEATS = re.compile(r"([0-9]+)_(.+)", re.DOTALL)
BESIDE, GIVEN, FOLDER, NOWHERE = "files beside them", "the prompt given", "the folder's name", "nowhere"
"""Where captions come from, in words, where it is no table."""


@dataclass(frozen=True)
class Picture:
    """One file: its caption, how often an epoch shows it, its size upright in pixels, the hash of its bytes.

    ``is_prior``: it shows the class that must not be forgotten (prior preservation), not the new subject. ``source``:
    where its caption comes from, in words.
    """

    path: Path
    caption: str
    repeats: int
    size: tuple[int, int]
    digest: str
    is_prior: bool = False
    source: str = NOWHERE


@dataclass(frozen=True)
class Rules:
    """How pictures get their captions and repeats.

    A caption is the first of: the picture's row in a table, with the caption in ``column``; a .txt or .caption file
    beside it; ``prompt``; the name of the nearest folder like 10_name (kohya's; 10 repeats), under ``folder_repeats``;
    ``last``. captioned: False leaves all captions empty and reads none. prior: what `Picture.is_prior` is.
    """

    prompt: str | None = None
    column: str = "text"
    folder_repeats: bool = True
    last: str | None = None
    captioned: bool = True
    prior: bool = False


@dataclass(frozen=True)
class Reading:
    """The pictures below a folder, in the order of their paths, and everything there that is not used.

    folders: the real paths of the folders that were read. problems: what has to be mended first, a line each.
    """

    pictures: list[Picture]
    left_out: list[LeftOut]
    folders: frozenset[Path]
    problems: list[str]

    @classmethod
    def joined(cls, readings: Sequence[Reading]) -> Reading:
        """Several folders as one."""
        return cls(
            [picture for r in readings for picture in r.pictures],
            [left for r in readings for left in r.left_out],
            frozenset[Path]().union(*(r.folders for r in readings)),
            [problem for r in readings for problem in r.problems],
        )


def read_folder(folder: Path, rules: Rules = Rules()) -> Reading:
    """Every picture below ``folder``. Raises ConfigError that lists every problem of pictures and captions, one a
    line."""
    found = survey(folder, rules)
    if found.problems:
        count = f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{folder}: {count} with the training data", *found.problems]))
    if not found.pictures:
        raise ConfigError(f"{folder}: no pictures here")
    return found


def survey(folder: Path, rules: Rules = Rules()) -> Reading:
    """What `read_folder` reads, with the problems instead of an error; only a folder that is none raises ConfigError.

    Each picture is decoded once to see that it is whole. Of a file with several frames the first is the picture.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of pictures")

    tree = walk(folder)
    rows = captions_of(tree, rules.column) if rules.captioned else {}
    files = CaptionFiles(tree.captions if rules.captioned else [])

    with ThreadPoolExecutor() as pool:
        looked = list(pool.map(lambda path: _look(path, folder, rules, rows, files), tree.pictures))

    pictures = [found for found in looked if isinstance(found, Picture)]
    problems = {problem for found in looked if not isinstance(found, Picture) for problem in found}
    left_out = [*tree.left_out, *files.left_out(tree.pictures, rows)]
    left_out += [LeftOut(p.path, "pictures in folders of 0 repeats") for p in pictures if not p.repeats]
    return Reading(pictures, sorted(left_out), frozenset(tree.folders), sorted(problems.union(tree.problems)))


def read_pictures(config: DataConfig, last_caption: str | None = None, captioned: bool = True) -> Reading:
    """The pictures of both folders. Raises ConfigError that lists all problems of both.

    last_caption: of pictures of the concept that would have none. captioned: False reads none, all are empty.
    """
    rules = Rules(config.instance_prompt, config.caption_column, config.folder_repeats, last_caption, captioned)
    folders = [(config.data, rules)]
    if config.class_data is not None:
        check_apart(config.data, config.class_data)
        folders.append((config.class_data, replace(rules, prompt=config.class_prompt, last=None, prior=True)))

    readings: list[Reading] = []
    problems: list[str] = []
    for folder, its in folders:
        try:
            readings.append(read_folder(folder, its))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))

    found = Reading.joined(readings)
    if not any(p.source.lower() in METADATA for p in found.pictures):
        refuse_unread_options(config, ("caption_column",), f"without {', '.join(METADATA)}")
    return found


def check_apart(data: Path, class_data: Path) -> None:
    """Raise ConfigError where a picture below one of two folders lies below the other too, be it by links.

    ``class_data`` need not be there yet.
    """
    first = walk(data).folders if data.is_dir() else {}
    second = walk(class_data).folders if class_data.is_dir() else {}
    shared = [real for real in first if real in second]
    for folder, inside in ((data, second), (class_data, first)):
        real = Path(os.path.realpath(folder))
        shared += [above for above in (real, *real.parents) if above in inside]
    if shared:
        raise ConfigError(f"class_data: expected a folder apart from data, found {shared[0]} in both")


def check_output(output: Path, config: DataConfig) -> None:
    """Raise ConfigError where a run's output would lie among its pictures, be it by links: the next run would take its
    sheets for pictures. The folder need not be there yet."""
    real = Path(os.path.realpath(output))
    for folder in (config.data, config.class_data):
        inside = walk(folder).folders if folder is not None and folder.is_dir() else {}
        if any(above in inside for above in (real, *real.parents)):
            raise ConfigError(f"output: expected a folder outside of {folder}, whose pictures train, found {output}")


def _look(
    path: Path, folder: Path, rules: Rules, rows: Mapping[Path, Entry], files: CaptionFiles
) -> Picture | list[str]:
    """The picture, or what is wrong with it."""
    problems: list[str] = []
    repeats, name = _repeats(path, folder, problems) if rules.folder_repeats else (1, None)
    caption, source = _caption(path, name, rules, rows, files, problems)

    try:
        image = open_image(path)
        if image.mode in ("I", "F"):
            unit_floats(image)  # whose values have no range of their own
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except ConfigError as error:
        return [*problems, f"{path}: {one_line(error)}"]
    except SDKitError as error:
        return [*problems, one_line(error)]

    return problems or Picture(path, caption, repeats, image.size, digest, rules.prior, source)


def _caption(
    path: Path, name: str | None, rules: Rules, rows: Mapping[Path, Entry], files: CaptionFiles, problems: list[str]
) -> tuple[str, str]:
    """A picture's caption and where it comes from; ``name`` is its folder's."""
    if not rules.captioned:
        return "", NOWHERE
    if path in rows:
        return rows[path].caption, rows[path].table.name
    if beside := files.beside(path):
        return read_caption(beside[0], problems), BESIDE

    for caption, source in ((rules.prompt, GIVEN), (name, FOLDER), (rules.last, GIVEN)):
        if caption is not None:
            return caption, source
    problems.append(f"{path}: no caption: no row in a metadata file, no {path.with_suffix('.txt').name} beside it")
    return "", NOWHERE


def _repeats(path: Path, folder: Path, problems: list[str]) -> tuple[int, str | None]:
    """The repeats and the name that the nearest folder like 10_name stands for; 1 and None without one."""
    above = [folder / part for part in path.parent.relative_to(folder).parents]
    for place in (path.parent, *above):
        match = REPEATS.fullmatch(Path(os.path.abspath(place)).name)
        if match is None:
            continue

        number, name = match.groups()
        if len(number) > 3 or (number[0] == "0" and number != "0"):
            said = f"{int(number):,} repeats of {name!r}"
            problems.append(
                f"{place}: expected a folder's name not to say {said}; --no-folder-repeats takes it as it is"
            )
        return int(number), name
    return 1, None
