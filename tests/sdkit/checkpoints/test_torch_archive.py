"""Archives of torch.save that do not fit together: each is refused before torch maps it."""

import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdkit.checkpoints.pickles import read_pickle
from sdkit.checkpoints.torch_archive import check_archive
from sdkit.errors import CheckpointError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5).half(), "c": torch.arange(3, dtype=torch.bfloat16)}
Change = Callable[[str, bytes], tuple[bytes, int]]


def rewritten(source: Path, target: Path, change: Change) -> Path:
    """The archive with other contents of its records, each with how it is compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            content, compression = change(record.filename.split("/", 1)[1], old.read(record))
            new.writestr(record.filename, content, compression)
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


def test_what_torch_writes_passes(saved: Path, tmp_path: Path) -> None:
    check_archive(saved)
    kinds = {str(d): torch.zeros(3, dtype=d) for d in (torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8)}
    torch.save({"state_dict": kinds, "view": torch.arange(10.0)[2:5], "none": torch.empty(0)}, tmp_path / "kinds.pt")
    check_archive(tmp_path / "kinds.pt")
    for device in ("cpu", "meta"):
        assert read_pickle(saved, device).keys() == STATE.keys()


CHANGES: dict[str, tuple[Change, str]] = {
    "another byte order": (
        lambda name, content: (b"big" if name == "byteorder" else content, zipfile.ZIP_STORED),
        f"expected numbers of byte order {sys.byteorder}, found 'big'",
    ),
    "a short record": (
        lambda name, content: (content[:-4] if name == "data/0" else content, zipfile.ZIP_STORED),
        "the record of a tensor of 6 FloatStorage has 20 bytes",
    ),
    "a long record": (
        lambda name, content: (content + bytes(8) if name == "data/1" else content, zipfile.ZIP_STORED),
        "the record of a tensor of 5 HalfStorage has 18 bytes",
    ),
    "compressed": (
        lambda name, content: (content, zipfile.ZIP_DEFLATED if name == "data/2" else zipfile.ZIP_STORED),
        "data/2 is compressed, which torch.save never does",
    ),
    "bytes as text": (
        lambda name, content: (b"\xff\xfe" if name == "byteorder" else content, zipfile.ZIP_STORED),
        "found '\ufffd\ufffd'",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_fit_is_refused(saved: Path, tmp_path: Path, change: Change, message: str, device: str) -> None:
    path = rewritten(saved, tmp_path / "changed.pt", change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_pickle(path, device)


def test_a_record_that_is_not_there_is_refused(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "less.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            if not record.filename.endswith("data/1"):
                new.writestr(record.filename, old.read(record))
    with pytest.raises(CheckpointError, match="a tensor of 5 HalfStorage is missing"):
        read_pickle(target, "cpu")


def test_lengths_beyond_the_file_are_refused(saved: Path, tmp_path: Path) -> None:
    """The central directory says another size than there is."""
    content = bytearray(saved.read_bytes())
    place = content.rindex(b"data/0", 0, content.rindex(b"data/1")) - 46 - len("saved/")
    assert content[place : place + 4] == b"PK\x01\x02"
    for offset in (20, 24):
        content[place + offset : place + offset + 4] = (1 << 30).to_bytes(4, "little")
    (tmp_path / "long.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(tmp_path / "long.pt", "cpu")


def test_a_pickle_that_breaks_off_is_named_by_torch(saved: Path, tmp_path: Path) -> None:
    def broken(name: str, content: bytes) -> tuple[bytes, int]:
        return content[:-5] if name == "data.pkl" else content, zipfile.ZIP_STORED

    with pytest.raises(CheckpointError, match="damaged or no torch checkpoint"):
        read_pickle(rewritten(saved, tmp_path / "broken.pt", broken), "cpu")


def test_looking_makes_nothing(saved: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Opened:
        def __reduce__(self) -> tuple[object, ...]:
            return open, (str(made), "w")

    def planted(name: str, content: bytes) -> tuple[bytes, int]:
        return pickle.dumps({"a": Opened()}, 2) if name == "data.pkl" else content, zipfile.ZIP_STORED

    check_archive(rewritten(saved, tmp_path / "planted.pt", planted))
    assert not made.exists()
