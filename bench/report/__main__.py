"""`python -m bench.report RESULTS.json --output FOLDER` writes a report anew from its result."""

import argparse
from pathlib import Path

from bench.report.document import write
from bench.results import load

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, help="folder; default: that of the results")
    arguments = parser.parse_args()
    print(write(load(arguments.results), arguments.output or arguments.results.parent))
