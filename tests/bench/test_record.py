"""Results as JSON lines: rows of many writers, lines that were cut off, tests as they end."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.record import Record, read

ROOT = Path(__file__).parents[2]


def test_rows_are_appended_and_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    first, second = Record(tmp_path / "new"), Record(tmp_path / "new")
    first.add("time", op="geglu", n=1)
    second.add("check", right=True)
    first.add("time", op="geglu", n=2)
    with first.file.open("a") as file:
        file.write('{"kind": "time", "op": "ge')
    assert [row["n"] for row in second.rows("time")] == [1, 2]
    assert len(read(first.file)) == 3
    assert Record(tmp_path).rows("time") == []


def test_tests_are_entered_as_they_end(tmp_path: Path) -> None:
    """Under xdist too, in one of whose workers this runs, and with what pytest says of a failure."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('k', range(30))\ndef test_passes(k): pass\n"
        "def test_fails(): assert 1 == 2, 'the reason'\n"
        "@pytest.fixture\ndef broken(): raise OSError('no such thing')\ndef test_errs(broken): pass\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "-p", "bench.pytest_record"]
    ours = os.environ | {"PYTHONPATH": paths, "OUT": str(tmp_path), "PYTEST_XDIST_WORKER": "gw0"}
    subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True)
    record = Record(tmp_path)
    assert sum(row["count"] for row in record.rows("tests passed")) == 30
    failed = {row["name"].rpartition("::")[2]: row for row in record.rows("test")}
    assert failed.keys() == {"test_fails", "test_errs"}
    assert failed["test_errs"]["when"] == "setup" and "no such thing" in json.dumps(failed["test_errs"]["message"])
    assert "the reason" in json.dumps(failed["test_fails"]["message"])
