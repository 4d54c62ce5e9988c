"""`fused-resnet demo`: two photographs through ResNet-50, and a small ResNet trained on digits, fused beside plain."""

import contextlib
import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

from fused_resnet.files import write_atomically
from fused_resnet.images import Preprocessing
from fused_resnet.models import create_model
from fused_resnet.modules.unit import unfused
from fused_resnet.options import UsageError, calibrate
from fused_resnet.parity import VerifyReport, table
from fused_resnet.training.datasets import split_digits
from fused_resnet.verify import verify

GOAL = 0.95
SYSTEMS = ("eager", "fused")


@dataclass
class Outcome:
    """What the last table shows."""

    report: VerifyReport
    images_per_second: dict[int, dict[str, float]]  # batch -> system -> images/s
    seconds_to_ready: dict[str, float]
    losses: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    training_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.report.passed and min(self.accuracy.values()) > GOAL


def plain_or_fused(system: str) -> contextlib.AbstractContextManager:
    return unfused() if system == "eager" else contextlib.nullcontext()


def run(out: str, *, quick: bool = False, as_json: bool = False) -> int:
    """Run both parts, write `losses.png`, `parity.txt` and `demo.json` under `out`; return the exit code."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error}") from error
    stream = sys.stderr if as_json else sys.stdout
    with contextlib.redirect_stdout(stream):
        outcome = photographs(quick)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # layers this small gain nothing from more, and on a busy machine lose tenfold
        digits(outcome, epochs=4 if quick else 6)
        torch.set_num_threads(threads)
        draw(outcome, folder / "losses.png")
        write_atomically(folder / "parity.txt", f"{outcome.report}\n")
        found = as_dict(outcome)
        write_atomically(folder / "demo.json", json.dumps(found, indent=2) + "\n")
        print(f"\n{summary(outcome)}\nwritten: {folder}/losses.png, parity.txt, demo.json")
    if as_json:
        print(json.dumps(found, indent=2))
    return 0 if outcome.passed else 1


# --- part A: photographs ----------------------------------------------------------------------------------------------


def photographs(quick: bool) -> Outcome:
    """ResNet-50 on the two photographs that scikit-learn ships: parity, speed, time to the first result."""
    size = 96 if quick else 224
    print("A. ResNet-50 on two photographs (scikit-learn's china.jpg and flower.jpg)")
    print("   Its weights are random (seed 0), as no trained ones ship with this; running statistics from 3 passes.")
    torch.manual_seed(0)
    crop = Preprocessing(size).crop
    images = torch.stack([crop(Image.fromarray(photo)) for photo in load_sample_images().images])
    images = images.contiguous(memory_format=torch.channels_last)
    model = create_model("resnet50").to(memory_format=torch.channels_last)
    calibrate(model, torch.cat([images, images.flip(-1), images.flip(-2)]))
    ready, logits = {}, {}
    for system in SYSTEMS:
        fresh = copy.deepcopy(model)
        start = time.perf_counter()
        with torch.inference_mode(), plain_or_fused(system):
            logits[system] = fresh(images)
        ready[system] = time.perf_counter() - start
    gap = float((logits["fused"] - logits["eager"]).abs().max() / logits["eager"].abs().max())
    print(f"   largest difference of the logits, fused from eager: {gap:.1e} of the largest logit")
    # fp64 is slow: parity looks at the middle of the photographs.
    middle = F.interpolate(images, size=(64, 64), mode="area")
    report = verify(model, middle, progress=lambda jobs: tqdm(jobs, desc="   parity", unit="block"))
    print(f"   parity with plain PyTorch, block by block: {report.summary()}")
    speeds = {batch: throughput(model, images.repeat(batch // 2, 1, 1, 1), quick) for batch in (2, 16)}
    for batch, speed in speeds.items():
        print(f"   batch {batch:2}: " + ", ".join(f"{name} {value:.1f} images/s" for name, value in speed.items()))
    return Outcome(report, speeds, ready)


def throughput(model: nn.Module, images: Tensor, quick: bool) -> dict[str, float]:
    """Images a second: the median of runs in turn, so that a slow spell of the machine hits both, after a warm-up."""
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    end = time.perf_counter() + (3 if quick else 12)
    with torch.inference_mode():
        while time.perf_counter() < end or len(times["fused"]) < 4:
            for system in SYSTEMS:
                with plain_or_fused(system):
                    model(images)  # back to speed after the other system
                    start = time.perf_counter()
                    model(images)
                times[system].append(time.perf_counter() - start)
    return {system: len(images) / statistics.median(seconds[1:]) for system, seconds in times.items()}


# --- part B: digits ---------------------------------------------------------------------------------------------------


def digits(outcome: Outcome, epochs: int) -> None:
    """Train `cifar_resnet20` on the digits twice from the same seed, eager and fused, an epoch of each in turn."""
    print(f"\nB. A ResNet-20 (1 input channel) on scikit-learn's digits, {epochs} epochs of each from the same seed")
    (images, labels), (test_images, test_labels) = split_digits(16)
    torch.manual_seed(0)
    model = create_model("cifar_resnet20", in_channels=1, num_classes=10).to(memory_format=torch.channels_last)
    steps = epochs * -(-len(images) // 64)
    runs = {system: Training(copy.deepcopy(model), steps) for system in SYSTEMS}
    print(
        "   Rounding grows tenfold in a few steps: the curves part as those of two eager runs do that differ by 1e-7."
    )
    print("   epoch  loss eager  loss fused  accuracy eager  accuracy fused")
    for epoch in range(epochs):
        for system, training in runs.items():
            with plain_or_fused(system):
                training.epoch(images, labels, seed=epoch)
                training.test(test_images, test_labels)
        losses = [training.losses[-1] for training in runs.values()]
        scores = [training.accuracy for training in runs.values()]
        bar = "#" * round(20 * min(losses[1], 2.5) / 2.5)
        print(
            f"   {epoch + 1:5}  {losses[0]:10.4f}  {losses[1]:10.4f}  {scores[0]:14.2%}  {scores[1]:14.2%}  {bar}",
            flush=True,
        )
    for system, training in runs.items():
        outcome.losses[system], outcome.accuracy[system] = training.losses, training.accuracy
        outcome.training_seconds[system] = training.seconds


class Training:
    """One network on its way: SGD with Nesterov momentum, the learning rate one cosine, down to 0."""

    def __init__(self, model: nn.Module, steps: int):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []
        self.accuracy = 0.0
        self.seconds = 0.0

    def epoch(self, images: Tensor, labels: Tensor, seed: int) -> None:
        """One epoch in an order that `seed` decides; appends the mean loss."""
        start, total = time.perf_counter(), 0.0
        self.model.train()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        for part in order.split(64):
            loss = F.cross_entropy(self.model(images[part]), labels[part])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item() * len(part)
        self.losses.append(total / len(images))
        self.seconds += time.perf_counter() - start

    def test(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        with torch.inference_mode():
            self.accuracy = float((self.model(images).argmax(1) == labels).float().mean())


# --- results ----------------------------------------------------------------------------------------------------------


def draw(outcome: Outcome, path: Path) -> None:
    """Both loss curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120)
    for (system, losses), style in zip(outcome.losses.items(), ("o-", "x--"), strict=True):
        label = f"{system}: accuracy {outcome.accuracy[system]:.2%}"
        axes.plot(range(1, len(losses) + 1), losses, style, label=label, markersize=8, linewidth=2)
    axes.set(xlabel="epoch", ylabel="training loss (cross entropy)", yscale="log")
    axes.set_title("ResNet-20 on scikit-learn's digits, same seed")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def summary(outcome: Outcome) -> str:
    """The one table at the end."""
    rows = [
        (f"images/s, batch {batch}", *(f"{speed[s]:.1f}" for s in SYSTEMS), f"{speed['fused'] / speed['eager']:.2f}x")
        for batch, speed in outcome.images_per_second.items()
    ]
    for name, values in (
        ("seconds to ready", outcome.seconds_to_ready),
        ("training seconds", outcome.training_seconds),
    ):
        rows.append((name, *(f"{values[s]:.2f}" for s in SYSTEMS), f"{values['eager'] / values['fused']:.2f}x"))
    accuracy = outcome.accuracy
    goal = "ok" if min(accuracy.values()) > GOAL else f"FAILED: {GOAL:.0%} or less"
    rows.append(("test accuracy", *(f"{accuracy[s]:.2%}" for s in SYSTEMS), goal))
    rows.append(("parity", "", f"{len(outcome.report.rows)} tensors", "ok" if outcome.report.passed else "FAILED"))
    return "\n".join(table(("", *SYSTEMS, "fused is"), rows, right={1, 2, 3}))


def as_dict(outcome: Outcome) -> dict:
    return {
        "passed": outcome.passed,
        "parity": outcome.report.summary(),
        "images_per_second": {str(batch): speed for batch, speed in outcome.images_per_second.items()},
        "seconds_to_ready": outcome.seconds_to_ready,
        "training_seconds": outcome.training_seconds,
        "losses": outcome.losses,
        "accuracy": outcome.accuracy,
    }
