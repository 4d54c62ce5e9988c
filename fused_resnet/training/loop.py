"""The training of one network: epochs of steps, each of which can be the last, and be gone on from."""

import argparse
import contextlib
import math
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.training import network, snapshot
from fused_resnet.training.agreement import Asked, Wishes
from fused_resnet.training.augment import make_mix
from fused_resnet.training.checkpoint import Checkpoints
from fused_resnet.training.data import Batch, Data, make_loader, validation_loader
from fused_resnet.training.errors import TrainingError
from fused_resnet.training.evaluate import Score, evaluate
from fused_resnet.training.interruption import Interruption, Stopped
from fused_resnet.training.live import Standing
from fused_resnet.training.log import Log
from fused_resnet.training.meter import Meter
from fused_resnet.training.optimisation import make_optimizer, make_scheduler
from fused_resnet.training.precision import autocast, make_scaler, memory_format
from fused_resnet.training.processes import Processes
from fused_resnet.training.sampler import EpochSampler, seed_of
from fused_resnet.training.state import broadcast_buffers
from fused_resnet.training.summary import top1
from fused_resnet.training.wrapping import averaged, wrapped

SCORES = ("loss", "top1", "top5")


class Training:
    """A network with its optimizer and all else that a step changes.

    Args:
        args: the options of `fused-resnet train`, checked.
        resumed: what a checkpoint holds, or None.

    Everything random follows from the seed, the epoch, the step and the process, seeded anew before each use. So a
    checkpoint needs no generator's state, and what follows after it is what would have followed without it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: Data,
        processes: Processes,
        log: Log,
        checkpoints: Checkpoints,
        interruption: Interruption,
        resumed: dict | None = None,
    ):
        self.args, self.data, self.processes, self.log = args, data, processes, log
        self.checkpoints, self.interruption = checkpoints, interruption
        self.device = processes.device
        self.memory_format = memory_format(args)
        self.epoch, self.seen, self.step = 0, 0, 0
        self.history = log.history
        self.best: dict | None = None
        self.unreadable: dict[str, str] = {}
        self.meter = Meter(self.device)

        torch.manual_seed(seed_of(args.seed, "weights"))
        model, said = processes.agreed(lambda: network.make_network(args, data, weights=resumed is None))
        for line in said:
            log.say(line)
        # FSDP divides contiguous weights alone; the kernels pack them anyway.
        model = model.to(self.device, memory_format=torch.contiguous_format if args.fsdp else self.memory_format)
        self.average = averaged(model, args) if args.model_ema else None
        self.model = wrapped(model, self.average, args, processes)
        self.module = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model

        place = {"rank": processes.rank, "world": processes.world}
        self.sampler = EpochSampler(len(data.train), args.batch_size, **place, seed=args.seed)
        self.loader = make_loader(data.train, self.sampler, workers=data.readers(args), device=self.device)
        self.val_loader = validation_loader(data, args, processes)

        self.optimizer = make_optimizer(self.module, args)
        batches = len(self.sampler)
        self.scheduler = make_scheduler(self.optimizer, args, math.ceil(batches / args.grad_accum))
        self.scaler = make_scaler(args, self.device)
        self.mix = make_mix(args, len(data.classes))
        if resumed is not None:
            snapshot.restore(self, resumed)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    # --- epochs -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last epoch.

        Raises:
            Stopped: a signal asked for the end; everything is saved.
            TrainingError: the run cannot go on.
        """
        ended = self.epoch >= self.args.epochs and self.best is None
        if self.processes.tell(self.step > 0 and (ended or not self.checkpoints.all())):
            self._settle_in(ended)
        while self.epoch < self.args.epochs:
            with self.meter.running():
                self._train_epoch()
            self._end_epoch()

    def _settle_in(self, ended: bool) -> None:
        """Another folder than the checkpoint's is one to go on from, too; an ended run has a best network."""
        if ended:
            self.best = {"top1": top1(self.history[-1]), "epoch": self.history[-1]["epoch"]}
        self.save(best=ended)

    def _train_epoch(self) -> None:
        self.model.train()
        self.sampler.start(self.epoch, self.seen)
        sizes, accumulate = self.sampler.sizes(), self.args.grad_accum
        batches = iter(self.loader)
        for first in range(0, len(sizes), accumulate):
            of_step = sizes[first : first + accumulate]
            wishes = self._step(batches, of_step, self._ask())
            self.seen += sum(of_step)
            self._show()
            self._obey(wishes)

    def _end_epoch(self) -> None:
        """Validate, note the epoch, save."""
        self._obey_now()
        self.log.phase("validating")
        scores = self._validate()
        figures = self.meter.figures(self.processes)
        for others in self.processes.gather(self.unreadable):
            self._note(others)
        score = scores["ema"] or scores["model"]
        best = self.best is None or score.top1 > self.best["top1"]
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            **figures,
            **{f"val_{name}": getattr(scores["model"], name) for name in SCORES},
            **{f"ema_{name}": getattr(scores["ema"], name, None) for name in SCORES},
            "unreadable": len(self.unreadable),
        }
        self.epoch, self.seen = self.epoch + 1, 0
        self.meter = Meter(self.device)
        if best:
            self.best = {"top1": score.top1, "epoch": row["epoch"]}
        self.log.epoch(row)  # into the history, too
        self.save(best=best)

    def _validate(self) -> dict[str, Score | None]:
        modules = {"model": self.module, "ema": self.average}
        if self.processes.world > 1:
            broadcast_buffers(*(module for module in modules.values() if module is not None))
        how = {"loader": self.val_loader, "args": self.args, "processes": self.processes, "between": self._obey_now}
        scores = {name: module and evaluate(module, **how) for name, module in modules.items()}
        for each in filter(None, scores.values()):
            self._note(each.unreadable)
        return scores

    # --- a step -------------------------------------------------------------------------------------------------------

    def _step(self, batches: Any, sizes: list[int], asked: Asked) -> Wishes:
        """One step of the optimizer, with the gradients of batches of `sizes` images over all processes.

        Returns:
            what is wished, waited for before anything waits for a GPU: a process that has died is found out here.
        """
        images, world = sum(sizes), self.processes.world
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(len(sizes)):
            with self.meter.waiting():
                batch = next(batches)
            self._note(batch.unreadable)
            torch.manual_seed(seed_of(self.args.seed, "step", self.step, number, self.processes.rank))
            last = number == len(sizes) - 1
            with self._gradients_exchanged(last):
                # The mean over all processes' images, however unevenly they are divided: the processes' gradients are
                # averaged.
                self._backward(batch, share=world / images)
        wishes = asked.wait()
        self.meter.lr = self.optimizer.param_groups[0]["lr"]
        self.scaler.unscale_(self.optimizer)
        if self.args.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():
            if self.scaler.is_enabled():  # the very first step may be left out, for gradients that overflow
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.step += 1
        return wishes

    def _backward(self, batch: Batch, share: float) -> None:
        mixed = self.mix is not None and not batch.blank
        batch = batch.to(self.device, self.memory_format)
        images, labels = batch.images, batch.labels
        if mixed:
            images, labels = self.mix(images, labels)
        with autocast(self.args, self.device):
            logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.args.label_smoothing)
        self.scaler.scale(loss * share).backward()
        self.meter.add(self.step, loss.detach(), logits.detach(), labels)

    def _gradients_exchanged(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged in the last backward pass of a step alone."""
        if self.args.fsdp:
            self.module.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last or self.processes.world == 1 else self.model.no_sync()

    def _show(self) -> None:
        meter, world = self.meter, self.processes.world
        meter.check()
        standing = Standing(
            epoch=self.epoch + 1,
            images=self.seen,
            of_images=self.sampler.images,
            step=self.step,
            images_per_second=meter.speed() * world,
            loss=None if math.isnan(meter.loss) else meter.loss,
            top1=None if math.isnan(meter.top1) else meter.top1,
            lr=meter.lr,
            waited=meter.waited_share(),
        )
        self.log.batch(standing)

    def _note(self, unreadable: dict[str, str]) -> None:
        """Name images that cannot be read, once, and end the run where there are too many."""
        for name, reason in unreadable.items():
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.log.say(f"left out: {name}: {reason}")
        images = len(self.data.train) + len(self.data.val)
        if len(self.unreadable) > self.args.max_unreadable * images:
            raise TrainingError(
                f"{len(self.unreadable)} of {images} images cannot be read, more than --max-unreadable "
                f"{self.args.max_unreadable:g} of them"
            )

    # --- what the processes agree on ----------------------------------------------------------------------------------

    def _ask(self) -> Asked:
        """Ask all processes what they wish, and tell them what this one does."""
        minutes = (time.monotonic() - self.saved_at) / 60
        due = self.processes.first and minutes >= self.args.save_minutes
        return Asked(self.processes, Wishes(self.interruption.signal, due, self.meter.check()))

    def _obey(self, wishes: Wishes) -> None:
        """Do what one of the processes wishes, or the options."""
        self._check_failed(wishes)
        every = self.args.save_steps
        if self.step > self.saved_step and (wishes.signal or wishes.save or (every and self.step % every == 0)):
            self.save()
        if wishes.signal:
            raise Stopped(wishes.signal)

    def _obey_now(self) -> None:
        """The same between two steps, where there is no step to hide the question behind."""
        self.meter.read()
        self._obey(self._ask().wait())

    def _check_failed(self, wishes: Wishes) -> None:
        if wishes.failed is not None:
            raise TrainingError(
                f"the loss of step {wishes.failed + 1} is not a number or infinite. Last good checkpoint: "
                f"{self.checkpoints.last_good()}; a new run can begin from it: --pretrained, another --output, and a "
                "smaller --lr, --clip-grad or --warmup-epochs"
            )

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, and the best network where this one is it."""
        self.meter.read()
        self._check_failed(self._ask().wait())
        self.log.phase("saving")
        with self.meter.running(False):
            snapshot.write(self, best)
        self.saved_at, self.saved_step = time.monotonic(), self.step
