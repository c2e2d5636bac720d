"""Condense pytest-benchmark's JSON into bench/results/ and make bench/README.md from all that lies there.

python -m bench.report raw.json                keeps raw.json's figures as results/DEVICE-DATE.json, then the README
python -m bench.report                         the README alone
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
START, END = "<!-- tables -->", "<!-- /tables -->"
NOT_MEASURED = "Not measured: no run on a GPU lies in `bench/results/`. `make gpu` on a machine with one makes it."
Row = dict[str, Any]


def condense(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a pytest-benchmark run that is kept: machine, commit, ceilings and a row for each case."""
    rows: list[Row] = [entry["extra_info"] for entry in raw["benchmarks"]]
    if not rows:
        raise ValueError("the file holds no benchmark")

    shared = {"machine": rows[0]["machine"], "copy": rows[0]["copy"], "matrix": rows[0]["matrix"]}
    kept = [{k: v for k, v in row.items() if k not in shared} for row in rows]
    commit = raw.get("commit_info", {})
    return {"date": raw["datetime"], "commit": commit.get("id"), "dirty": commit.get("dirty"), **shared, "rows": kept}


def keep(raw_file: Path) -> Path:
    """Condense a file into RESULTS, named after its device and date."""
    result = condense(json.loads(raw_file.read_text()))
    device = re.sub(r"[^a-z0-9]+", "-", str(result["machine"]["device"]).lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{device}-{result['date'][:19].replace(':', '')}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(op, case, direction) -> implementation -> its row."""
    found: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["op"], row["case"], row["direction"]][row["implementation"]] = row
    return found


def of_peers(times: dict[str, float]) -> list[float]:
    """The times of implementations that are not ours; "ours in diffusers" is ours."""
    return [time for name, time in times.items() if not name.startswith("ours")]


def heading(*names: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def summary(result: dict[str, Any]) -> list[str]:
    """One line an op and direction: our time over all cases beside that of the best peer of each."""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for (op, _, direction), done in by_case(result["rows"]).items():
        times = {name: row["microseconds"]["50"] for name, row in done.items()}
        if "ours" in times and of_peers(times):
            best = min(of_peers(times))
            sums = total[op, direction]
            sums[0] += times["ours"]
            sums[1] += best
            sums[2] += times["ours"] < best
            sums[3] += 1

    lines = heading("op", "direction", "ours, sum in µs", "best peer of each case, sum in µs", "ratio", "cases won")
    for (op, direction), (ours, best, won, count) in total.items():
        lines.append(f"| {op} | {direction} | {ours:.0f} | {best:.0f} | {best / ours:.2f} | {won:.0f} of {count:.0f} |")

    return lines


def detail(result: dict[str, Any]) -> list[str]:
    """Every case: our time with its spread, each peer's, the ratio to the best, share of the ceilings, memory."""
    rate = next(iter(result["matrix"].values()))
    lines = heading(
        "op, case, direction", "ours µs (20 to 80 %)", "others µs", "ratio", "of copy", "of matrix rate", "peak MB"
    )

    for (op, case, direction), done in by_case(result["rows"]).items():
        if "ours" not in done:
            continue
        ours = done["ours"]
        low, mid, high = (ours["microseconds"][q] for q in ("20", "50", "80"))
        others = {k: v["microseconds"]["50"] for k, v in done.items() if k != "ours"}

        shares = ["", ""]
        if direction == "forward" and ours["bytes"]:
            shares[0] = f"{100 * ours['bytes'] / (mid * 1e-6) / result['copy']:.0f} %"
            shares[1] = f"{100 * ours['flops'] / (mid * 1e-6) / rate:.0f} %" if ours["flops"] else ""
        peers = of_peers(others)
        ratio = f"{min(peers) / mid:.2f}" if peers else ""

        names = ", ".join(f"{name} {value:.1f}" for name, value in others.items())
        held = {name: row["peak_memory"] for name, row in done.items() if row["peak_memory"] is not None}
        memory = ", ".join(f"{name} {value / 1e6:.0f}" for name, value in held.items())
        lines.append(
            f"| {op}, {case}, {direction} | {mid:.1f} ({low:.1f} to {high:.1f}) | {names} | {ratio} | {shares[0]} "
            f"| {shares[1]} | {memory} |"
        )

    return lines


def tables(results: Sequence[dict[str, Any]]) -> str:
    """The generated part of the README: on each GPU the newest run of the same operations."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: r["date"]):
        if result["machine"].get("cuda"):
            newest[result["machine"]["device"], *sorted({row["op"] for row in result["rows"]})] = result

    if not newest:
        return NOT_MEASURED

    parts: list[str] = []
    for (device, *_), result in newest.items():
        facts = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if k != "device")
        rates = ", ".join(f"{name} {value / 1e12:.0f} TFLOP/s" for name, value in result["matrix"].items())
        parts += [
            f"### {device}, {result['date'][:10]}",
            f"Commit {result['commit']}{' with changes' if result['dirty'] else ''}; {facts}. Measured in the same run:"
            f" copy {result['copy'] / 1e12:.2f} TB/s, {rates}.",
            "\n".join(summary(result)),
            "\n".join(detail(result)),
        ]

    return "\n\n".join(parts)


def write_readme() -> None:
    """Replace what stands between the marks in README.md."""
    readme = HERE / "README.md"
    text = readme.read_text()
    head, rest = text.split(START)
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    readme.write_text(f"{head}{START}\n{tables(results)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Keep the files named on the command line and remake the README."""
    parser = argparse.ArgumentParser(description="Keep a benchmark's figures and remake bench/README.md.")
    parser.add_argument("raw", nargs="*", type=Path, help="files that pytest wrote with --benchmark-json")
    for raw in parser.parse_args().raw:
        print(keep(raw))
    write_readme()


if __name__ == "__main__":
    main()
