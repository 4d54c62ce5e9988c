"""Several processes train as one does; one that dies ends the others; and any number of them goes on."""

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tolerances import tolerance
from train_arguments import arguments
from train_runs import Run, assert_same_state, environments, final, several, train, wait_for_checkpoint

import fused_resnet as fr
from fused_resnet.training.processes import joined
from fused_resnet.training.wrapping import wrapped

pytest.importorskip("sklearn")

# So few steps that rounding has not grown yet, of images without ties, where a rounding would change the sign of many
# activations at once. Batch norm's statistics are those of all images: with its own a process is another network.
FEW = (
    "--dataset", "synthetic", "--size", 16, "--batch-size", 250, "--epochs", 1, "--save-steps", 1, "--lr", "0.01",
    "--sync-bn", "--seed", 3,
)  # fmt: skip
STEPS = 5  # 1,024 images: three batches, then the rest in two halves, each of which two processes share unevenly


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(folder: Path, world: int, *argv) -> list[str]:
    """A run in `world` processes to its end; what they said."""
    runs = several(folder, world, free_port(), *argv)
    codes = [run.wait() for run in runs]
    said = [run.said() for run in runs]
    assert codes == [0] * world, "\n".join(said)
    return said


@pytest.fixture(scope="module")
def run_of_one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run = train(folder, *FEW)
    assert run.wait() == 0, run.said()
    return folder


@pytest.fixture(scope="module")
def alone(run_of_one) -> dict:
    assert final(run_of_one)["step"] == STEPS
    return final(run_of_one)


@pytest.fixture(scope="module")
def rounding(tmp_path_factory, alone) -> float:
    """How far two runs of one process come apart that differ in their rounding alone: by another backend."""
    folder = tmp_path_factory.mktemp("rounding") / "run"
    run = train(folder, *FEW, "--backend", "reference")
    assert run.wait() == 0, run.said()
    return apart(final(folder), alone)


def apart(found: dict, expected: dict) -> float:
    """The distance of the weights, as a share of their norm."""
    ours, theirs = (
        torch.cat([v.double().flatten() for k, v in state["model"].items() if "running" not in k])
        for state in (found, expected)
    )
    return float((ours - theirs).norm() / theirs.norm())


def check(found: dict, alone: dict, rounding: float) -> None:
    assert found["step"] == alone["step"]
    assert 0 < apart(found, alone) <= tolerance("two_times") * rounding
    row, expected = found["history"][0], alone["history"][0]
    for name in ("train_loss", "val_loss"):
        assert row[name] == pytest.approx(expected[name], rel=tolerance("loss_of_processes"))


def test_statistics_of_each_are_another_network(tmp_path, alone, rounding):
    """What the other tests would find, were the processes' images not taken together."""
    together(tmp_path / "run", 2, *FEW, "--no-sync-bn")
    assert apart(final(tmp_path / "run"), alone) > 10 * tolerance("two_times") * rounding


@pytest.mark.parametrize(("world", "kind"), [(2, ()), (4, ()), (2, ("--fsdp",)), (2, ("--grad-checkpointing",))])
def test_as_one_process(world, kind, tmp_path, alone, rounding):
    together(tmp_path / "run", world, *FEW, *kind)
    check(final(tmp_path / "run"), alone, rounding)


@pytest.mark.parametrize("world", [1, 4])
def test_two_go_on_as_others(world, tmp_path, alone, rounding):
    folder = tmp_path / "run"
    runs = several(folder, 2, free_port(), *FEW)
    wait_for_checkpoint(folder)
    for run in runs:
        run.kill()
    stood = final(folder)
    assert stood["seen"] > 0, "it had ended before it was stopped"
    if world == 1:
        run = train(folder, *FEW, "--resume", "auto")
        assert run.wait() == 0, run.said()
    else:
        together(folder, world, *FEW, "--resume", "auto")
    check(final(folder), alone, rounding)


def test_what_was_divided_goes_on_whole(tmp_path, alone, rounding):
    """A checkpoint of FSDP is one like any other."""
    folder = tmp_path / "run"
    runs = several(folder, 2, free_port(), *FEW, "--fsdp", "--model-ema")
    wait_for_checkpoint(folder)
    for run in runs:
        run.kill()
    assert final(folder)["seen"] > 0, "it had ended before it was stopped"
    run = Run("train", "--resume", folder, "--no-fsdp", "--threads", 1, output=tmp_path / "said.txt")
    assert run.wait() == 0, run.said()
    check(final(folder), alone, rounding)


@pytest.mark.slow
def test_killed_at_random_moments_with_two_processes(tmp_path):
    """Their statistics are their own here: those of the first are kept, and the others' never count."""
    options = ("--epochs", 3, "--save-steps", 2, "--model-ema", "--mixup", "0.2")
    begun = time.monotonic()
    together(tmp_path / "whole", 2, *options)
    seconds = time.monotonic() - begun
    chance, folder = random.Random(0), tmp_path / "run"
    killed = 0
    for attempt in range(6):
        runs = several(folder, 2, free_port(), *options, "--resume", "auto")
        time.sleep(seconds * chance.uniform(0.1, 0.3))
        runs[attempt % 2].kill()
        killed += runs[attempt % 2].wait() == -signal.SIGKILL
        assert runs[1 - attempt % 2].wait(60) in (0, 1)
    together(folder, 2, *options, "--resume", "auto")
    assert killed >= 4
    assert_same_state(final(folder), final(tmp_path / "whole"))


