"""`fastrl report RUN [RUN...]`: report.html of a run, or of several runs compared.

RUN is the output folder of a loop, at work, finished or killed, or that of `fastrl run`. One run's report is written
into its folder, a comparison to --output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastrl.run.output import LOG
from fastrl.run.summary import save_comparison, save_pipeline, save_report


def main(argv: Sequence[str]) -> None:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(
        prog="fastrl report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder of a run")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison.html"), help="file of a comparison (default: comparison.html)"
    )
    options = parser.parse_args(list(argv))
    folders = [folder.expanduser() for folder in options.runs]
    if len(folders) > 1:
        path = save_comparison(folders, options.output)
    elif stages := stage_folders(folders[0]):
        path = save_pipeline(folders[0], stages)
    else:
        path = save_report(folders[0])
    print(f"wrote {path}")


def stage_folders(folder: Path) -> list[Path]:
    """The runs inside the output folder of a pipeline, in the order in which they began to write; [] for a loop's."""
    if (folder / LOG).exists():
        return []
    found = [log.parent for log in folder.glob(f"*/{LOG}") if not log.parent.name.endswith(".previous")]
    return sorted(found, key=lambda place: place.stat().st_ctime_ns)
