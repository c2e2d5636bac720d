"""The tables of runs on a GPU, made of their JSON lines.

python -m bench.report FOLDER/results.jsonl    keeps a run as results/DEVICE-DATE.jsonl, then makes the README
python -m bench.report                         the README alone
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.record import Row, read
from sdkit.files import replace_section

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SECTION = "tables"
NOT_MEASURED = "Not measured: no run on a GPU lies in `bench/results/`. `make gpu` on a machine with one makes it."
GUEST = "ours in diffusers"  # our networks inside a peer: neither ours nor a peer


def keep(file: Path) -> Path:
    """Copy a run into RESULTS, named after its device and date. Raises ValueError for one that says neither."""
    machine = machine_of(read(file))
    if not machine:
        raise ValueError(f"{file}: expected a row of kind machine, found none")
    device = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    return Path(shutil.copy(file, RESULTS / f"{device}-{machine['date'][:19].replace(':', '')}.jsonl"))


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def machine_of(rows: Iterable[Row]) -> Row:
    """The last row about the machine; {} where there is none."""
    return (of_kind(rows, "machine") or [{}])[-1]


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(op, case, direction) -> implementation -> its times."""
    found: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in of_kind(rows, "time"):
        found[row["op"], row["case"], row["direction"]][row["implementation"]] = row
    return found


def median(row: Row) -> float:
    return row["microseconds"]["median"]


def best_of_ours(done: dict[str, Row]) -> Row | None:
    return min(
        (row for name, row in done.items() if name.startswith("ours") and name != GUEST), key=median, default=None
    )


def best_of_peers(done: dict[str, Row]) -> Row | None:
    """The fastest that is neither ours nor a copy, which computes nothing."""
    peers = (row for name, row in done.items() if not name.startswith("ours") and name != "copy")
    return min(peers, key=median, default=None)


