"""A plugin of pytest that enters each test as it ends: ``pytest -p bench.pytest_record``, with the folder in $OUT.

A run that is killed at its limit leaves what it had. Tests that passed are only counted, in rows of many.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.record import FOLDER, Record

MANY = 25
_record = Record(Path(os.environ.get("OUT") or FOLDER))
_passed: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Under xdist the process that hands out the tests enters them, and its workers nothing."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.unregister(name=__name__)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called for setup, call and teardown of each test."""
    if report.failed:
        message = str(report.longrepr).splitlines()
        _record.add("test", name=report.nodeid, outcome="failed", when=report.when, message=message[-30:])
    elif report.when == "call" and report.passed:
        _passed.append(report.nodeid)
        if len(_passed) == MANY:
            _flush()


def pytest_sessionfinish() -> None:
    """The rest."""
    _flush()


def _flush() -> None:
    _record.add("tests passed", count=len(_passed), last=_passed[-1] if _passed else None)
    _passed.clear()
