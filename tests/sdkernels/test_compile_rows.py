"""The rows of `compile_report`: as a table, as files, and what has changed since an earlier report."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from sdkernels.compile_rows import HEADER, Row, differences, read_rows, table_line, write_csv, write_json

ROW = Row(
    "geglu", "sd1 64x64", "float16", 90, "geglu_forward_kernel", {"BLOCK": 512, "EVEN": True}, 4, 3,
    registers=40, shared=2048, occupancy=48, floor=10.0, limiter="memory", code=3200,
    instructions={"HMMA": 8, "LDG": 2},
)  # fmt: skip


def test_a_line_stands_under_its_header() -> None:
    line = table_line(ROW)
    for name, value in (
        ("registers", "40"),
        ("shared kB", "2.0"),
        ("warps resident", "48 of 64"),
        ("floor µs", "10.00"),
    ):
        end = HEADER.index(name) + len(name)
        assert line[:end].endswith(f" {value}"), name
    assert line.endswith("  sd1 64x64") and HEADER.endswith("  first case") and "HMMA" not in line
    below = table_line(replace(ROW, problem="spills, 8 bytes"), verbose=True).splitlines()[1:]
    assert [part.strip() for part in below] == ["FAILED: spills, 8 bytes", "HMMA 8 LDG 2", "BLOCK=512 EVEN=True"]


def test_files_hold_every_field(tmp_path: Path) -> None:
    write_json([ROW, replace(ROW, arch=80)], ["bad"], tmp_path / "a.json")
    assert read_rows(tmp_path / "a.json") == [ROW, replace(ROW, arch=80)]
    write_csv([ROW], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row.keys() == vars(ROW).keys()
    assert (row["registers"], row["constants"], row["instructions"]) == ("40", "BLOCK=512 EVEN=True", "HMMA=8 LDG=2")


def test_what_has_changed_is_told_and_nothing_else() -> None:
    other = replace(ROW, case="sd1 32x32")
    assert differences([ROW, other], [ROW, other]) == []
    (line,) = differences([ROW, other], [replace(ROW, registers=44, floor=12.0), other])
    assert line == f"  {ROW.title}: registers 40 -> 44, floor 10.00 -> 12.00 µs (+20%)"
    assert differences([ROW], [replace(ROW, floor=10.04)]) == []
    assert differences([ROW], [other]) == [f"  gone: {ROW.title}", f"  new: {other.title}"]
    assert differences([ROW, replace(ROW, op="layer_norm")], [ROW]) == []  # it was not asked for

    twice = [ROW, replace(ROW, registers=90)]  # of one case: they are told apart by their order
    assert differences(twice, twice) == []
    assert differences(twice, [ROW, replace(ROW, registers=80)]) == [f"  {ROW.title}: registers 90 -> 80"]
