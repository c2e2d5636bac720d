"""One damaged file, read in this process, and a verdict: `python -m tests.hostile.trying FOLDER SUBJECT FIRST COUNT`.

For each case two lines of JSON go to the standard output: that it begins, and {"case": ..., "verdict": ..., "what":
...}. Where the second is missing the process has died, which `tests.hostile.test_hostile` reads as a crash.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdkit.errors import SDKitError
from tests.hostile.mutations import damaged
from tests.hostile.subjects import SUBJECTS, Subject

SECONDS = 5
GROWTH = 3  # of memory: times the size of the files
SLACK = 48 << 20  # bytes that any reading may take
GOOD, BAD = ("read", "refused"), ("raw traceback", "hang", "crash", "memory", "silent NaN", "ran code", "escape codes")


class Hang(BaseException):
    """No library's ``except Exception`` swallows it."""


def overdue(*_: Any) -> None:
    raise Hang


def memory(name: str) -> int:
    """A figure of this process in bytes: VmHWM, the most it has held, or VmRSS, what it holds."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def verdict(use: Callable[[], Iterable[Tensor]], size: int) -> tuple[str, str]:
    """What came of it, one of GOOD or BAD, and in what words. size: of what is read, in bytes."""
    heard = Heard()
    logging.getLogger().addHandler(heard)
    clear_peak()
    before = memory("VmRSS")
    signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    found, said = "read", ""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            tensors = list(use())
        texts = [*heard.texts, *(str(w.message) for w in warned)]
        if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
            found, said = ("read", texts[0]) if any("not finite" in text for text in texts) else ("silent NaN", "")
    except SDKitError as error:
        found, said = "refused", str(error)
        texts = [said]
    except Hang:
        found, said, texts = "hang", f"over {SECONDS} s", []
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = [f for f in frames if "site-packages" not in f.filename][-1]
        at = f"{Path(place.filename).name}:{place.lineno}"
        found, said, texts = "raw traceback", f"{type(error).__name__}: {str(error)[:150]} at {at}", []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        logging.getLogger().removeHandler(heard)

    if found in GOOD:
        grown = memory("VmHWM") - before
        if grown > GROWTH * size + SLACK:
            found, said = "memory", f"{grown >> 20} MiB for {size >> 10} KiB"
        elif coloured := [text for text in texts if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)]:
            found, said = "escape codes", repr(coloured[0][:150])
    return found, said


def clear_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def files_of(subject: Subject, folder: Path) -> list[Path]:
    """The files that are damaged, in their order."""
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name.endswith(subject.among)]


def built(subject: Subject, folder: Path) -> Path:
    """The subject's good files, written once."""
    if not folder.exists():
        folder.mkdir(parents=True)
        subject.build(folder)
    return folder


def try_case(name: str, case: int, folder: Path) -> dict[str, Any]:
    """Damage one file of the subject ``name`` as the number ``case`` says, and read it."""
    subject, rng = SUBJECTS[name], random.Random(f"{name} {case}")
    os.chdir(folder)
    good, there = built(subject, folder / f"{name}, good"), folder / "case"
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(good, there)
    file = rng.choice(files_of(subject, there))
    try:
        what, content = damaged(rng, file.name, file.read_bytes())
    except (TypeError, ValueError, RecursionError, OverflowError):
        return {"case": case, "verdict": "no case", "what": "the damage could not be written"}
    file.write_bytes(content)

    os.chdir(there)  # where a pickle that runs would leave its mark
    size = sum(f.stat().st_size for f in there.rglob("*") if f.is_file())
    start = time.perf_counter()
    found, said = verdict(lambda: subject.read(there), size)
    if (there / "hostile-pickle-was-here").exists():
        found = "ran code"
    return {
        "case": case, "verdict": found, "what": f"{file.relative_to(there)} {what}: {said}",
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def main(folder: Path, name: str, first: int, count: int) -> None:
    """Try ``count`` cases of a subject."""
    folder = folder.resolve()
    torch.set_num_threads(1)
    subject = SUBJECTS[name]
    good = built(subject, folder / f"{name}, good")
    list(subject.read(good))  # what is loaded once is not held against a case
    for case in range(first, first + count):
        print(json.dumps({"case": case, "begins": True}), flush=True)
        print(json.dumps(try_case(name, case, folder)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
