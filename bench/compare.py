"""This tree's fused_resnet beside another commit's.

    python -m bench compare HEAD~1
    python -m bench compare v0.1 --suites models --models resnet18 --batch 1

The other commit is checked out in a git worktree and built there; this tree's harness measures both, in turns, each in
processes of its own. The other commit runs twice, as two systems that should not differ: their ratio in each round is
the noise, and only what lies outside of it is called a change.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bench.options import add_options, options_of
from bench.pool import Failed, Pool
from bench.record import ROOT, git
from bench.runner import SUITES, suite, wanted, wrong
from bench.systems import OURS
from bench.timing import percentiles
from fused_resnet.options import UsageError

SYSTEMS = ("this", "base", "base again")
SUITES_DEFAULT = ("models", "training", "ops")
ROUNDS = 7
BUILD_LIMIT = 1800  # seconds


def add_parser(commands) -> None:
    about = "this tree beside another commit, in turns, with the noise"
    parser = commands.add_parser("compare", help=about, description=__doc__, formatter_class=_FORM)
    parser.add_argument("base", metavar="BASE", help="a commit, tag or branch")
    timed = [name for name in SUITES if hasattr(suite(name), "prepare")]
    parser.add_argument("--suites", nargs="+", choices=timed, default=list(SUITES_DEFAULT))
    add_options(parser)
    parser.set_defaults(run=main, quick=True, rounds=ROUNDS)


_FORM = argparse.RawDescriptionHelpFormatter


def worktree(commit: str) -> Path:
    """A checkout of `commit` with its extension built; kept, as building takes minutes.

    Raises:
        UsageError: there is no such commit, or it cannot be checked out.
    """
    sha = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if sha == "unknown":
        raise UsageError(f"BASE: git knows no commit {commit!r}")
    folder = ROOT / "build" / "compare" / sha[:12]
    built = folder / "build" / ".compared"
    if built.exists():
        return folder
    if not folder.exists():
        git("worktree", "prune")
        made = subprocess.run(
            ["git", "worktree", "add", "--detach", str(folder), sha], cwd=ROOT, capture_output=True, text=True
        )
        if made.returncode:
            raise UsageError(f"BASE: {made.stderr.strip().splitlines()[-1]}")
    print(f"building {sha[:12]} (once; it stays in {folder.relative_to(ROOT)})", flush=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "-q"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=BUILD_LIMIT)
    if done.returncode:
        raise UsageError(f"BASE: its build failed: {done.stderr.strip().splitlines()[-1]}")
    built.parent.mkdir(exist_ok=True)
    built.touch()
    return folder


def main(args: argparse.Namespace) -> int:
    folder = worktree(args.base)
    args.peers = args.backends = []
    rows = []
    with Pool(roots={"base": folder, "base again": folder}) as pool:
        check_roots(pool, folder)
        print(f"{'case':58} {'this':>10} {'base':>10}  {'base/this':>9}  noise band     verdict")
        for name in args.suites:
            options = options_of(args, name)
            for case in wanted(suite(name), options):
                row = compare(pool, name, case, options)
                rows.append(row)
                print(line(f"{suite(name).title(case)}", row), flush=True)
    print(summary(rows, args.base))
    return 0


def check_roots(pool: Pool, folder: Path) -> None:
    """Make sure that each process measures the package that it is to measure."""
    for name in SYSTEMS:
        found, expected = pool.worker(name).ask("where")["root"], str(ROOT if name == "this" else folder)
        if os.path.realpath(found) != os.path.realpath(expected):
            raise UsageError(f"{name}: fused_resnet was imported from {found}, expected {expected}")


def compare(pool: Pool, name: str, case: dict, options) -> dict:
    """Medians of this tree and the base, and the ratio of each round; or who failed, and why."""
    rounds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    try:
        for system in SYSTEMS:
            answer = pool.ask_worker(system, "prepare", suite(name).__name__, case, OURS, limit=options.limit)
            if found := wrong(answer):
                raise Failed(f"wrong: {found}")
        for number in range(options.rounds):
            for system in SYSTEMS[number % 3 :] + SYSTEMS[: number % 3]:
                answer = pool.running(system).ask("time", options.window, limit=options.limit)
                rounds[system].append(statistics.median(answer["times"]))
    except Failed as failure:
        return {"failed": f"{system}: {failure}"}
    finally:
        for worker in SYSTEMS:
            pool.release(worker)
    return verdict(rounds)


def verdict(rounds: dict[str, list[float]]) -> dict:
    """`ratio`: the base's time over this tree's, above 1 where this tree is faster; the median of the rounds.

    `noise`: what four of five rounds of the base with itself stay within, and its mirror image: which of the two was
    first is chance. A change is a ratio outside of it, on the same side as four of five of its own rounds.
    """
    ratios = [b / t for b, t in zip(rounds["base"], rounds["this"], strict=True)]
    again = [a / b for a, b in zip(rounds["base again"], rounds["base"], strict=True)]
    reach = percentiles([max(r, 1 / r) for r in again])[1]
    ratio, (low, high) = statistics.median(ratios), percentiles(ratios)
    word = "faster" if ratio > reach and low > 1 else "SLOWER" if ratio < 1 / reach and high < 1 else "within noise"
    return {
        "this_ms": statistics.median(rounds["this"]) * 1e3,
        "base_ms": statistics.median(rounds["base"]) * 1e3,
        "ratio": ratio,
        "noise": (1 / reach, reach),
        "verdict": word,
    }


def line(title: str, row: dict) -> str:
    if "failed" in row:
        return f"{title:58} FAILED {row['failed']}"
    band = f"{row['noise'][0]:.2f} to {row['noise'][1]:.2f}"
    return (
        f"{title:58} {row['this_ms']:7.4g} ms {row['base_ms']:7.4g} ms  {row['ratio']:9.3f}  {band:14} {row['verdict']}"
    )


def summary(rows: list[dict], base: str) -> str:
    counts = {word: sum(row.get("verdict") == word for row in rows) for word in ("faster", "SLOWER", "within noise")}
    failed = sum("failed" in row for row in rows)
    parts = [f"{number} {word.lower()}" for word, number in counts.items()] + ([f"{failed} failed"] if failed else [])
    return f"\nthis tree against {base}: {', '.join(parts)}"