def heading(*names: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def summary(rows: Sequence[Row]) -> list[str]:
    """One line an op and direction: our time over all cases beside that of the best peer of each."""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for (op, _, direction), done in by_case(rows).items():
        ours, peer = best_of_ours(done), best_of_peers(done)
        if ours and peer:
            pair = (median(ours), median(peer))
            total[op, direction] = [
                a + b for a, b in zip(total[op, direction], (*pair, pair[0] < pair[1], 1), strict=True)
            ]

    lines = heading("op", "direction", "ours, sum in µs", "best peer of each case, sum in µs", "ratio", "cases won")
    for (op, direction), (ours, best, won, count) in total.items():
        lines.append(f"| {op} | {direction} | {ours:.0f} | {best:.0f} | {best / ours:.2f} | {won:.0f} of {count:.0f} |")
    return lines


def detail(rows: Sequence[Row]) -> list[str]:
    """Every case: our best time with its spread, each other's, the ratio to the best, share of the ceilings, memory."""
    rate = next(iter(machine_of(rows)["matrix"].values()))
    lines = heading(
        "op, case, direction", "ours µs (20 to 80 %)", "others µs", "ratio", "of copy", "of matrix rate", "peak MB"
    )
    for (op, case, direction), done in by_case(rows).items():
        ours, peer = best_of_ours(done), best_of_peers(done)
        if ours is None:
            continue
        mid, (low, high) = median(ours), (ours["microseconds"][k] for k in ("low", "high"))
        which = ours["implementation"].removeprefix("ours").replace(" ", ", ", 1)

        others = ", ".join(f"{name} {median(row):.1f}" for name, row in done.items() if row is not ours)
        ratio = f"{median(peer) / mid:.2f}" if peer else ""
        copy = f"{100 * median(done['copy']) / mid:.0f} %" if "copy" in done else ""
        counted = ours["flops"] and direction == "forward"
        matrix = f"{100 * ours['flops'] / (mid * 1e-6) / rate:.0f} %" if counted else ""
        memory = ", ".join(f"{name} {row['peak_memory'] / 1e6:.0f}" for name, row in done.items() if name != "copy")
        lines.append(
            f"| {op}, {case}, {direction} | {mid:.1f} ({low:.1f} to {high:.1f}){which} | {others} | {ratio} "
            f"| {copy} | {matrix} | {memory} |"
        )
    return lines


def troubles(rows: Sequence[Row]) -> list[str]:
    """What went wrong: parts, tests, kernels that are wrong, what was not timed; a line each."""
    found = [f"part {row['name']}: {row['ended']}" for row in of_kind(rows, "part") if row["ended"] != "well"]
    found += [f"test {row['name']} failed: {row['message'][-1]}" for row in of_kind(rows, "test")]
    for row in of_kind(rows, "check"):
        if not row["right"]:
            found += [f"{row['op']}, {row['case']}, {row['dtype']}: {line}" for line in row["wrong"]]
    missed: dict[str, list[str]] = defaultdict(list)
    for row in of_kind(rows, "missed"):
        missed[f"{row['op']}, {row['implementation']}: {row['reason']}"].append(row["case"])
    found += [f"not timed, {len(cases)} times: {what} ({cases[0]})" for what, cases in missed.items()]

    ended = {(row["op"], row["case"], row["dtype"]) for row in of_kind(rows, "check")}
    begun = [(row["op"], row["case"], row["dtype"]) for row in of_kind(rows, "checking")]
    found += [f"{', '.join(key)}: its check did not end" for key in begun if key not in ended]
    return [f"- {line}" for line in found]


def tables(runs: Sequence[Sequence[Row]]) -> str:
    """The tables of runs, each under its machine and date; of runs that name no machine nothing."""
    parts: list[str] = []
    for rows in runs:
        machine = dict(machine_of(rows))
        if not machine:
            continue
        rates = ", ".join(f"{name} {value / 1e12:.0f} TFLOP/s" for name, value in machine["matrix"].items())
        measured = ("kind", "device", "date", "copy", "matrix", "launch_in_graph", "launch_from_python")
        facts = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in measured)
        passed = sum(row["count"] for row in of_kind(rows, "tests passed"))

        parts += [
            f"### {machine['device']}, {machine['date'][:10]}",
            f"{facts}. Measured in the same run: copy {machine['copy'] / 1e12:.2f} TB/s, {rates}; a launch "
            f"{machine['launch_in_graph']:.1f} µs in a graph, {machine['launch_from_python']:.1f} µs from Python. "
            f"{passed} tests passed.",
            *(["\n".join(summary(rows)), "\n".join(detail(rows))] if of_kind(rows, "time") else []),
            "\n".join(troubles(rows)),
        ]
    return "\n\n".join(part for part in parts if part)


def on_a_gpu(runs: Iterable[Sequence[Row]]) -> list[Sequence[Row]]:
    """Of each GPU the newest run of the same operations, oldest first."""
    newest: dict[tuple[str, ...], Sequence[Row]] = {}
    measured = [rows for rows in runs if machine_of(rows).get("cuda")]
    for rows in sorted(measured, key=lambda rows: machine_of(rows)["date"]):
        key = (machine_of(rows)["device"], *sorted({row["op"] for row in of_kind(rows, "time")}))
        newest.pop(key, None)
        newest[key] = rows
    return list(newest.values())


def write_readme() -> None:
    """Replace what stands between the marks in README.md."""
    content = tables(on_a_gpu(read(file) for file in sorted(RESULTS.glob("*.jsonl")))) or NOT_MEASURED
    replace_section(HERE / "README.md", SECTION, content)


def main() -> None:
    """Keep the files named on the command line and remake the README."""
    parser = argparse.ArgumentParser(description="Keep a run's results and remake bench/README.md.")
    parser.add_argument("files", nargs="*", type=Path, help="results.jsonl of a run")
    for file in parser.parse_args().files:
        print(keep(file))
    write_readme()


if __name__ == "__main__":
    main()
