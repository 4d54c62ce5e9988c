"""Optimizers and learning rates of `fused-resnet train`: closed forms, resuming, and which parameters decay."""

import io
import math
import warnings

import pytest
import torch
from tolerances import tolerance
from torch import nn
from train_arguments import arguments

import fused_resnet as fr
from fused_resnet.options import UsageError
from fused_resnet.training.optimisation import make_optimizer, make_scheduler

STEPS = 10  # of an epoch


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pair(*argv, steps: int = STEPS, model: nn.Module | None = None):
    """A model, its optimizer and its scheduler."""
    model = model or nn.Linear(3, 2)
    args = arguments(*argv)
    optimizer = make_optimizer(model, args)
    return model, optimizer, make_scheduler(optimizer, args, steps)


def rates(*argv, epochs: int, steps: int = STEPS) -> list[float]:
    """The learning rate that each step of a run is made with, and the one after the last."""
    _, optimizer, scheduler = pair(*argv, "--epochs", epochs, steps=steps)
    found = []
    for _ in range(epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr()[0] == found[-1]
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def assert_rates(found: list[float], expected) -> None:
    """`expected(step)` is the closed form."""
    bound = tolerance("learning_rate") * max(found)
    wrong = [(step, rate, expected(step)) for step, rate in enumerate(found) if not abs(rate - expected(step)) <= bound]
    assert not wrong, wrong[:3]


def warm(step: int, warmup: int, factor: float, lr: float) -> float:
    return lr * (factor + (1 - factor) * step / warmup)


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_cosine(min_lr):
    found = rates("--lr", 0.4, "--min-lr", min_lr, epochs=20)
    assert_rates(found, lambda step: min_lr + (0.4 - min_lr) * (1 + math.cos(math.pi * step / 200)) / 2)
    assert found[0] == 0.4


def test_cosine_after_warm_up():
    def expected(step):
        if step < 30:
            return warm(step, 30, 0.01, 0.5)
        return 0.5 * (1 + math.cos(math.pi * (step - 30) / 170)) / 2

    found = rates("--lr", 0.5, "--warmup-epochs", 3, epochs=20)
    assert_rates(found, expected)
    assert found[30] == 0.5


@pytest.mark.parametrize("warmup", [0, 2])
def test_constant(warmup):
    argv = "--lr", 0.3, "--scheduler", "constant", "--warmup-epochs", warmup, "--warmup-factor", "1/3"
    found = rates(*argv, epochs=6)
    assert_rates(found, lambda step: warm(step, 20, 1 / 3, 0.3) if step < 10 * warmup else 0.3)
    assert set(found[10 * warmup :]) == {0.3}


@pytest.mark.parametrize("warmup", [0, 2])
def test_exponential(warmup):
    begin = 10 * warmup
    found = rates("--scheduler", "exponential", "--lr-gamma", 0.9, "--warmup-epochs", warmup, epochs=6)
    assert_rates(
        found, lambda step: warm(step, begin, 0.01, 0.1) if step < begin else 0.1 * 0.9 ** ((step - begin) / STEPS)
    )


@pytest.mark.parametrize("warmup", [0, 2, 3, 5])
def test_step_counts_from_the_start_of_the_run(warmup):
    argv = "--scheduler", "step", "--lr-step-size", 3, "--lr-gamma", 0.5, "--warmup-epochs", warmup
    begin = 10 * warmup
    found = rates(*argv, epochs=10)
    assert_rates(found, lambda step: warm(step, begin, 0.01, 0.1) if step < begin else 0.1 * 0.5 ** (step // 30))


@pytest.mark.parametrize("warmup", [0, 1, 4, 6])
def test_multistep_counts_from_the_start_of_the_run(warmup):
    argv = "--scheduler", "multistep", "--lr-milestones", 4, 7, "--warmup-epochs", warmup
    begin = 10 * warmup
    found = rates(*argv, epochs=9)
    assert_rates(
        found,
        lambda step: warm(step, begin, 0.01, 0.1) if step < begin else 0.1 * 0.1 ** ((step >= 40) + (step >= 70)),
    )


@pytest.mark.parametrize("warmup", [0, 1])
def test_cifar_schedule_divides_at_epoch_82(warmup):
    argv = "--scheduler", "multistep", "--lr-milestones", 82, 123, "--warmup-epochs", warmup, "--warmup-factor", 0.1
    found = rates(*argv, epochs=164, steps=391)
    changes = [step for step in range(1, len(found)) if found[step] < found[step - 1]]
    assert changes == [82 * 391, 123 * 391]
    assert_rates([found[391], found[changes[0]], found[changes[1]]], lambda index: 0.1 ** (index + 1))
    assert found[0] == pytest.approx(0.01 if warmup else 0.1)


def test_both_groups_follow():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    _, optimizer, scheduler = pair("--norm-weight-decay", 0, "--warmup-epochs", 1, "--epochs", 3, model=model)
    for _ in range(30):
        assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"]
        optimizer.step()
        scheduler.step()


# --- resuming ---------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "cosine": ["--min-lr", "0.001"],
    "step": ["--lr-step-size", "2"],
    "multistep": ["--lr-milestones", "2", "3"],
    "exponential": [],
    "constant": [],
}


def train(model, optimizer, scheduler, first: int, last: int) -> list[float]:
    found = []
    for step in range(first, last):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("middle", [0, 1, 9, 10, 11, 20, 25])
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("scheduler", sorted(SCHEDULES))
@pytest.mark.parametrize("opt", ["nesterov", "adamw"])
def test_resume_goes_on_with_the_same_bits(opt, scheduler, warmup, middle):
    argv = ["--opt", opt, "--scheduler", scheduler, *SCHEDULES[scheduler], "--warmup-epochs", warmup, "--epochs", 4]
    torch.manual_seed(1)
    straight = pair(*argv)
    torch.manual_seed(1)
    before = pair(*argv)
    expected = train(*straight, 0, 40)
    assert train(*before, 0, middle) == expected[:middle]
    file = io.BytesIO()
    torch.save([part.state_dict() for part in before], file)
    file.seek(0)
    after = pair(*argv)
    for part, state in zip(after, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(*after, middle, 40) == expected[middle:]
    for found, wanted in zip(after[0].parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(found, wanted)


# --- parameters and their decay ---------------------------------------------------------------------------------------


class Norms(nn.Module):
    """A module of every kind, some of them the package's own."""

    def __init__(self):
        super().__init__()
        self.fused = fr.ConvBNAct2d(3, 8, 3)
        self.bn_act = fr.BNAct2d(8)
        self.sync = nn.SyncBatchNorm(8)
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.fc = nn.Linear(8, 2)


def decays(model: nn.Module, *argv) -> dict[str, float]:
    """The weight decay of each parameter that the optimizer has."""
    optimizer = make_optimizer(model, arguments(*argv))
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_norms_decay_apart():
    found = decays(Norms(), "--weight-decay", 0.5, "--norm-weight-decay", 0)
    assert {name for name, decay in found.items() if decay == 0.5} == {"fused.conv.weight", "fc.weight", "fc.bias"}
    norms = {"fused.bn", "bn_act", "sync", "group", "layer", "rms", "instance"}
    assert {name.rpartition(".")[0] for name, decay in found.items() if decay == 0} == norms


def test_without_a_decay_of_their_own_norms_decay_as_the_others():
    model = Norms()
    found = decays(model, "--weight-decay", 0.5)
    assert found == {name: 0.5 for name, _ in model.named_parameters()}


@pytest.mark.parametrize("extra", [[], ["--norm-weight-decay", "0"]])
def test_only_what_is_trained(extra):
    model = fr.create_model("cifar_resnet20")
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    assert set(decays(model, *extra)) == {"fc.weight", "fc.bias"}


def test_shared_parameters_are_in_one_group_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    model[2].weight = model[1].weight
    optimizer = make_optimizer(model, arguments("--norm-weight-decay", 0))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]


def test_nothing_to_train():
    with pytest.raises(UsageError, match="--freeze leaves no parameter to train"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), arguments())


@pytest.mark.parametrize(
    ("opt", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
        ("nesterov", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999)}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999)}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8, "alpha": 0.9, "eps": 0.0316}),
    ],
)
def test_optimizers(opt, kind, options):
    argv = "--opt", opt, "--lr", 0.25, "--momentum", 0.8, "--weight-decay", 0.125
    optimizer = make_optimizer(nn.Linear(2, 2), arguments(*argv))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in options} == options
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
