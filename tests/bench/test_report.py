"""The report: what is kept of a run, and the tables that are made from it."""

import json
from pathlib import Path

import pytest

from bench import report
from bench.record import Row
from sdkit.files import section


def run(device: str = "NVIDIA H100", cuda: str | None = "13.0", ours: float = 10.0, day: int = 2) -> list[Row]:
    """A run of one op, two cases; the second is lost to a peer."""
    machine: Row = {"kind": "machine", "device": device, "date": f"2026-01-0{day}T03:04:05+00:00", "commit": "abc"}
    machine |= {"copy": 3e12, "matrix": {"float16": 8e14}, "launch_in_graph": 1.5, "launch_from_python": 9.0}
    if cuda:
        machine["cuda"] = cuda

    def row(case: str, name: str, median: float) -> Row:
        times = {"low": 0.9 * median, "median": median, "high": 1.2 * median}
        row = {"kind": "time", "op": "geglu", "case": case, "direction": "forward", "implementation": name}
        return row | {"microseconds": times, "bytes": 24_000_000, "flops": 0, "peak_memory": 5e6}

    return [
        machine,
        row("a", "ours", ours), row("a", "eager", 30.0), row("a", "compiled", 20.0), row("a", "copy", 8.0),
        row("b", "ours", ours), row("b", "eager", 5.0),
    ]  # fmt: skip


def test_the_table_has_the_best_peer_of_each_case_and_shows_losses() -> None:
    text = report.tables([run()])
    assert "| geglu | forward | 20 | 25 | 1.25 | 1 of 2 |" in text
    assert "| geglu, a, forward | 10.0 (9.0 to 12.0) | eager 30.0, compiled 20.0, copy 8.0 | 2.00 | 80 % |" in text
    assert "| geglu, b, forward | 10.0 (9.0 to 12.0) | eager 5.0 | 0.50 |  |" in text
    assert "copy 3.00 TB/s, float16 800 TFLOP/s; a launch 1.5 µs in a graph" in text and "commit abc" in text


def test_our_best_counts_and_our_kernels_inside_a_peer_are_neither() -> None:
    rows = run()
    rows[3]["implementation"] = "ours in diffusers"  # the fastest but ours in case a
    rows[2]["implementation"] = "ours in a graph"
    rows[2]["microseconds"] = {"low": 3.0, "median": 4.0, "high": 5.0}
    rows.append(rows[1] | {"implementation": "diffusers"})
    text = report.tables([rows])
    assert "4.0 (3.0 to 5.0), in a graph | ours 10.0, ours in diffusers 20.0, copy 8.0, diffusers 10.0 | 2.50 |" in text


def test_what_went_wrong_is_told() -> None:
    key = {"op": "geglu", "case": "a", "dtype": "float16"}
    rows = [
        *run(),
        {"kind": "part", "name": "unet", "ended": "stopped at its limit"},
        {"kind": "part", "name": "check", "ended": "well"},
        {"kind": "test", "name": "test_x", "message": ["...", "E  assert 1 == 2"]},
        {"kind": "tests passed", "count": 25},
        {"kind": "checking"} | key,
        {"kind": "check", "right": False, "wrong": ["output 0: largest error 3"]} | key,
        {"kind": "checking"} | key | {"case": "b"},
        {"kind": "missed", "implementation": "peer", "reason": "no such module"} | key,
    ]
    text = report.tables([rows])
    for line in (
        "- part unet: stopped at its limit", "- test test_x failed: E  assert 1 == 2", "25 tests passed",
        "- geglu, a, float16: output 0: largest error 3", "- geglu, b, float16: its check did not end",
        "- not timed, 1 times: geglu, peer: no such module (a)",
    ):  # fmt: skip
        assert line in text
    assert "part check" not in text


def test_without_a_gpus_run_nothing_is_claimed() -> None:
    assert report.on_a_gpu([run("CPU, 2 threads", None)]) == [] and report.tables([]) == ""


def test_the_newest_run_of_a_device_counts() -> None:
    old, new = run(), run(ours=4.0, day=5)
    assert report.on_a_gpu([new, old]) == [new]
    training = [row | {"op": "training"} if row["kind"] == "time" else row for row in run(day=6)]
    assert report.on_a_gpu([training, new]) == [new, training]


def test_a_run_is_kept_under_its_device_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in run("NVIDIA H100 80GB HBM3")))
    kept = report.keep(file)
    assert kept.name == "nvidia-h100-80gb-hbm3-2026-01-02T030405.jsonl" and kept.read_text() == file.read_text()
    file.write_text("")
    with pytest.raises(ValueError, match="row of kind machine"):
        report.keep(file)


def test_the_readme_is_what_the_results_make() -> None:
    """bench/README.md is generated from bench/results/: no figure there without a run."""
    runs = [report.read(file) for file in sorted(report.RESULTS.glob("*.jsonl"))]
    expected = report.tables(report.on_a_gpu(runs)) or report.NOT_MEASURED
    assert section(report.HERE / "README.md", report.SECTION) == expected
