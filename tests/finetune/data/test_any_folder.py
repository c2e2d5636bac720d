"""Folders of any make: each picture is used or named, and so is each caption and each row of a table."""

import csv
import io
import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.folders import BESIDE, FOLDER, GIVEN, Reading, Rules, read_folder, survey
from sdkit.errors import ConfigError

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
PLACES = (
    "",
    "sub",
    "sub/deep",
    "10_cup",
    "10_cup/3_red",
    "0_off",
    "2024_trip",
    ".hid",
    ".hid/in",
    f"n{NFD}",
    "../pool",
)
STEMS = ("a", "b", "x y", NFC, NFD, ".dot")
ENDINGS = (".png", ".JPG", ".jfif", ".tga", "", ".v2", ".png~", ".heic")
TEXTS = ("", "a  cup\n", "caf\u00e9, red")


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(stream, kind)
    return stream.getvalue()


CONTENTS = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF")}
CONTENTS["cut"] = CONTENTS["PNG"][:40]


@dataclass(frozen=True)
class Plan:
    """What is laid into a folder; everything by its path below the folder."""

    pictures: dict[str, str]
    captions: dict[str, str]
    links: dict[str, str]
    tables: dict[str, list[tuple[str, str]]]
    """Table -> (picture's path, or a name that is none; how it is spelled)."""
    rules: Rules


@dataclass(frozen=True)
class Row:
    """A row of a table as it was written, and the real path of the picture that it means."""

    table: str
    line: int
    name: str
    text: str
    target: str
    how: str


