"""`fused-resnet train`: from the options to a run, and what ends it."""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

import torch

from fused_resnet.options import chosen_backend
from fused_resnet.training import resuming
from fused_resnet.training.checkpoint import Checkpoints
from fused_resnet.training.contradictions import check
from fused_resnet.training.data import Data
from fused_resnet.training.errors import TrainingError, explained
from fused_resnet.training.interruption import Interruption, Stopped
from fused_resnet.training.live import share
from fused_resnet.training.log import Log, Silent
from fused_resnet.training.loop import Training
from fused_resnet.training.preparing import prepare
from fused_resnet.training.processes import Processes, joined
from fused_resnet.training.state_file import read, write
from fused_resnet.training.trained import BEST


def run(args: argparse.Namespace) -> int:
    """`fused-resnet train`; return the exit code.

    0: trained to the end. 1: the run cannot go on. 130, 143, 129: Ctrl-C, SIGTERM and SIGHUP; everything is saved.
    """
    args = resuming.options_of(args)
    check(args)
    args.output = str(resuming.output_folder(args))
    _settle(args)
    again = joined(args, way_out="start again with --resume auto")
    with Interruption().watched() as interruption, chosen_backend(args), again as processes:
        try:
            return _train(args, processes, interruption)
        except (MemoryError, RuntimeError, ValueError) as error:
            meaning = explained(error, args)
            if meaning is None:
                raise
            good = Checkpoints(args.output).last_good()
            raise TrainingError(f"{meaning}. Last good checkpoint: {good}") from error


def _settle(args: argparse.Namespace) -> None:
    """What holds for the whole process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)


def _train(args: argparse.Namespace, processes: Processes, interruption: Interruption) -> int:
    with contextlib.ExitStack() as stack:
        prepared = prepare(args, processes, stack)
        step = prepared.resumed["step"] if prepared.resumed else 0
        history = prepared.resumed["history"] if prepared.resumed else []
        folder = Path(args.output)
        log = Log(folder, epochs=args.epochs, history=history, step=step) if processes.first else Silent(history)
        stack.callback(log.close)
        for message in prepared.messages:
            log.say(message)
        if args.amp and args.amp_dtype == "fp16" and processes.device.type == "cpu":
            log.say("WARNING: fp16 is slow on a CPU, many times slower than fp32; --amp-dtype bf16 is not")
        try:
            checkpoints = Checkpoints(folder, args.keep)
            training = Training(args, prepared.data, processes, log, checkpoints, interruption, prepared.resumed)
            log.say(_beginning(args, prepared.data, processes, training))
            training.run()
        except Stopped as stop:
            log.close()
            name = signal.Signals(stop.number).name
            log.say(f"{name}: saved step {training.step} in {folder}; --resume {folder} goes on")
            return 128 + stop.number
        if processes.first:
            _finish(args, prepared.data, log, training)
    return 0


def _beginning(args: argparse.Namespace, data: Data, processes: Processes, training: Training) -> str:
    parameters = sum(p.numel() for p in training.module.parameters())
    where = f"{processes.world} x {processes.device.type}" if processes.world > 1 else str(processes.device)
    return (
        f"{args.model}, {parameters:,} parameters, on {where}; {len(data.train):,} images to train with, "
        f"{len(data.val):,} to validate, {len(data.classes)} classes; into {args.output}"
    )


def _finish(args: argparse.Namespace, data: Data, log: Log, training: Training) -> None:
    folder = Path(args.output)
    best = read(folder / BEST)
    write(folder / "model.pth", best["model"])
    about = {
        "network": args.model,
        "data": f"{args.dataset}{f' {args.data}' if args.data else ''}, {len(data.classes)} classes",
        "unreadable": len(training.unreadable),
        "model.pth": f"the network of epoch {best['epoch']}, top-1 {share(best['top1'], decimals='.2f')}",
    }
    _print(log.finish(about, as_json=args.json), folder)


def _print(text: str, folder: Path) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # stdout is a file on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its exit
        raise TrainingError(
            f"the summary cannot be printed: {error.strerror}; the run has ended well, and is in {folder}"
        ) from error
