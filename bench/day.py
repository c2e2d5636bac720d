"""Commands run one after another until a clock has run out, each killed whole at its limit.

How each ended is a row of the results, as soon as it has; what they print goes into log.txt beside them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.record import Clock, Record

ROOT = Path(__file__).parents[1]
GRACE = 3.0  # seconds between asking a group to end and ending it
LEAST = 5.0  # seconds that a part needs to begin
START = 8.0  # seconds before its limit at which a part is to begin nothing more: Python takes some to start


@dataclass(frozen=True)
class Part:
    """A command, in which {out}, {cache}, {arch} and {seconds} are filled in, and the seconds that it gets at most.

    rehearsal: the command on a CPU, where that is another; interpreted: whether it runs kernels there; sanitized:
    whether compute-sanitizer watches it.
    """

    command: str
    seconds: float
    rehearsal: str = ""
    interpreted: bool = True
    sanitized: bool = False


@dataclass
class Running:
    """A part that was begun; process is None where it cannot run here, and then ``why``."""

    name: str
    process: subprocess.Popen[bytes] | None
    limit: Clock
    begun: float
    why: str = ""


class Day:
    """Runs parts, until a clock has run out."""

    def __init__(
        self, parts: Mapping[str, Part], out: Path, cache: Path, seconds: float, rehearse: bool = False
    ) -> None:
        self.parts, self.clock, self.rehearse = parts, Clock(seconds), rehearse
        self.out, self.cache = out.resolve(), cache.resolve()
        self.record = Record(self.out)
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        self.arch = 10 * major + minor

    def run(self, names: Sequence[str]) -> list[str]:
        """Run these parts beside each other; returns those that did not go well."""
        running: list[Running] = []
        try:
            running += [self._start(name) for name in names]
            return [one.name for one in running if not self._went_well(one)]
        finally:
            for one in running:
                _end(one.process)

    def _start(self, name: str) -> Running:
        """Begin a part, at the head of a process group of its own."""
        part = self.parts[name]
        most = self.clock.left if self.rehearse else min(part.seconds, self.clock.left)  # a CPU takes what it takes
        limit, begun = Clock(most), time.monotonic()
        if self.clock.left < LEAST:
            return Running(name, None, limit, begun, "no time is left")

        command = part.rehearsal if self.rehearse and part.rehearsal else part.command
        given = {"out": self.out, "cache": self.cache, "arch": self.arch}
        given["seconds"] = max(1, round(limit.left - START))
        words = [sys.executable if word == "python" else word.format(**given) for word in shlex.split(command)]
        if part.sanitized and not self.rehearse:
            if shutil.which("compute-sanitizer") is None:
                return Running(name, None, limit, begun, "compute-sanitizer is not installed")
            words = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *words]

        self._log(f"\n$ {shlex.join(words)}")
        with (self.out / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                words, cwd=ROOT, env=self._environment(part), stdout=log, stderr=log, process_group=0
            )
        return Running(name, process, limit, begun)

    def _went_well(self, one: Running) -> bool:
        """Wait for a part, no longer than its time, and enter how it ended."""
        ended = one.why
        if one.process is not None:
            try:
                status = one.process.wait(max(0.0, one.limit.left))
                ended = "well" if status == 0 else f"failed, status {status}"
            except subprocess.TimeoutExpired:
                ended = "stopped at its limit"
            _end(one.process)

        took = round(time.monotonic() - one.begun, 1)
        compiled = sum(1 for _ in self.cache.iterdir()) if self.cache.is_dir() else 0
        self.record.add("part", name=one.name, ended=ended, seconds=took, entries_in_cache=compiled)
        self._log(f"{one.name}: {ended} after {took} s; {self.clock.left:.0f} s are left")
        return ended == "well"

    def _environment(self, part: Part) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        kept |= {"OUT": str(self.out), "TRITON_CACHE_DIR": str(self.cache), "PYTHONUNBUFFERED": "1"}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        if part.sanitized:
            kept["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else an overrun ends in the next tensor, unseen
        if self.rehearse:
            kept |= {"CUDA_VISIBLE_DEVICES": "", "SDKIT_REHEARSE": "1"}
        if self.rehearse and part.interpreted:
            kept["TRITON_INTERPRET"] = "1"
        return kept

    def _log(self, line: str) -> None:
        print(line, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(line + "\n")


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """End a process and all that it started."""
    if process is None:
        return
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
