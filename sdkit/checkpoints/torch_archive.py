"""The zip archive that torch.save writes, looked at before torch reads it.

torch maps the whole file into memory and takes from it what the pickle says, without a look at where records end; of
another byte order it reads what it finds, or dies. So what does not fit is an error here.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from sdkit.checkpoints.stubs import Stub, stub_of
from sdkit.errors import CheckpointError

BYTEORDER, PICKLE = "byteorder", "data.pkl"
ITEMSIZES = {
    "HalfStorage": 2, "BFloat16Storage": 2, "FloatStorage": 4, "DoubleStorage": 8, "ShortStorage": 2, "IntStorage": 4,
    "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "QInt32Storage": 4,
}  # fmt: skip
"""Bytes of a number in torch's classes of storages that have more than one; the length of others is in bytes."""


def check_archive(path: Path) -> None:
    """Raise CheckpointError unless every record lies in the file as it is, is as long as the tensors in it, and is of
    this machine's byte order."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        _check_records(path, records)
        by_name = {PurePosixPath(record.filename).name: record for record in records}

        if BYTEORDER in by_name and (order := archive.read(by_name[BYTEORDER])) != sys.byteorder.encode():
            found = order[:20].decode(errors="replace")
            raise CheckpointError(f"{path}: expected numbers of byte order {sys.byteorder}, found {found!r}")

        if PICKLE in by_name:
            with archive.open(by_name[PICKLE]) as file:
                _check_storages(path, file, by_name[PICKLE], records)


def _check_records(path: Path, records: list[zipfile.ZipInfo]) -> None:
    size, total = path.stat().st_size, 0
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: {record.filename} is compressed, which torch.save never does")
        total += record.file_size
        if record.file_size != record.compress_size or record.header_offset + record.file_size > size or total > size:
            raise CheckpointError(f"{path}: damaged: {record.filename} is not as long as the archive says")


def _check_storages(path: Path, file: IO[bytes], pickled: zipfile.ZipInfo, records: list[zipfile.ZipInfo]) -> None:
    """Compare what the pickle says of its storages with their records."""
    lengths = {record.filename: record.file_size for record in records}
    folder = PurePosixPath(pickled.filename).parent / "data"
    for kind, key, count in _Storages(file).found():
        length = lengths.get(str(folder / key))
        if length is None or count * ITEMSIZES.get(kind, 1) != length:
            there = "is missing" if length is None else f"has {length} bytes"
            raise CheckpointError(f"{path}: damaged: the record of a tensor of {count} {kind} {there}")


class _Storages(pickle.Unpickler):
    """Reads a pickle for the storages that it names, and makes nothing."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self._found: list[tuple[str, str, int]] = []

    def found(self) -> list[tuple[str, str, int]]:
        """Of each storage the name of its class, its key, and how many numbers it has, as far as the pickle can be
        read: torch says what is wrong with the rest."""
        with suppress(Exception):
            self.load()
        return self._found

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        return stub_of(module_name, global_name)

    def persistent_load(self, pid: Any) -> Any:
        what, kind, key, _, count = pid[:5]
        if what in ("storage", b"storage") and isinstance(count, int):
            self._found.append((str(kind.origin).rpartition(".")[2], str(key), count))
        return Stub()