def test_one_that_dies_ends_the_others(tmp_path):
    folder = tmp_path / "run"
    runs = several(folder, 2, free_port(), "--epochs", 50, "--save-steps", 1)
    wait_for_checkpoint(folder)
    runs[1].kill()
    died = time.monotonic()
    assert runs[0].wait(60) == 1
    assert time.monotonic() - died < 60
    said = runs[0].said()
    assert "process 0 of 2: another process has ended" in said
    assert "--resume auto" in said
    assert "Traceback" not in said
    assert final(folder)["step"] >= 1


def test_terminated_together(tmp_path):
    """SIGTERM to one process is seen by all; everything is saved."""
    folder = tmp_path / "run"
    runs = several(folder, 2, free_port(), "--epochs", 50)
    while "parameters, on" not in runs[0].said():
        time.sleep(0.02)
    time.sleep(1)
    runs[1].signal(signal.SIGTERM)
    assert [run.wait() for run in runs] == [143, 143]
    assert f"SIGTERM: saved step {final(folder)['step']}" in runs[0].said()
    assert runs[1].said() == ""


def test_processes_that_see_other_checkpoints_do_not_train(tmp_path):
    """As on two machines without a common folder: they would be other networks, averaged."""
    folders = [tmp_path / "run", tmp_path / "elsewhere"]
    run = train(folders[0], *FEW)
    wait_for_checkpoint(folders[0])
    run.kill()
    own = [("--output", folder) for folder in folders]
    runs = several(tmp_path / "both", 2, free_port(), *FEW, "--resume", "auto", own=own)
    assert [run.wait() for run in runs] == [2, 2]
    assert "process 1 has another step to go on from than process 0: 0, not" in runs[0].said()


def test_what_one_process_misses_is_said(tmp_path):
    runs = several(tmp_path / "run", 2, free_port(), *FEW, own=[(), ("--dataset", "digits", "--classes", "0", "x")])
    assert [run.wait() for run in runs] == [2, 2]
    assert "process 1: --classes: digits has no class x" in runs[0].said()


def test_weights_that_one_process_misses(tmp_path):
    """As a file that only one of two machines has."""
    homes = [tmp_path / "home0", tmp_path / "home1"]
    for home in homes:
        home.mkdir()
    torch.save(fr.create_model("cifar_resnet20", in_channels=1, num_classes=10).state_dict(), homes[0] / "weights.pth")
    runs = [
        train(
            tmp_path / "run", "--epochs", 1, "--pretrained", "~/weights.pth",
            said=f"-{rank}", environment={**environment, "HOME": str(homes[rank])},
        )
        for rank, environment in enumerate(environments(2, free_port()))
    ]  # fmt: skip
    assert [run.wait() for run in runs] == [2, 2]
    assert "process 1: --pretrained ~/weights.pth: " in runs[0].said()
    assert str(homes[1]) in runs[0].said()
    assert runs[1].said() == ""


def test_eval_says_what_one_process_misses(tmp_path, run_of_one):
    own = [(), ("--dataset", "imagefolder", "--data", tmp_path / "nothing")]
    runs = [
        Run("eval", run_of_one, *own[rank], output=tmp_path / f"{rank}.txt", environment=environment)
        for rank, environment in enumerate(environments(2, free_port()))
    ]
    assert [run.wait() for run in runs] == [2, 2]
    assert f"process 1: --data {tmp_path / 'nothing'}: no such folder" in runs[0].said()
    assert runs[1].said() == ""


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    """As a user starts it; the summary comes from one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = ["--dataset", "digits", "--model", "cifar_resnet20", "--size", "8", "--epochs", "1", "--json"]
    done = subprocess.run(
        [*command, "fused_resnet", "train", *options, "--output", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"best_top1"') == 1
    assert torch.load(tmp_path / "run" / "model.pth", weights_only=True)["fc.weight"].shape == (10, 64)


def test_gradients_are_exchanged_while_others_are_computed():
    """The first exchange begins before the gradient of the first layer is there."""
    options = arguments("--model", "resnet18", "--dataset", "digits", "--fsdp")
    order = []
    with joined(options) as processes:  # alone, but with a process group
        options.fsdp, processes.world = False, 2  # as with more processes, DDP is put around the network
        model = wrapped(fr.resnet18(num_classes=10), None, options, processes)

        def exchanged(_, bucket):
            order.append("exchange")
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, exchanged)
        model.module.conv1.weight.register_hook(lambda grad: order.append("first layer"))
        for _ in range(2):  # after the first step DDP divides the gradients by the order in which they come
            order.clear()
            model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert order.count("exchange") >= 2
    assert order.index("first layer") >= order.count("exchange") - 1
