"""Files and folders, whatever is in them: JSON, hashes, sections of documents, and writing under a temporary name.

Everything that we write appears whole or not at all: it is written beside its place and then renamed, so that an error
or a killed process leaves what was there before.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from sdkit.errors import CheckpointError, ConfigError, SDKitError, one_line

# Reading


def read_json(path: str | Path) -> dict[str, Any]:
    """Parse a JSON object; a folder stands for its config.json. Raises ConfigError that names the file."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"

    refuse_special(file, ConfigError)
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{file}: {one_line(error).lower()}") from None

    values = parse_json(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return cast("dict[str, Any]", values)


def parse_json(text: str | bytes, where: str, error: type[SDKitError] = ConfigError) -> Any:
    """The value of a JSON text.

    Raises ``error``, with ``where``, for what is none, is nested too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as found:
        raise error(f"{where}: not JSON ({one_line(found)})") from None


def refuse_special(path: str | os.PathLike[str], error: type[SDKitError]) -> None:
    """Raise ``error`` for what is neither a file nor a folder, such as a FIFO, on which a reader waits forever."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise error(f"{path}: expected a regular file, found a FIFO, socket or device")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a checkpoint's JSON file. Raises CheckpointError that names it."""
    try:
        return read_json(folder / name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def file_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; of a folder's that of the names and hashes of all files in it.

    Raises SDKitError when one cannot be read.
    """
    folder = Path(path)
    if folder.is_dir():
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        lines = [f"{name} {file_hash(folder / name)}\n" for name in names]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    refuse_special(path, SDKitError)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SDKitError(f"{path}: {one_line(error).lower()}") from None


# Writing

LEFT_ALONE = 3600  # seconds since it was changed for which nobody's temporary file is deleted
CROWD = 1000  # entries from which on a folder is looked through once: a cache is written to once for each of them
_crowded: set[Path] = set()


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other thread, process or machine takes."""
    owner = f"{platform.node()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def _remove_abandoned(path: Path) -> None:
    """Delete what processes of this machine that were killed an hour ago or earlier have left under a `temporary_name`
    of ``path``."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}-(\d+)-\d+\.tmp")
    if path.parent in _crowded:
        return
    with suppress(OSError):
        entries = list(os.scandir(path.parent))
        if len(entries) > CROWD:
            _crowded.add(path.parent)
        for entry in entries:
            name = pattern.fullmatch(entry.name)
            if name is None or time.time() - entry.stat(follow_symlinks=False).st_mtime < LEFT_ALONE:
                continue
            if not Path(f"/proc/{name[1]}").exists():
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


@contextmanager
def replacing(path: str | os.PathLike[str], error: type[SDKitError] = CheckpointError) -> Generator[Path]:
    """Give a path to write to, which becomes ``path`` at the end of the block; after an error it is removed.

    Raises ``error`` when it cannot be written: no space, no permission, or a device or folder in its place.
    """
    target = Path(path).absolute()
    if not target.name or (target.exists() and not target.is_file()):
        what = "a folder" if target.is_dir() else "what is not a regular file"
        raise error(f"{path}: cannot be written ({what} is in the way, choose another name)")

    _remove_abandoned(target)
    temporary = temporary_name(target)
    try:
        mode = _new_mode(temporary)
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as found:  # torch.save raises RuntimeError where the disk is full
        if isinstance(found, SDKitError):
            raise
        raise error(f"{path}: cannot be written ({one_line(found)})") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _new_mode(unused: Path) -> int:
    """The permissions of new files there. Libraries that write for us give their files none for others."""
    try:
        unused.touch()
        return stat.S_IMODE(unused.stat().st_mode)
    finally:
        unused.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in UTF-8, its line ends as they are. Raises CheckpointError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any], sort_keys: bool = False) -> None:
    """Write a JSON object, indented by 2. Raises CheckpointError when it cannot be written."""
    write_text(path, json.dumps(values, indent=2, sort_keys=sort_keys) + "\n")


def section(document: str | os.PathLike[str], name: str) -> str:
    """What stands in a document from <!-- name --> to <!-- /name -->. Raises ConfigError unless each is there once."""
    return _around(Path(document), name)[1].strip()


def replace_section(document: str | os.PathLike[str], name: str, text: str) -> None:
    """Put a text in place of a document's `section`. Raises ConfigError unless its marks are there once each."""
    before, _, after = _around(Path(document), name)
    write_text(document, f"{before}\n{text}\n{after}")


def _around(document: Path, name: str) -> tuple[str, str, str]:
    """The text up to and with a section's first mark, what is in it, and the rest from its last mark on."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    if text.count(start) != 1 or text.count(end) != 1:
        raise ConfigError(f"{document}: expected a document with {start} and {end}, once each")
    before, rest = text.split(start)
    within, after = rest.split(end)
    return before + start, within, end + after


@contextmanager
def new_folder(path: str | os.PathLike[str], durable: bool = False) -> Generator[Path]:
    """Give a folder to fill, which becomes ``path`` at the end of the block; after an error it is removed.

    In a folder that is there already, files of the same name are replaced, all at once, and the others stay. durable:
    wait until all of it is on the disk before it gets its name. Raises CheckpointError when it cannot be written.
    """
    target = Path(path).absolute()
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary.mkdir()
        mode = _new_mode(temporary / "mode")
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        if durable:
            _flush(temporary)

        if not target.exists():
            os.rename(temporary, target)
        elif not _exchange(temporary, target):
            _move_files(temporary, target)
        if durable:
            _flush_one(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
        if isinstance(error, SDKitError):
            raise
        raise CheckpointError(f"{path}: cannot be written ({one_line(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(source: Path, target: Path) -> bool:
    """Give ``source``, with what else is in ``target``, the name of that at once; what was there is ``source`` then.

    Whether that was possible: not where the folder is the one we are in, or the system has no such call.
    """
    if Path.cwd().is_relative_to(target) or not target.is_dir() or target.is_symlink():
        return False

    for file in target.rglob("*"):
        place = source / file.relative_to(target)
        if file.is_dir() and not file.is_symlink():
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place, follow_symlinks=False)
            except OSError:
                shutil.copy2(file, place, follow_symlinks=False)
    shutil.copymode(target, source)

    libc, here, exchange = ctypes.CDLL(None), -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(here, os.fsencode(source), here, os.fsencode(target), exchange) == 0


def _move_files(source: Path, target: Path) -> None:
    """Move every file of ``source`` to its place in ``target``; an index goes last: it says that the rest is there."""
    files = [f for f in source.rglob("*") if f.is_file()]
    for file in sorted(files, key=lambda f: f.name == "model_index.json"):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    """Wait until the file's content, or the folder's entries, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
