"""Random configurations, prompt files and flags for `distill --dry-run`: 1,000 in this process, 20 in their own.

    python scripts/fuzz.py [--examples 1000] [--processes 20] [--seed 0]

Each must end with exit status 0 or 2, with one line if 2, without a traceback, within seconds, and write nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from hypothesis import HealthCheck, Phase, given, seed, settings
from mutations import Case, broken, cases


def fuzz(count: int, number: int, subprocesses: bool) -> tuple[Counter[int], list[str]]:
    """How often each exit status was seen, and what went wrong."""
    found: Counter[int] = Counter()
    wrongs: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:

        @seed(number)
        @settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=cases())
        def one(case: Case) -> None:
            status, wrong = broken(case, Path(scratch) / f"{found.total()}", subprocesses)
            found[status] += 1
            if wrong:
                wrongs.append(wrong)
                print(wrong, file=sys.stderr)

        one()
    return found, wrongs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, failures = time.monotonic(), 0
    for where, count, subprocesses in (
        ("in process", arguments.examples, False), ("as processes", arguments.processes, True),
    ):  # fmt: skip
        found, wrongs = fuzz(count, arguments.seed, subprocesses) if count else (Counter(), [])
        failures += len(wrongs)
        print(f"{found.total()} {where}: {found[0]} accepted, {found[2]} refused in one line, {len(wrongs)} wrong")
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
