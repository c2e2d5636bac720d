"""Whether the kernels are right at the shapes that are timed: ``python -m bench.check_kernels``.

Every hot case of one picture, forward and backward, in float16 and bfloat16, on outputs poisoned with NaN, as
`sdkernels.agreement` judges it. On a CPU an odd case in Triton's interpreter, in float32 and float16. The ops are
shared out to several processes, so that one that brings the GPU down leaves the others' verdicts.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.record import DEVICE, GPU, Clock, Record, parser_of, reason_of
from sdkernels import reference
from sdkernels.agreement import disagreements
from sdkernels.backend import UnsupportedError
from sdkernels.op_spec import Case, OpSpec
from sdkernels.registry import OPS

DTYPES = (torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def code() -> str:
    """A mark of the kernels' code: a verdict on other code says nothing."""
    files = sorted(Path(reference.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def check(record: Record, spec: OpSpec, case: Case, dtype: torch.dtype) -> bool:
    """Enter whether an op is right in this case; a case for which there is no kernel is neither right nor wrong."""
    row = {"op": spec.name, "case": case.name, "dtype": name_of(dtype), "code": code()}
    record.add("checking", **row)  # where this is the last row of an op, it ended the process
    try:
        wrong = disagreements(spec, spec.inputs(case, dtype, DEVICE), dtype)
    except UnsupportedError as error:
        record.add("check", **row, right=None, wrong=[str(error)])
        return True
    except Exception as error:  # whatever it raises, the op is not right here
        wrong = [reason_of(error)]

    record.add("check", **row, right=not wrong, wrong=wrong)
    for line in wrong:
        print(f"WRONG: {spec.name} {case.name} {row['dtype']}: {line}", flush=True)
    return not wrong


def is_right(record: Record, spec: OpSpec, case: Case, dtype: torch.dtype) -> bool:
    """Whether an op may be timed: by the last verdict on record, a new one where this code of its op has none."""
    key = (spec.name, code())
    if not any((row["op"], row["code"]) == key for row in record.rows("checking")):
        check(record, spec, case, dtype)

    key += (case.name, name_of(dtype))
    rows = [row for row in record.rows("check") if (row["op"], row["code"], row["case"], row["dtype"]) == key]
    return bool(rows) and rows[-1]["right"] is True


def main() -> int:
    """Check the ops of the command line here, all of them in processes beside each other; 1 where one is wrong."""
    parser = parser_of(__doc__)
    parser.add_argument("--op", nargs="+", choices=OPS, help="in this process (default: all, in several)")
    arguments = parser.parse_args()

    if arguments.op is None:
        jobs = min(len(OPS), os.cpu_count() or 1)
        command = [sys.executable, "-m", "bench.check_kernels", "--out", arguments.out, "--seconds", arguments.seconds]
        shares = [list(OPS)[k::jobs] for k in range(jobs)]
        children = [subprocess.Popen([*map(str, command), "--op", *share]) for share in shares]
        return max(abs(child.wait()) for child in children)

    clock, record = Clock(arguments.seconds), Record(arguments.out)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    good = True
    for dtype in DTYPES:
        for spec in (OPS[name] for name in arguments.op):
            for case in spec.one_picture if GPU else spec.odd[1:2]:
                if clock.left < 0:
                    print("out of time", flush=True)
                    return 1
                good &= check(record, spec, case, dtype)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
