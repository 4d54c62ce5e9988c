"""The processes that systems run in, seen from outside."""

import os
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from pathlib import Path

from bench.record import ROOT

ANSWER_LIMIT = 60.0  # seconds that an answer may take where nothing else is said


class Failed(Exception):
    """A system did not do what it was asked; the text is the reason."""


class Worker:
    """One process. Every request has a time limit; after a crash or a late answer it is gone."""

    def __init__(self, environment: dict[str, str] | None = None, root: Path | None = None):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "bench.worker", str(theirs.fileno()), *([str(root)] if root else [])]
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        self._pipe = ours

    @property
    def alive(self) -> bool:
        return self._process.poll() is None and not self._pipe.closed

    def ask(self, request: str, *arguments, limit: float = ANSWER_LIMIT) -> dict:
        """Send a request and return its answer.

        Raises:
            Failed: an exception there, a crash, or no answer within `limit` seconds; with what is known of it.
        """
        try:
            self._pipe.send((request, arguments))
            if not self._pipe.poll(limit):
                self.close()
                raise Failed(f"no answer within {limit:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise Failed(self._last_words()) from error
        if "raised" in answer:
            raise Failed(answer["raised"])
        return answer

    def _last_words(self) -> str:
        """How the process ended, and the last line that it printed."""
        self._pipe.close()
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the process {how}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        self._pipe.close()
        try:
            self._process.wait(timeout=0.5 if self._process.poll() is None else None)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Pool:
    """A process for each system, started when it is first needed and again after it is lost.

    What compilers cache on disk goes to a folder of this run: the first time is a first time.
    """

    def __init__(self, roots: dict[str, Path] | None = None):
        self._workers: dict[str, Worker] = {}
        self._roots = roots or {}
        self._caches = tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)

    def environment(self, folder: str = "shared") -> dict[str, str]:
        base = Path(self._caches.name, folder)
        return {"TORCHINDUCTOR_CACHE_DIR": str(base / "inductor"), "TRITON_CACHE_DIR": str(base / "triton")}

    def worker(self, name: str) -> Worker:
        found = self._workers.get(name)
        if found is None or not found.alive:
            if found is not None:
                found.close()
            found = self._workers[name] = Worker(self.environment(), self._roots.get(name))
        return found

    def running(self, name: str) -> Worker:
        """The process that was prepared.

        Raises:
            Failed: it is gone.
        """
        found = self._workers.get(name)
        if found is None or not found.alive:
            raise Failed("the process is gone")
        return found

    def ask_worker(self, name: str, *request, limit: float) -> dict:
        """`worker(name).ask(*request)`; a process that fails is not used again: an error on a GPU may spoil all that it
        does after it.
        """
        try:
            return self.worker(name).ask(*request, limit=limit)
        except Failed:
            self.drop(name)
            raise

    def ask_fresh(self, *request, limit: float) -> dict:
        """The answer of a process of its own, with empty caches."""
        worker = Worker(self.environment(tempfile.mkdtemp(dir=self._caches.name)))
        try:
            return worker.ask(*request, limit=limit)
        finally:
            worker.close()

    def release(self, name: str) -> None:
        """Have the process let go of its case, where there is one."""
        try:
            self.running(name).ask("release")
        except Failed:
            self.drop(name)

    def drop(self, name: str) -> None:
        if name in self._workers:
            self._workers.pop(name).close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc) -> None:
        for worker in self._workers.values():
            worker.close()
        self._caches.cleanup()
