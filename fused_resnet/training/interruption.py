"""Ctrl-C, SIGTERM and a terminal that is gone, noted for the end of a step."""

import contextlib
import signal
from collections.abc import Iterator


class Interruption:
    """The signal that asks for the end of the run; None: none has come."""

    def __init__(self):
        self.signal: int | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator["Interruption"]:
        """Note signals instead of ending at once; a second Ctrl-C ends at once."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Stopped(Exception):
    """The run was asked to end, by the signal `number`; everything is saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number
