"""A suite whose systems do what their case says: answer, raise, crash, hang, be wrong. Run in the bench's processes."""

import os
import signal
import time

from bench.floors import Cost
from bench.suites.common import Ready

TASKS = {None: "network"}


def cases(options):
    yield from CASES


def title(case) -> str:
    return case["name"]


def prepare(case, system) -> Ready:
    what = case.get(system, "answer")
    _do(what)
    error = {"wrong": 1.0, "nan": float("nan")}.get(what, 0.0)

    def call():
        if what.startswith("later "):
            _do(what.removeprefix("later "))
        time.sleep(1e-3)

    return Ready(call, "cpu", error=error, limit=0.5, numbers={"process": os.getpid()})


def _do(what: str) -> None:
    if what == "raise":
        raise RuntimeError("no such thing")
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        print("last words", flush=True)
        os._exit(3)
    if what == "hang":
        time.sleep(60)


def cost(case) -> Cost:
    return Cost(((2e6, 1e6),))


def images(case) -> int:
    return 4


CASES = [
    {"name": "one", "dtype": "fp32", "eager": "crash", "eager-nchw": "raise", "compile": "wrong"},
    {"name": "two", "dtype": "fp32", "eager": "later crash", "eager-nchw": "exit", "compile": "nan"},
    {"name": "three", "dtype": "fp32"},
]
