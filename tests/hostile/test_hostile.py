"""Damaged files and senseless arguments: each is read and used, or refused in words; nothing else ever happens.

The quick test tries a few of each kind, the slow one all, and writes its table into tests/README.md.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdkit.files import replace_section
from tests.hostile.subjects import SUBJECTS
from tests.hostile.trying import BAD

ARGUMENTS = "arguments"
FILES, CALLS = 110, 1_100  # cases: of each kind of file, and of arguments
FEW = 4
PATIENCE = 60  # seconds without a word from a process, which allows itself 5 for a case
README = Path(__file__).parents[1] / "README.md"


def lines_of(process: subprocess.Popen[str], patience: float) -> Any:
    """The lines that a process writes, until it ends or says nothing for too long."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    stream = process.stdout

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get(timeout=patience)) is not None:
        yield json.loads(line)


def tried(name: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """The verdicts on the first ``count`` cases of a kind. A process that dies, or hangs, is followed by another."""
    verdicts: list[dict[str, Any]] = []
    while len(verdicts) < count:
        first = len(verdicts)
        module = ["tests.hostile.arguments"] if name == ARGUMENTS else ["tests.hostile.trying", str(folder), name]
        command = [sys.executable, "-m", *module, str(first), str(count - first)]
        root = str(Path(__file__).parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            "COLUMNS": "80",
        }
        with (folder / "stderr").open("w+") as errors, subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:  # fmt: skip
            begun = False
            try:
                for line in lines_of(process, PATIENCE):
                    begun = "begins" in line
                    verdicts += [] if begun else [line]
                process.wait()
            except queue.Empty:
                process.kill()
                verdicts.append({"case": len(verdicts), "verdict": "hang", "what": f"silent for {PATIENCE} s"})
                continue
            errors.seek(0)
            if begun:
                said = errors.read()[-500:]
                verdicts.append({"case": len(verdicts), "verdict": "crash", "what": f"{process.returncode}: {said}"})
            elif process.returncode:
                raise AssertionError(f"{name}: {errors.read()[-3000:]}")
    return verdicts


def check(verdicts: list[dict[str, Any]]) -> None:
    bad = [
        f"{verdict['case']}: {verdict['verdict']}: {verdict['what']}"
        for verdict in verdicts
        if verdict["verdict"] in BAD
    ]
    assert not bad, "\n".join(bad)
    assert any(verdict["verdict"] == "refused" for verdict in verdicts), "nothing was damaged"


@pytest.mark.parametrize("name", ["LoRA, peft", "textual inversion, pickled", ARGUMENTS])
def test_a_few(name: str, tmp_path: Path) -> None:
    check(tried(name, 10 * FEW if name == ARGUMENTS else 3 * FEW, tmp_path))


@pytest.mark.slow
def test_all_of_them(tmp_path: Path) -> None:
    rows, wrong = list[str](), list[dict[str, Any]]()
    total: Counter[str] = Counter()
    for name in (*SUBJECTS, ARGUMENTS):
        verdicts = tried(name, CALLS if name == ARGUMENTS else FILES, tmp_path)
        counts = Counter(verdict["verdict"] for verdict in verdicts)
        wrong += [{"of": name} | verdict for verdict in verdicts if verdict["verdict"] in BAD]
        total += counts
        rows.append(row(name, counts))

    table = [
        "| what is read or called | cases | read | refused | " + " | ".join(BAD) + " |",
        "|---|" + "---|" * (3 + len(BAD)),
    ]
    replace_section(README, "hostile", "\n".join([*table, *rows, row("all", total)]))
    assert not wrong, "\n".join(map(str, wrong))
    assert total.total() - total["no case"] > len(SUBJECTS) * 100 + 1_000


def row(name: str, counts: Counter[str]) -> str:
    numbers = [counts.total() - counts["no case"], counts["read"], counts["refused"], *(counts[bad] for bad in BAD)]
    return f"| {name} | " + " | ".join(map(str, numbers)) + " |"
