"""The benchmark's report: what is kept of a run, and the tables that are made from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, timing


def raw(device: str, cuda: str | None, ours: float = 10.0) -> dict[str, Any]:
    """A file as pytest-benchmark writes it: one op, two cases; the second is lost to a peer."""
    machine = {"device": device, "cuda": cuda} if cuda else {"device": device}

    def entry(case: str, name: str, median: float) -> dict[str, Any]:
        times = {"20": 0.9 * median, "50": median, "80": 1.2 * median}
        return {
            "extra_info": {
                "op": "geglu",
                "case": case,
                "direction": "forward",
                "implementation": name,
                "microseconds": times,
                "bytes": 24_000_000,
                "flops": 0,
                "copy": 3e12,
                "matrix": {"float16": 8e14},
                "machine": machine,
                "peak_memory": 5e6,
            }
        }

    entries = [entry("a", "ours", ours), entry("a", "eager", 30.0), entry("a", "compiled", 20.0)]
    entries += [entry("b", "ours", ours), entry("b", "eager", 5.0)]
    return {"datetime": "2026-01-02T03:04:05", "commit_info": {"id": "abc", "dirty": False}, "benchmarks": entries}


def test_the_table_has_the_best_peer_of_each_case_and_shows_losses() -> None:
    text = report.tables([report.condense(raw("NVIDIA H100", "13.0"))])
    assert "| geglu | forward | 20 | 25 | 1.25 | 1 of 2 |" in text
    assert "| geglu, a, forward | 10.0 (9.0 to 12.0) | eager 30.0, compiled 20.0 | 2.00 | 80 % |" in text
    assert "| geglu, b, forward | 10.0 (9.0 to 12.0) | eager 5.0 | 0.50 | 80 % |" in text
    assert "copy 3.00 TB/s, float16 800 TFLOP/s" in text and "Commit abc" in text


def test_our_kernels_inside_a_peer_are_no_peer() -> None:
    file = raw("NVIDIA H100", "13.0")
    file["benchmarks"][2]["extra_info"]["implementation"] = "ours in diffusers"  # the fastest in case a
    text = report.tables([report.condense(file)])
    assert "| geglu | forward | 20 | 35 | 1.75 | 1 of 2 |" in text
    assert "eager 30.0, ours in diffusers 20.0 | 3.00 |" in text


def test_without_a_gpus_run_nothing_is_claimed() -> None:
    assert report.tables([]) == report.NOT_MEASURED
    assert report.tables([report.condense(raw("CPU, 2 threads", None))]) == report.NOT_MEASURED


def test_the_newest_run_of_a_device_counts() -> None:
    old, new = report.condense(raw("NVIDIA H100", "13.0")), report.condense(raw("NVIDIA H100", "13.0", ours=4.0))
    new["date"] = "2026-02-02T00:00:00"
    assert report.tables([new, old]) == report.tables([new])
    training = report.condense(raw("NVIDIA H100", "13.0"))
    for row in training["rows"]:
        row["op"] = "training"
    both = report.tables([new, training])
    assert "| geglu | forward |" in both and "| training | forward |" in both


def test_a_run_is_kept_under_its_device_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    file = tmp_path / "raw"
    file.write_text(json.dumps(raw("NVIDIA H100 80GB HBM3", "13.0")))
    kept = report.keep(file)
    assert kept.name == "nvidia-h100-80gb-hbm3-2026-01-02T030405.json"
    assert len(json.loads(kept.read_text())["rows"]) == 5


def test_the_readme_is_what_the_results_make() -> None:
    """bench/README.md is generated from bench/results/: no figure there without a run."""
    results = [json.loads(file.read_text()) for file in sorted(report.RESULTS.glob("*.json"))]
    text = (report.HERE / "README.md").read_text()
    assert text.split(report.START)[1].split(report.END)[0].strip() == report.tables(results)


def test_repeated_calls_each_in_turn() -> None:
    seen: list[int] = []
    run, count = timing.repeated([lambda k=k: seen.append(k) for k in range(3)], torch.device("cpu"))
    run()
    assert count == 3 and seen == [0, 1, 2]
    assert timing.copies(10**9, torch.device("cuda")) == 2 and timing.copies(10**3, torch.device("cuda")) == 24
