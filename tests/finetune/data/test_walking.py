"""The way through a folder: every file once, links followed, and what a file looks like."""

import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.walking import FOREIGN_PICTURES, OTHER_TABLES, Looks, Tree, walk
from tests.finetune.data.painted import paint


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def left(tree: Tree, root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): why for path, why in tree.left_out}


def test_everything_lies_where_it_belongs(tmp_path: Path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub.png/d.gif", ".hid/e.png", "__MACOSX/f.png", "._g.png"):
        paint(tmp_path / name)
    for name in ("a.txt", "A.TXT", "sub/c.Caption", "metadata.jsonl", "sub/Metadata.CSV", "metadata.parquet"):
        (tmp_path / name).touch()
    for name in ("info.json", "photo.HEIC", "notes.md", "a.npz", ".hid/x.txt", ".hid/x.json", ".hid/metadata.csv"):
        (tmp_path / name).touch()
    tree = walk(tmp_path)
    assert names(tree.pictures, tmp_path) == ["a.JPG", "b.png", "sub/c.webp", "sub.png/d.gif"]
    assert names(tree.captions, tmp_path) == ["A.TXT", "a.txt", "sub/c.Caption"]
    assert names(tree.metadata, tmp_path) == ["metadata.jsonl", "metadata.parquet", "sub/Metadata.CSV"]
    hidden = (".hid/e.png", "__MACOSX/f.png", "._g.png", ".hid/x.txt", ".hid/metadata.csv")
    assert left(tree, tmp_path) == {name: "hidden files" for name in hidden} | {
        "info.json": OTHER_TABLES,
        "photo.HEIC": FOREIGN_PICTURES,
    }
    assert tree.problems == [] and tree.left_out == sorted(tree.left_out)
    assert tree.folders == {tmp_path / name: tmp_path / name for name in (".", "sub", "sub.png")}


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("png", "PNG"), ("jfif", "JPEG"), ("jpe", "JPEG"), ("jp2", "JPEG2000"), ("tga", "TGA"), ("ppm", "PPM"),
     ("dib", "DIB"), ("ico", "ICO"), ("pcx", "PCX"), ("sgi", "SGI"), ("qoi", "QOI"), ("avif", "AVIF"), ("mpo", "MPO"),
     ("apng", "PNG"), ("dds", "DDS"), ("PBM", "PPM"), ("bmp", "BMP")],
)  # fmt: skip
def test_all_that_pillow_opens_is_read(ending: str, kind: str, tmp_path: Path):
    image = Image.new("RGB", (20, 16), "red")
    (image.convert("1") if ending == "PBM" else image).save(tmp_path / f"a.{ending}", kind)
    assert names(walk(tmp_path).pictures, tmp_path) == [f"a.{ending}"]


@pytest.mark.parametrize("name", ["plain", "IMG_1", "a.jpg_large", "a.png~", "a.orig", "photo.v2", "x.2024"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF"])
def test_names_say_nothing_and_the_content_does(name: str, kind: str, tmp_path: Path):
    Image.new("RGB", (20, 16), "red").save(tmp_path / name, kind)
    assert names(walk(tmp_path).pictures, tmp_path) == [name]
    if kind not in ("BMP", "PPM"):  # whose first bytes text may have too
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
        assert names(walk(tmp_path).pictures, tmp_path) == [name]  # damaged, and not overlooked


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        b"P3 has notes",
        b"Python",
        b"BM",
        b"#define X 3\n",
        b"\0" * 200,
        b"\n\5\1\1" * 40,
        b"PK\3\4",
        b"%PDF-",
    ],
)
def test_other_files_are_no_pictures(content: bytes, tmp_path: Path):
    for name in ("plain", "a.safetensors", "a.py"):
        (tmp_path / name).write_bytes(content)
    tree = walk(tmp_path)
    assert tree.pictures == [] and tree.left_out == []


def test_links_are_followed_once(tmp_path: Path):
    """Real folders before links, links by their names, hidden ones last; circles end."""
    root = tmp_path / "root"
    paint(root / "real" / "a.png")
    paint(root / ".pool" / "shown" / "b.png")
    paint(root / ".pool" / "c.png")
    paint(tmp_path / "far" / "deep" / "d.png")
    (root / "a_link").symlink_to("real")
    (root / "b_link").symlink_to(".pool/shown")
    (root / "far").symlink_to(tmp_path / "far")
    (root / "far again").symlink_to("../far/deep")
    (root / "real" / "up").symlink_to("..")
    (root / "self").symlink_to("self")
    (root / "file.png").symlink_to("real/a.png")
    tree = walk(root)
    assert names(tree.pictures, root) == ["b_link/b.png", "far/deep/d.png", "file.png", "real/a.png"]
    again = "links to folders that are read under another name"
    assert left(tree, root) == {
        "a_link": again,
        "far again": again,
        "real/up": again,
        ".pool/c.png": "hidden files",
        "self": "links that lead nowhere",
    }
    assert tree.folders[tmp_path / "far" / "deep"] == root / "far" / "deep"
    assert walk(root / "b_link").pictures == [root / "b_link" / "b.png"]


def test_links_that_lead_nowhere_are_named(tmp_path: Path):
    for name in ("a.png", "a.txt", "metadata.csv", "folder", ".b.png", ".c"):
        (tmp_path / name).symlink_to("gone")
    tree = walk(tmp_path)
    assert sorted(tree.problems) == [
        f"{tmp_path / n}: the link leads nowhere" for n in ("a.png", "a.txt", "metadata.csv")
    ]
    assert left(tree, tmp_path) == {"folder": "links that lead nowhere", ".b.png": "hidden files"}


def test_what_is_no_file_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "c.png"))
        tree = walk(tmp_path)
    assert left(tree, tmp_path) == {name: "devices, pipes and sockets" for name in ("a.png", "c.png")}


def test_a_folder_that_cannot_be_read_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / ".shut").mkdir()
    listdir = os.listdir

    def refuse(folder: Path) -> list[str]:
        if "shut" in folder.name:
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    tree = walk(tmp_path)
    assert tree.problems == [f"{tmp_path}/shut: the folder cannot be read (Permission denied)"]
    assert left(tree, tmp_path) == {".shut": "hidden folders that cannot be read"}


def test_a_plugin_of_pillows_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.heic").touch()
    assert Looks().like(tmp_path / "a.heic") == FOREIGN_PICTURES
    monkeypatch.setitem(Image.registered_extensions(), ".heic", "PNG")
    assert Looks().like(tmp_path / "a.heic") == "picture"
