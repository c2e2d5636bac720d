"""Caption files beside pictures: which belongs to which."""

import unicodedata
from pathlib import Path

import pytest

from finetune.data.captions import CaptionFiles, read_caption

NFC, NFD = "caf\u00e9 \ud55c", unicodedata.normalize("NFD", "caf\u00e9 \ud55c")


@pytest.mark.parametrize(
    ("picture", "files", "read", "second"),
    [
        ("a.png", ["a.txt"], "a.txt", []),
        ("a.png", ["a.TXT"], "a.TXT", []),
        ("a.png", ["a.Caption"], "a.Caption", []),
        ("a.png", ["a.txt", "a.caption"], "a.txt", ["a.caption"]),
        ("a.png", ["a.txt", "a.TXT"], "a.TXT", ["a.txt"]),
        ("a.png", ["a.png.txt"], "a.png.txt", []),
        ("a.png", ["a.png.caption", "a.txt"], "a.png.caption", ["a.txt"]),
        ("a", ["a.txt"], "a.txt", []),
        ("a.v2", ["a.v2.txt"], "a.v2.txt", []),
        ("a.b.png", ["a.b.txt"], "a.b.txt", []),
        (f"{NFC}.png", [f"{NFD}.txt"], f"{NFD}.txt", []),
        (f"{NFD}.png", [f"{NFC}.TXT"], f"{NFC}.TXT", []),
        (f"{NFD}.png", [f"{NFC}.txt", f"{NFD}.txt"], f"{NFD}.txt", [f"{NFC}.txt"]),
        (f"{NFC}.png", [f"{NFC}.txt", f"{NFD}.txt"], f"{NFC}.txt", [f"{NFD}.txt"]),
    ],
)
def test_names_match(picture: str, files: list[str], read: str, second: list[str]):
    folder = Path("x")
    others = [folder / "other.txt", folder / "deep" / f"{Path(picture).stem}.txt"]
    captions = CaptionFiles([*others, *(folder / file for file in files)])
    assert [path.name for path in captions.beside(folder / picture)] == [read, *second]
    without, behind = "captions without a picture", "captions of pictures that have another one"
    expected = {(path, without) for path in others} | {(folder / name, behind) for name in second}
    assert set(captions.left_out([folder / picture], {})) == expected
    expected.add((folder / read, behind))  # a table's row goes first
    assert set(captions.left_out([folder / picture], {folder / picture})) == expected


def test_one_caption_may_be_of_two_pictures():
    captions = CaptionFiles([Path("a.txt")])
    assert captions.left_out([Path("a.png"), Path("a.jpg")], {Path("a.jpg")}) == []


def test_a_caption_is_one_line_of_text(tmp_path: Path):
    problems: list[str] = []
    for name, content in {
        "plain": b"a\n b\t c\r\n", "bom": "\ufeffx".encode(), "empty": b"", "latin": b"caf\xe9",
        "utf16": "a".encode("utf-16"), "utf16le": "ab".encode("utf-16-le"),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert [read_caption(tmp_path / n, problems) for n in ("plain", "bom", "empty")] == ["a b c", "x", ""]
    assert problems == []
    for name in ("latin", "utf16", "utf16le"):
        assert read_caption(tmp_path / name, problems) == ""
        assert problems.pop() == f"{tmp_path / name}: expected a caption in UTF-8"
    read_caption(tmp_path / "gone", problems)
    assert len(problems) == 1 and problems[0].startswith(f"{tmp_path / 'gone'}: cannot be read (No such file")
