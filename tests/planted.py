"""Faults planted one after another in a copy of the code, to see that the tests find each: ``python -m tests.planted``.

A fault is one expression that is slightly wrong, of the kind that people make. Beside it, in planted.toml, stand the
tests that are to find it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from sdkit.files import replace_section

ROOT = Path(__file__).parents[1]
README = ROOT / "tests" / "README.md"


class Fault(NamedTuple):
    """``before`` stands once in ``file`` and becomes ``after``; ``tests``, a file or folder, are to fail."""

    what: str
    file: str
    before: str
    after: str
    tests: str


FAULTS = [Fault(**fault) for fault in tomllib.loads((ROOT / "tests" / "planted.toml").read_text())["fault"]]


def find(fault: Fault, folder: Path) -> str:
    """What the tests say of a fault in a copy of the code: "caught" or "NOT CAUGHT". The copy is as before then."""
    file = folder / fault.file
    good = file.read_text()
    if good.count(fault.before) != 1:
        raise SystemExit(f"{fault.file}: expected once, found {good.count(fault.before)} times: {fault.before}")
    file.write_text(good.replace(fault.before, fault.after))
    try:
        status, said = run_tests(folder, fault.tests)
    finally:
        file.write_text(good)
    if status not in (0, 1) or (status == 1 and not re.search(r"^FAILED", said, re.MULTILINE)):
        raise SystemExit(f"{fault.what}: the tests did not run:\n{said[-3000:]}")
    return "caught" if status else "NOT CAUGHT"


def run_tests(folder: Path, tests: str) -> tuple[int, str]:
    """pytest's exit status, and what it printed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not gpu",
        tests,
    ]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout + found.stderr


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Words in what the faults are; default: all.")] = None,
) -> None:
    """Plant them, and write the table into tests/README.md where all were planted."""
    chosen = [fault for fault in FAULTS if not names or any(name in fault.what for name in names)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)

        rows: list[str] = []
        for fault in chosen:
            rows.append(f"| {fault.what} | `{fault.file}` | {find(fault, folder)} |")
            print(rows[-1], flush=True)

    if len(chosen) == len(FAULTS):
        replace_section(README, "planted", "\n".join(["| fault | in | |", "|---|---|---|", *rows]))
    if any("NOT CAUGHT" in row for row in rows):
        raise SystemExit("not all of them were caught")


if __name__ == "__main__":
    typer.run(main)
