"""Tables of captions beside pictures: ``metadata.jsonl``, ``.csv`` and ``.parquet``, as Hugging Face's imagefolder has
them. A row names a picture, relative to the table's folder, and has its caption in a column.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from finetune.data.walking import LeftOut, Tree
from sdkit.errors import ConfigError, one_line
from sdkit.files import parse_json

NAME = "file_name"


class Entry(NamedTuple):
    """A row: the picture's name as it stands there, its caption on one line, and "FILE, line N"."""

    table: Path
    name: str
    caption: str
    where: str


def read_entries(file: Path, column: str, problems: list[str]) -> list[Entry]:
    """The rows of a table with the captions in ``column``; what is wrong with it goes to ``problems``, a line each."""
    reader = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[file.suffix.lower()]
    found: list[Entry] = []
    try:
        for where, row in reader(file):
            entry = f"{where}: {row}" if isinstance(row, str) else _entry(file, row, column, where)
            if isinstance(entry, Entry):
                found.append(entry)
            else:
                problems.append(entry)
    except UnicodeDecodeError:
        problems.append(f"{file}: expected UTF-8")
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{file}: cannot be read ({one_line(error)})")

    return found


def _entry(table: Path, row: Mapping[str, Any], column: str, where: str) -> Entry | str:
    """The row's entry, or what is wrong with it."""
    names = [key for key in row if key == NAME] or [key for key in row if str(key).endswith(f"_{NAME}")]
    if len(names) != 1 or column not in row:
        wanted = f"one column {NAME} and the caption in {column!r} (--caption-column names another)"
        return f"{where}: expected {wanted}, found {', '.join(map(str, row)) or 'none'}"

    name, caption = row[names[0]], row[column]
    if not isinstance(name, str) or not _is_text(caption):
        return f"{where}: expected text in {names[0]} and {column}, found {name!r} and {caption!r}"
    return Entry(table, name, " ".join(caption.split()), where)


def _is_text(value: object) -> bool:
    """Whether this is text that can be encoded: JSON may hold halves of characters."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode("utf-8") == value


# The formats: (where, row) of each, or what is wrong with a row in its place


Rows = Iterator[tuple[str, Mapping[str, Any] | str]]


def _json_rows(file: Path) -> Rows:
    # Not splitlines, which also ends lines at characters that JSON allows within text.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            yield f"{file}, line {number}", _json(line)


def _json(line: str) -> Mapping[str, Any] | str:
    try:
        row = parse_json(line, "expected a JSON object")
    except ConfigError as error:
        return str(error)
    return row if isinstance(row, dict) else f"expected a JSON object, found {line.strip()[:40]}"


def _csv_rows(file: Path) -> Rows:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader, header, first = csv.reader(lines), list[str](), 1
        for cells in reader:
            where, first = f"{file}, line {first}", reader.line_num + 1
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    yield where, f"expected columns of different names, found {', '.join(header)}"
                    return
            elif cells and len(cells) != len(header):
                yield where, f"expected {len(header)} columns, found {len(cells)}"
            elif cells:
                yield where, dict(zip(header, cells, strict=True))


def _parquet_rows(file: Path) -> Rows:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("pyarrow is not installed: pip install pyarrow") from None

    for number, row in enumerate(parquet.read_table(file).to_pylist(), 1):
        yield f"{file}, row {number}", row


# Names


class Places:
    """Where pictures lie: the path of each, found by any spelling of a name."""

    def __init__(self, pictures: Iterable[Path], folders: Mapping[Path, Path]) -> None:
        """``folders``: the real path of each folder with pictures -> the path that the pictures have it under."""
        real = {shown: os.fspath(real) for real, shown in folders.items()}
        self._exact: dict[str, Path] = {}
        self._loose: dict[str, list[Path]] = defaultdict(list)
        for path in pictures:
            self._exact[os.path.join(real[path.parent], path.name)] = path
            spellings = (os.path.join(real[path.parent], path.name), os.path.abspath(path))
            for spelling in {unicodedata.normalize("NFC", s) for s in spellings}:
                self._loose[spelling].append(path)

    def find(self, folder: Path, name: str) -> list[Path]:
        """The pictures that ``name`` may mean in a table in ``folder``, none or one if all is well.

        Read as it stands; else with backslashes as slashes; else as a URL, of the scheme file or none, with its
        escapes. Each to the letter first, then with composed and decomposed letters as the same.
        """
        for spelling in _spellings(name):
            for key in _keys(folder / spelling):
                if key in self._exact:
                    return [self._exact[key]]
            for key in _keys(folder / spelling):
                if loose := self._loose.get(unicodedata.normalize("NFC", key)):
                    return loose
        return []


def _spellings(name: str) -> Sequence[str]:
    slashed = name.replace("\\", "/")
    url = urlsplit(slashed).path if slashed.lower().startswith("file:") else slashed
    return list(dict.fromkeys(s for s in (name, slashed, unquote(url)) if s and "\0" not in s))


def _keys(path: Path) -> list[str]:
    """The path of a file whose folder's links are followed, and as it stands; the file itself may be a link."""
    plain = os.path.abspath(path)
    try:
        return [os.path.join(os.path.realpath(path.parent), path.name), plain]
    except ValueError:  # no text that a file system knows
        return [plain]


def captions_of(tree: Tree, column: str) -> dict[Path, Entry]:
    """Picture -> its row, of all tables below a folder.

    Rows of no picture, and of one that has a row already, are added to the tree's problems; tables without rows to what
    is left out.
    """
    places, found = Places(tree.pictures, tree.folders), dict[Path, Entry]()
    for table in tree.metadata:
        before = len(tree.problems)
        entries = read_entries(table, column, tree.problems)
        if not entries and len(tree.problems) == before:
            tree.left_out.append(LeftOut(table, "tables without rows"))

        for entry in entries:
            paths = places.find(table.parent, entry.name)
            if not paths:
                tree.problems.append(f"{entry.where}: {entry.name!r} is none of the pictures that are read")
            elif len(paths) > 1:
                tree.problems.append(f"{entry.where}: {entry.name!r} may be any of {', '.join(map(str, paths))}")
            elif paths[0] in found:
                tree.problems.append(f"{entry.where}: {paths[0]} has a caption already ({found[paths[0]].where})")
            else:
                found[paths[0]] = entry
    return found
