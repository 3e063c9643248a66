"""Runs every case of cases.py once on the GPU, forward and backward: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tests/ops/run_cases.py
"""

import sys

import torch
from cases import CASES

from igpt_fast import backend


def main() -> int:
    reason = backend.unavailable("cuda")
    if reason is not None:
        print(f"no case ran: {reason}", file=sys.stderr)
        return 3
    with backend.use_backend("cuda"):
        for case in CASES:
            case.run(case.on("cuda"))
            torch.cuda.synchronize()  # an error belongs to the case that made it
            print(case.name)
    print(f"{len(CASES)} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
