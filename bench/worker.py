"""A process that prepares and times one system, so that a crash costs one row and no system disturbs another.

Started by `bench.pool` as `python -m bench.worker FD`; it answers requests on that file descriptor until it is closed.
"""

import contextlib
import importlib
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

BENCH_ROOT = Path(__file__).resolve().parent.parent


class Server:
    """Holds one prepared case at a time."""

    def __init__(self):
        self._ready = self._clock = None

    def prepare(self, suite: str, case: dict, system: str) -> dict:
        """Build the case of a suite (a module); return what is known before it is timed."""
        self._ready = importlib.import_module(suite).prepare(case, system)
        return {"error": self._ready.error, "limit": self._ready.limit, **self._ready.numbers}

    def values(self, suite: str, case: dict, system: str) -> dict:
        """What a suite without a clock finds."""
        return importlib.import_module(suite).values(case, system)

    def time(self, window: float) -> dict:
        """Time the prepared case for `window` seconds."""
        import torch

        from bench.timing import clock, measure

        with contextlib.nullcontext() if self._ready.gradients else torch.inference_mode():
            if self._clock is None:
                self._clock = clock(self._ready.call, self._ready.device, network=self._ready.network)
            return {"times": measure(self._clock, window), "timed_by": self._clock.how}

    def ceilings(self, device: str, dtype: str, window: float) -> dict:
        from bench.ceilings import measure_ceilings

        return measure_ceilings(device, dtype, window)

    def where(self) -> dict:
        """The folder that fused_resnet was imported from."""
        import fused_resnet

        return {"root": str(Path(fused_resnet.__file__).resolve().parent.parent)}

    def release(self) -> dict:
        """Let go of the case and of what is kept for it."""
        import gc

        import torch

        import fused_resnet as fr

        self._ready = self._clock = None
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        fr.empty_cache()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}


def serve(connection: Connection) -> None:
    server = Server()
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(server, name)(*arguments)
        except Exception as error:
            traceback.print_exc()
            answer = {"raised": f"{type(error).__name__}: {str(error).strip()}"}
        connection.send(answer)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's: it ends this process by closing the pipe
        signal.signal(number, signal.SIG_IGN)
    descriptor, *root = sys.argv[1:]
    if root:  # another checkout's fused_resnet, beside this checkout's bench
        sys.path[:] = [root[0], *(p for p in sys.path if Path(p or ".").resolve() != BENCH_ROOT)]
    serve(Connection(int(descriptor)))


if __name__ == "__main__":
    main()
