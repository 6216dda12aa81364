"""A campaign of any length: `python -m tests.hostile --cases 1000000`; ends with 1 when anything was wrong."""

import argparse
import faulthandler
import json
import sys
import tempfile
from pathlib import Path

from . import campaign

MEMORY = Path("/dev/shm")  # files that live for a millisecond need no disk


def main() -> int:
    """Run, print the table, and every fault with the number that repeats it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", default="", help="only this one")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so many")
    parser.add_argument("--keep", type=Path, help="folder for the files that were no good")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        numbers = range(args.first, args.first + args.cases)
        found = campaign.run(
            Path(folder),
            numbers,
            seed=args.seed,
            only=args.reader,
            seconds=args.seconds,
            keep=args.keep,
            tell=lambda text: print(f"{text}\n", flush=True),
        )
    print(found.table())
    if args.json:
        tallies = {name: [tally.cases, tally.refused, tally.slowest] for name, tally in found.tallies.items()}
        figures = {"cases": found.cases, "faults": found.fault_count, "seconds": found.seconds, "readers": tallies}
        args.json.write_text(json.dumps(figures, indent=1))
    return int(found.fault_count > 0)


if __name__ == "__main__":
    sys.exit(main())