def below(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def other_letters(name: str) -> str:
    return unicodedata.normalize("NFC" if name != unicodedata.normalize("NFC", name) else "NFD", name)


SPELLINGS: dict[str, Any] = {
    "plain": lambda relative, path: relative,
    "dot": lambda relative, path: f"./{relative}",
    "round": lambda relative, path: f"{relative}/../{os.path.basename(relative)}",
    "backslashes": lambda relative, path: relative.replace("/", "\\"),
    "quoted": lambda relative, path: quote(relative),
    "letters": lambda relative, path: other_letters(relative),
    "whole": lambda relative, path: path,
    "url": lambda relative, path: f"file://{quote(path)}",
}


def names(*endings: str) -> st.SearchStrategy[str]:
    each = (PLACES, STEMS, endings)
    return st.builds(lambda place, stem, ending: below(place, stem + ending), *map(st.sampled_from, each))


PICTURES = st.dictionaries(names(*ENDINGS), st.sampled_from([*CONTENTS]), min_size=1, max_size=6)
CAPTIONS = st.dictionaries(
    names(".txt", ".TXT", ".caption", ".png.txt", ".JPG.txt"), st.sampled_from(TEXTS), max_size=5
)
LINKS = st.dictionaries(
    st.builds(below, st.sampled_from(PLACES), st.sampled_from(("to", "3_to", ".to"))),
    st.one_of(st.sampled_from([*PLACES, "..", "gone"]), st.integers(0, 5)),
    max_size=3,
)
ROWS = st.tuples(st.one_of(st.integers(0, 5), st.sampled_from(["gone.png", "sub"])), st.sampled_from([*SPELLINGS]))
TABLES = st.dictionaries(
    st.builds(below, st.sampled_from(PLACES), st.sampled_from(("metadata.jsonl", "metadata.csv"))),
    st.lists(ROWS, min_size=1, max_size=5),
    min_size=1,
    max_size=2,
)
RULES = st.builds(Rules, prompt=st.sampled_from([None, "given"]), folder_repeats=st.booleans())


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Numbers stand for pictures."""
    pictures, captions, links, tables = draw(PICTURES), draw(CAPTIONS), draw(LINKS), draw(TABLES)

    def path(which: str | int) -> str:
        return which if isinstance(which, str) else [*pictures][which % len(pictures)]

    return Plan(
        pictures,
        captions,
        {link: path(target) for link, target in links.items()},
        {table: [(path(target), how) for target, how in rows] for table, rows in tables.items()},
        draw(RULES),
    )


# What is there, found out without the code that is tested


def real(path: str | Path) -> str:
    """A name of the file itself: its folder without links; the file may be a link."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def reachable(root: Path, hidden: bool) -> set[str]:
    """The real paths of all folders that one gets to from ``root``, through hidden ones or not."""
    found: set[str] = set()
    waiting = [str(root)]
    while waiting:
        folder = os.path.realpath(waiting.pop())
        if folder not in found:
            found.add(folder)
            inside = [e for e in os.listdir(folder) if hidden or not e.startswith(".")]
            waiting += [os.path.join(folder, e) for e in inside if os.path.isdir(os.path.join(folder, e))]
    return found


def lay(plan: Plan, root: Path) -> list[Row]:
    """Lay the plan into ``root``; the rows of its tables."""
    for name in (*plan.pictures, *plan.captions, *plan.links, *plan.tables):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    for name, kind in plan.pictures.items():
        (root / name).write_bytes(CONTENTS[kind])
    for name, text in plan.captions.items():
        (root / name).write_text(text, encoding="utf-8")
    for name, target in plan.links.items():
        (root / name).symlink_to(os.path.relpath(root / target, (root / name).parent))

    rows: list[Row] = []
    for name, planned in plan.tables.items():
        table, csv_ = real(root / name), name.endswith(".csv")
        own: list[Row] = []
        for target, how in planned:
            relative, line = os.path.relpath(real(root / target), os.path.dirname(table)), len(own) + 1 + csv_
            spelled = SPELLINGS[how](relative, real(root / target))
            own.append(Row(table, line, spelled, f"row {len(rows) + len(own)}", real(root / target), how))
        with (root / name).open("w", encoding="utf-8", newline="") as file:
            if csv_:
                csv.writer(file).writerows([("file_name", "text"), *((row.name, row.text) for row in own)])
            else:
                file.writelines(json.dumps({"file_name": row.name, "text": row.text}) + "\n" for row in own)
        rows += own
    return rows


def named(problems: Iterable[str]) -> set[str]:
    """The real paths of the files and folders that problems begin with, and "PATH, line N" of tables."""
    return {real(problem.split(": ")[0]) for problem in problems}


def files_of(plan: Plan, root: Path) -> dict[Path, str]:
    """Every picture, links to pictures too, and what is in it."""
    linked = {link: plan.pictures[target] for link, target in plan.links.items() if target in plan.pictures}
    return {root / name: kind for name, kind in (plan.pictures | linked).items()}


def in_named_folder(path: str, wrong: set[str]) -> bool:
    """Whether a picture lies below a folder that is named as a problem, be it by links."""
    folders = [Path(place) for place in wrong if os.path.isdir(place)]
    return any(os.path.dirname(path) in reachable(folder, hidden=False) for folder in folders)


def faulty(path: str, wrong: set[str]) -> bool:
    """Whether a picture is named as a problem, or a folder that it lies in."""
    return path in wrong or in_named_folder(path, wrong)


def is_picture(name: str, kind: str) -> bool:
    """Whether it is to be read: by its ending, or for one that says nothing by its content."""
    return os.path.splitext(name)[1] in (".png", ".JPG", ".jfif", ".tga") or not name.endswith(".heic")


# The captions, restated


def meant(row: Row, pictures: set[str]) -> str:
    """The picture that a row means: a name in other letters is that of the file that has them, if there is one."""
    exact = real(os.path.normpath(os.path.join(os.path.dirname(row.table), row.name)))
    return exact if row.how == "letters" and exact in pictures else row.target


def file_of(path: Path, captions: dict[str, str]) -> str | None:
    """The caption file that is read for a picture, of those whose real paths are given."""
    folder, order = os.path.realpath(path.parent), list[tuple[bool, bool, int, str]]()
    for file in captions:
        stem, ending = os.path.splitext(os.path.basename(file))
        same = [unicodedata.normalize("NFC", x) for x in (stem, path.name, path.stem)]
        if os.path.dirname(file) == folder and same[0] in same[1:]:
            kind = (".txt", ".caption").index(ending.lower())
            order.append((same[0] != same[1], stem not in (path.name, path.stem), kind, file))
    return min(order)[3] if order else None


def folder_of(path: Path, root: Path) -> tuple[int, str | None]:
    """Repeats and name of the nearest folder like 10_name."""
    for part in reversed(path.parent.relative_to(root).parts):
        number, _, name = part.partition("_")
        if number.isdecimal() and name:
            return int(number), name
    return 1, None


@given(plans())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_is_dropped_without_a_word(plan: Plan):
    with tempfile.TemporaryDirectory() as base:
        root = Path(base) / "root"
        root.mkdir()
        rows = lay(plan, root)
        found = survey(root, plan.rules)
        check_pictures(plan, root, found)
        check_captions(plan, root, found, rows)
        if found.problems or not found.pictures:
            with pytest.raises(ConfigError) as caught:
                read_folder(root, plan.rules)
            assert all(problem in str(caught.value) for problem in found.problems)
        else:
            assert read_folder(root, plan.rules) == found


def check_pictures(plan: Plan, root: Path, found: Reading) -> None:
    """Each is used once, or named: as a problem, as hidden, or as one of a format that is not read."""
    visible, everywhere = reachable(root, hidden=False), reachable(root, hidden=True)
    used = Counter(real(picture.path) for picture in found.pictures)
    left = {real(path): why for path, why in found.left_out}
    wrong = named(found.problems)
    files = files_of(plan, root)
    for name, kind in files.items():
        path, (folder, file) = real(name), os.path.split(real(name))
        if folder not in everywhere:
            assert path not in used and path not in left
        elif folder not in visible or file.startswith("."):
            assert path not in used and left[path] == "hidden files", name
        elif not is_picture(file, kind):
            assert path not in used and left[path] == "pictures of a format that Pillow does not read", name
        else:
            expected = {0} if path in wrong else {0, 1} if in_named_folder(path, wrong) else {1}
            assert used[path] in expected, name
            assert kind != "cut" or path in wrong, name
    assert set(used) <= set(map(real, files)) and max(used.values(), default=1) == 1


def check_captions(plan: Plan, root: Path, found: Reading, rows: list[Row]) -> None:
    """Each picture has the right one; each file and row is read or named."""
    visible = reachable(root, hidden=False)
    wrong, left = named(found.problems), {real(path): why for path, why in found.left_out}
    shown = [row for row in rows if os.path.dirname(row.table) in visible]
    files = {real(root / n): text for n, text in plan.captions.items() if not os.path.basename(n).startswith(".")}
    files = {path: text for path, text in files.items() if os.path.dirname(path) in visible}
    pictures = {real(picture.path): picture for picture in found.pictures}
    faulty_ones = [path for path in map(real, files_of(plan, root)) if faulty(path, wrong)]
    there = {*pictures, *faulty_ones}

    rows_of: dict[str, list[Row]] = {}
    for row in shown:
        rows_of.setdefault(meant(row, there), []).append(row)

    taken = {picture.caption for picture in found.pictures}
    for path, picture in pictures.items():
        own, file, (repeats, name) = rows_of.get(path), file_of(picture.path, files), (1, None)
        if plan.rules.folder_repeats:
            repeats, name = folder_of(picture.path, root)
        if own:
            assert picture.caption in [row.text for row in own] and picture.source.startswith("metadata.")
        elif file is not None:
            assert (picture.caption, picture.source) == (" ".join(files[file].split()), BESIDE)
        elif plan.rules.prompt is not None:
            assert (picture.caption, picture.source) == (plan.rules.prompt, GIVEN)
        else:
            assert (picture.caption, picture.source) == (name, FOLDER)
        assert picture.repeats == repeats
        assert repeats or left[path] == "pictures in folders of 0 repeats"
        if not own and file is not None:
            assert file not in left

    for row in shown:
        named_row = f"{row.table}, line {row.line}" in wrong
        path = meant(row, there)
        assert named_row != (row.text in taken) or faulty(path, wrong), row
        assert not (named_row and len(rows_of[path]) == 1 and path in pictures), row
    for path in files:
        read = any(file_of(p.path, files) == path and p.source == BESIDE for p in found.pictures)
        whose = path in wrong or any(file_of(Path(p), files) == path for p in faulty_ones)
        assert read or whose or left[path].startswith("captions "), path
    for name in plan.tables:
        hidden = os.path.dirname(real(root / name)) in reachable(root, hidden=True) - visible
        assert not hidden or left[real(root / name)] == "hidden files"
