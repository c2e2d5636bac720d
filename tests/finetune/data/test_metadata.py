"""Tables of captions: their formats, their names of pictures, and that every row lands on one."""

import csv
import json
import sys
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.metadata import Entry, captions_of, read_entries
from finetune.data.walking import walk
from tests.finetune.data.painted import paint

NFD = unicodedata.normalize("NFD", "caf\u00e9")


def captions(folder: Path, column: str = "text") -> tuple[dict[str, str], list[str]]:
    """Picture -> caption, and the problems, of the tables below a folder."""
    tree = walk(folder)
    found = captions_of(tree, column)
    return {str(path.relative_to(folder)): entry.caption for path, entry in found.items()}, tree.problems


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(TEXT, TEXT), max_size=6))
def test_every_text_comes_back_from_json_and_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]):
    """Characters that end lines for Python and not for JSON too; a row that begins on a line names it."""
    folder = tmp_path_factory.mktemp("tables")
    expected = [(name, " ".join(text.split())) for name, text in rows]
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in rows]
    (folder / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    for name in ("metadata.jsonl", "metadata.csv"):
        problems: list[str] = []
        found = read_entries(folder / name, "text", problems)
        assert [(entry.name, entry.caption) for entry in found] == expected and problems == []
    assert [e.where for e in read_entries(folder / "metadata.jsonl", "text", [])] == [
        f"{folder / 'metadata.jsonl'}, line {n}" for n in range(1, len(rows) + 1)
    ]


def test_lines_of_csv_are_counted_where_a_row_begins(tmp_path: Path):
    table = tmp_path / "metadata.csv"
    table.write_text('\ufeff file_name , text\na.png,"two\nlines"\n\nb.png,x\nc.png\n', encoding="utf-8")
    problems: list[str] = []
    assert read_entries(table, "text", problems) == [
        Entry(table, "a.png", "two lines", f"{table}, line 2"),
        Entry(table, "b.png", "x", f"{table}, line 5"),
    ]
    assert problems == [f"{table}, line 6: expected 2 columns, found 1"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metadata.jsonl", "{", "line 1: expected a JSON object"),
        ("metadata.jsonl", '\n"file_name"', 'line 2: expected a JSON object, found "file_name"'),
        ("metadata.jsonl", '[{"file_name": "a.png"}]', "line 1: expected a JSON object"),
        ("metadata.jsonl", '{"text": "x"}', "line 1: expected one column file_name and the caption in 'text'"),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}', "--caption-column names another), found file"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null}', "in file_name and text, found 'a.png' and None"),
        ("metadata.jsonl", '{"file_name": 3, "text": "x"}', "expected text in file_name and text, found 3"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x", "y"]}', "found 'a.png' and ['x', 'y']"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}', "line 1: expected text"),
        ("metadata.jsonl", "caf\xe9", "expected UTF-8"),
        ("metadata.csv", "caf\xe9", "expected UTF-8"),
        ("metadata.csv", "file_name;text\na.png;x", "line 2: expected one column file_name"),
        ("metadata.csv", "file_name,text,text\na.png,x,y", "line 1: expected columns of different names"),
        ("metadata.csv", "a_file_name,b_file_name,text\na.png,b.png,x", "line 2: expected one column file_name"),
        ("metadata.csv", f'file_name,text\na.png,"{"x" * 200_000}"', "cannot be read (field larger"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(name: str, content: str, problem: str, tmp_path: Path):
    paint(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content.encode("latin1"))
    found, problems = captions(tmp_path)
    assert found == {} and len(problems) == 1
    assert problems[0].startswith(str(tmp_path / name)) and problem in problems[0], problems


def test_columns_are_named_as_hugging_faces(tmp_path: Path):
    """``file_name``, or the one that ends in ``_file_name``; others are left alone."""
    paint(tmp_path / "a.png")
    paint(tmp_path / "sub" / "b.png")
    (tmp_path / "metadata.csv").write_text("image_file_name,width,text\na.png,3,first\n")
    row = {"file_name": "b.png", "mask_file_name": "m.png", "text": "second", "objects": {"id": [1]}}
    (tmp_path / "sub" / "metadata.jsonl").write_text(json.dumps(row))
    assert captions(tmp_path) == ({"a.png": "first", "sub/b.png": "second"}, [])


@pytest.mark.parametrize(
    ("name", "table", "lands"),
    [
        ("./a.png", ".", "a.png"),
        ("sub/../a.png", ".", "a.png"),
        ("sub\\b c.png", ".", "sub/b c.png"),
        (".\\sub\\b c.png", ".", "sub/b c.png"),
        ("../a.png", "sub", "a.png"),
        ("..\\a.png", "sub", "a.png"),
        ("sub/b%20c.png", ".", "sub/b c.png"),
        ("caf\u00e9/caf\u00e9.png", ".", f"{NFD}/{NFD}.png"),
        ("caf%C3%A9/caf\u00e9.png", ".", f"{NFD}/{NFD}.png"),
        ("link/d.png", ".", "link/d.png"),
        ("d.png", "link", "link/d.png"),
        ("../sub/b c.png", "link", "sub/b c.png"),
        ("b%20c.png", "twice", "twice/b%20c.png"),
        ("b c.png", "twice", "twice/b c.png"),
        ("x\\y.png", "twice", "twice/x\\y.png"),
    ],
)
def test_names_land_however_they_are_spelled(name: str, table: str, lands: str, tmp_path: Path):
    root = tmp_path / "root"
    for picture in ("a.png", "sub/b c.png", f"{NFD}/{NFD}.png", "twice/b c.png", "twice/b%20c.png", "twice/x\\y.png"):
        paint(root / picture)
    paint(root / "twice" / "x" / "y.png")
    paint(tmp_path / "far" / "d.png")
    (root / "link").symlink_to("../far")
    (root / table / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert captions(root) == ({lands: "x"}, [])


def test_whole_paths_and_urls_land(tmp_path: Path):
    paint(tmp_path / "b c.png")
    for name in (
        str(tmp_path / "b c.png"),
        f"file://{quote(str(tmp_path / 'b c.png'))}",
        (tmp_path / "b c.png").as_uri(),
    ):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        assert captions(tmp_path) == ({"b c.png": "x"}, [])


@pytest.mark.parametrize(
    "name",
    ["gone.png", "A.PNG", "", ".", "..", "sub", "../out.png", ".hidden.png", "a.txt", "http://x.y/a.png", "a\0.png",
     "\ud800", "x" * 5000, "C:\\pictures\\a.png", "a.png?raw=true", "*.png", "~/a.png", "file://", "file:///%"],
)  # fmt: skip
def test_rows_of_no_picture_are_problems(name: str, tmp_path: Path):
    for picture in ("root/a.png", "root/.hidden.png", "out.png", "root/sub/b.png"):
        paint(tmp_path / picture)
    (tmp_path / "root" / "a.txt").write_text("x")
    table = tmp_path / "root" / "metadata.jsonl"
    table.write_text(
        json.dumps({"file_name": "a.png", "text": "x"}) + "\n" + json.dumps({"file_name": name, "text": "y"})
    )
    found, problems = captions(tmp_path / "root")
    assert found == {"a.png": "x"}
    assert problems == [f"{table}, line 2: {name!r} is none of the pictures that are read"]


def test_two_rows_of_one_picture_are_a_problem(tmp_path: Path):
    paint(tmp_path / "sub" / "a.png")
    one, two = tmp_path / "metadata.csv", tmp_path / "sub" / "metadata.jsonl"
    one.write_text("file_name,text\nsub/a.png,x\nsub//./a.png,y\n")
    two.write_text(json.dumps({"file_name": "a.png", "text": "z"}))
    found, problems = captions(tmp_path)
    assert found == {"sub/a.png": "x"}
    already = f"{tmp_path / 'sub' / 'a.png'} has a caption already ({one}, line 2)"
    assert problems == [f"{one}, line 3: {already}", f"{two}, line 1: {already}"]


def test_a_name_that_may_be_two_pictures_is_a_problem(tmp_path: Path):
    """Two that differ in how a letter is composed, and a third way to write both."""
    names = ["\u1e69.png", "s\u0323\u0307.png"]  # composed, decomposed
    for name in names:
        paint(tmp_path / name)
    for name in names:
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        assert captions(tmp_path) == ({name: "x"}, [])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "s\u0307\u0323.png", "text": "x"}))
    found, problems = captions(tmp_path)
    assert found == {} and "may be any of" in problems[0] and all(name in problems[0] for name in names)


def test_a_table_without_rows_is_named(tmp_path: Path):
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("file_name,text\n" if name.endswith("csv") else "\n")
    tree = walk(tmp_path)
    assert captions_of(tree, "text") == {} and tree.problems == []
    assert [(left.path.name, left.why) for left in tree.left_out] == [
        ("metadata.csv", "tables without rows"), ("metadata.jsonl", "tables without rows"),
    ]  # fmt: skip


ROWS = [{"file_name": "a.png", "text": "one  line"}, {"file_name": "sub\\b.png", "text": ""}]


def test_parquet_is_read_by_pyarrow(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    for name in ("a.png", "sub/b.png"):
        paint(tmp_path / name)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "metadata.parquet")
    assert captions(tmp_path) == ({"a.png": "one line", "sub/b.png": ""}, [])
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no more")
    found, problems = captions(tmp_path)
    assert found == {} and problems[0].startswith(f"{tmp_path / 'metadata.parquet'}: cannot be read (")


def test_parquets_rows_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With what stands for pyarrow, which need not be there."""

    class Table:
        def to_pylist(self) -> list[dict[str, Any]]:
            return [*ROWS, {"file_name": None, "text": "x"}]

    for name in ("a.png", "sub/b.png"):
        paint(tmp_path / name)
    (tmp_path / "metadata.parquet").touch()
    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    package.parquet, parquet.read_table = parquet, lambda path: Table()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    found, problems = captions(tmp_path)
    assert found == {"a.png": "one line", "sub/b.png": ""}
    assert problems == [
        f"{tmp_path / 'metadata.parquet'}, row 3: expected text in file_name and text, found None and 'x'"
    ]


def test_without_pyarrow_parquet_is_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "metadata.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found, problems = captions(tmp_path)
    assert found == {} and len(problems) == 1 and "pip install pyarrow" in problems[0]
