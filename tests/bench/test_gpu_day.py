"""A day with a GPU: one deadline, parts that are killed whole and leave what they had, and a rehearsal on a CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import gpu
from bench.day import LEAST, Day, Part
from bench.record import Record, read

ROOT = Path(__file__).parents[2]
HANGS = """
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(os.environ["OUT"] + "/results.jsonl", "a") as file:
    file.write(json.dumps({"kind": "child", "pid": child.pid}) + "\\n")
time.sleep(60)
"""


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Part]:
    """A part that ends well, one that fails, and one that starts another process and hangs."""
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    return {
        "good": Part("python -c pass", 20),
        "bad": Part("python -c raise(SystemExit(3))", 20),
        "hangs": Part(f"python {script}", 5),
    }


def ended(out: Path) -> dict[str, str]:
    return {row["name"]: row["ended"] for row in Record(out).rows("part")}


def is_gone(pid: int) -> bool:
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_hangs_is_killed_with_all_that_it_started_and_the_next_ones_run(
    tmp_path: Path, parts: dict[str, Part]
) -> None:
    day = Day(parts, tmp_path / "out", tmp_path / "cache", 100)
    assert day.run(["hangs", "bad"]) == ["hangs", "bad"]
    assert day.run(["good"]) == []
    assert ended(tmp_path / "out") == {
        "hangs": "stopped at its limit", "bad": "failed, status 3", "good": "well",
    }  # fmt: skip
    (child,) = Record(tmp_path / "out").rows("child")
    assert is_gone(child["pid"]), "what the part had written is there, and its child is not"


def test_the_deadline_is_for_all_parts(tmp_path: Path, parts: dict[str, Part]) -> None:
    day = Day(parts, tmp_path, tmp_path / "cache", LEAST + 0.5)
    start = time.monotonic()
    assert day.run(["hangs"]) == ["hangs"] and day.run(["good"]) == ["good"]
    assert time.monotonic() - start < LEAST + 4
    assert ended(tmp_path) == {"hangs": "stopped at its limit", "good": "no time is left"}


def test_a_day_that_is_stopped_leaves_nothing_running(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    code = (
        f"from bench import day, gpu; gpu.PARTS = {{'hangs': day.Part('python {script}', 50)}}\n"
        f"gpu.main(['--rehearse', '--parts', 'hangs', '--out', '{tmp_path}', '--cache', '{tmp_path}/cache'])"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    day = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    record = Record(tmp_path)
    for _ in range(300):
        if record.rows("child"):
            break
        time.sleep(0.1)

    day.send_signal(signal.SIGTERM)
    assert day.wait(20) != 0
    assert is_gone(record.rows("child")[0]["pid"])


def test_calls_fit_their_deadlines_and_name_parts_that_there_are() -> None:
    for number, groups in gpu.CALLS.items():
        names = [group.split("+") for group in groups]
        assert {name for group in names for name in group} <= gpu.PARTS.keys()
        most = sum(max(gpu.PARTS[name].seconds for name in group) for group in names if group != ["tune"])
        assert most <= gpu.SECONDS[number] + 45, "a part or two may meet its limit, and the last is still begun"
    assert sum(gpu.SECONDS.values()) <= 15 * 60 - 180, "a rented machine's time, less two starts"


def test_what_is_asked_must_make_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--parts", "tests", "teas"])
    assert "unknown parts: teas" in capsys.readouterr().err
    if not gpu.torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main(["--call", "1", "--out", str(tmp_path)])
        assert "needs a CUDA device" in capsys.readouterr().err


def rehearsed(out: Path, *arguments: str) -> set[str]:
    """Rehearse; returns the kinds of rows that are there."""
    assert gpu.main(["--rehearse", "--out", str(out), "--cache", str(out / "cache"), *arguments]) == 0, (
        out / "log.txt"
    ).read_text()[-3000:]
    assert set(ended(out).values()) == {"well"}
    return {row["kind"] for row in read(out / "results.jsonl")}


def test_cheap_parts_are_rehearsed(tmp_path: Path) -> None:
    assert {"machine", "part"} <= rehearsed(tmp_path, "--parts", "machine+memcheck", "--seconds", "100")
    assert (tmp_path / "calibration.json").is_file() and "sampler_step ran" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("call", gpu.CALLS)
def test_a_whole_call_is_rehearsed(tmp_path: Path, call: int) -> None:
    kinds = rehearsed(tmp_path, "--call", str(call), "--seconds", "1200")
    assert {"machine", "part", "time"} | ({"check", "tests passed"} if call == 1 else set()) <= kinds
    assert not {"missed", "test"} & kinds
