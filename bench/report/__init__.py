"""Makes a page with figures of the records, and writes the README's section on speed.

    python -m bench report
    python -m bench report records --out page
    python -m bench report records --text
    python -m bench report --check

The README is written from the records of bench/results; from others only where --readme names it. A file that is no
record is named and left out. --check says whether the README equals the records.
"""

import argparse
import sys
from pathlib import Path

from bench.record import ROOT


def add_parser(commands) -> None:
    """Add `report` to the subcommands."""
    command = commands.add_parser(
        "report",
        help="A page with figures of the records, and the README's section",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("paths", nargs="*", help="records, or folders of them (default: bench/results)")
    command.add_argument("--out", default="bench_report", help="folder of the page (default: bench_report)")
    command.add_argument("--readme", metavar="FILE", help="whose section is written or checked (default: README.md)")
    only = command.add_mutually_exclusive_group()
    only.add_argument("--text", action="store_true", help="print the section and write nothing")
    only.add_argument("--check", action="store_true", help="write nothing; 1 if the README is not what it would be")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page and the README, or print, or check."""
    from bench.report import page, readme
    from bench.report.records import load

    devices, problems = load(args.paths or [ROOT / "bench" / "results"])
    for problem in problems:
        print(f"python -m bench report: {problem}", file=sys.stderr)
    path, text = Path(args.readme or ROOT / "README.md"), None
    if args.check:
        return readme.check(path, devices)
    if args.text:
        print(readme.section(devices))
        return 0
    if args.readme or not args.paths:
        _, text = readme.rewritten(path, devices)  # before anything is written: it may be no README
    print(page.write(devices, problems, Path(args.out)))
    if text is not None:
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0
