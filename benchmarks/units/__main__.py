"""Rules that find learning rates, on problems whose groups of parameters have different units.

    python -m benchmarks.units                            # all problems, all methods
    python -m benchmarks.units splats --methods hidlr "Prodigy per group"
    python -m benchmarks.units --tune splats              # finds the tuned rates again

Prints final losses, and over those of tuned rates. Runs are kept in --out and not run again.
"""

import argparse
from pathlib import Path

from benchmarks.units.compare import METHODS, PROBLEMS, compare
from benchmarks.units.tune import tune


def main() -> None:
    """Reads the command line, and tunes or compares."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.units", description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="problem", help=", ".join(PROBLEMS))
    parser.add_argument("--tune", action="store_true", help="search rates, store them")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("units.jsonl"))
    args = parser.parse_args()
    unknown = set(args.names) - set(PROBLEMS)
    if unknown:
        parser.error(f"no such problem: {', '.join(sorted(unknown))}")
    names = args.names or list(PROBLEMS)
    if args.tune:
        for name in names:
            tune(name)
    else:
        compare(names, args.methods, args.seeds, args.out)


if __name__ == "__main__":
    main()
