"""What the processes of a run have to do together: end, save, or fail, once one of them wishes it."""

from typing import NamedTuple

from fused_resnet.training.processes import Processes

LATEST_STEP = 2**62


class Wishes(NamedTuple):
    """A signal that asks for the end; whether it is time to save; the first step whose loss was not finite."""

    signal: int | None
    save: bool
    failed: int | None


class Asked:
    """The wishes of all processes, on their way while something else is computed."""

    def __init__(self, processes: Processes, own: Wishes):
        # The largest of each is found: of steps that is the earliest, as it is the distance to a last one that is sent.
        failed = 0 if own.failed is None else LATEST_STEP - own.failed
        self._answer = processes.ask((own.signal or 0, int(own.save), failed))

    def wait(self) -> Wishes:
        signal, save, failed = self._answer.wait()
        return Wishes(signal or None, bool(save), LATEST_STEP - failed if failed else None)
