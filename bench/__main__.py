"""Measures fused_resnet beside its peers.

    python -m bench models --models resnet50 --dtype fp32 --batch 1 16
    python -m bench all --quick --out records
    python -m bench report
    python -m bench compare HEAD~1

Suites: layers, ops, models, training, memory, startup, accuracy, or all of them. Rows go to the terminal and, with
--out, to one JSON-lines file a suite. A peer that is not installed is named; one that fails is a row that says so.
"""

import argparse
import signal
import sys

from bench import compare, report
from bench.options import add_options, options_of, suites_of
from bench.record import Record
from bench.runner import SUITES, run, suite, wanted
from fused_resnet.options import UsageError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in (*SUITES, "all"):
        about = "Every suite." if name == "all" else suite(name).__doc__
        command = commands.add_parser(name, help=about.partition(".")[0].replace("\n", " "), description=about)
        add_options(command)
        command.set_defaults(run=measure)
    report.add_parser(commands)
    compare.add_parser(commands)
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit is an interruption too
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted: the rows that were finished are kept", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 2


def example(args: argparse.Namespace) -> str:
    """The title of a case that there is."""
    name = suites_of(args.command)[0]
    return suite(name).title(next(iter(suite(name).cases(options_of(args, name)))))


def measure(args: argparse.Namespace) -> int:
    """Run the suites; 1 where a result of fused_resnet was wrong or missing."""
    chosen = [(name, options_of(args, name)) for name in suites_of(args.command)]
    chosen = [(name, options) for name, options in chosen if wanted(suite(name), options)]
    if not chosen:
        raise UsageError(f"--only {args.only!r}: no case has it in its title, such as {example(args)!r}")
    bad = 0
    for name, options in chosen:
        record = Record(args.out, name, options.device, list(options.dtypes))
        rows = run(suite(name), options, record)
        bad += sum(row["status"] in ("wrong", "failed") and row["system"].startswith("fused") for row in rows)
        if record.path:
            print(f"\n{len(rows)} rows in {record.path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
