"""`fused-resnet train` on real images: what is read, how it is changed, and that networks learn from it."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_arguments import arguments
from train_calls import call, checkpoint, different, summary
from training_data import CIFAR10_CLASSES, made_cifar10, make_cifar10, make_image_folder

from fused_resnet.training.data import _unless_gone, make_data
from fused_resnet.training.sampler import EpochSampler, batch_sizes, seed_of

pytest.importorskip("torchvision.transforms.v2")
pytest.importorskip("sklearn")

POLICIES = ("ra", "ta_wide", "augmix", "imagenet", "cifar10")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("photographs"), train=40, val=12, size=48)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    path = make_cifar10(tmp_path_factory.mktemp("cifar10"), images_per_batch=40)
    with made_cifar10(path):
        yield path


def of_folder(photographs, folder, *argv) -> int:
    small = ("--model", "cifar_resnet20", "--size", 32, "--batch-size", 20, "--epochs", 1, "--threads", 1)
    return call("--data", photographs, "--output", folder, *small, "--workers", 0, *argv)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
    common = ("--epochs", 6, "--batch-size", 64, "--threads", 1, "--output", tmp_path)
    assert call("--model", "cifar_resnet20", "--dataset", "digits", *common) == 0
    found = summary(tmp_path)
    assert found["best_top1"] > 0.97
    assert found["seconds"] < 120
    assert found["waited"] < 0.1


def test_photographs_are_learnt_whatever_the_workers(photographs, tmp_path):
    """Negatives of the crops are no part of it: the two photographs differ in their colours."""
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        assert of_folder(photographs, folder, "--epochs", 3, "--lr", "0.05", "--workers", workers) == 0
    assert not different(checkpoint(tmp_path / "2", "model.pth"), checkpoint(tmp_path / "0", "model.pth"))
    found = summary(tmp_path / "0")
    assert found["best_top1"] >= 0.9
    assert [row["val_top1"] for row in found["history"]] == [r["val_top1"] for r in summary(tmp_path / "2")["history"]]


def test_cifar10_is_learnt(cifar10, tmp_path):
    argv = ("--data", cifar10, "--dataset", "cifar10", "--classes", "frog", "airplane", "--workers", 0)
    small = ("--model", "cifar_resnet20", "--batch-size", 20, "--epochs", 4, "--lr", "0.05", "--threads", 1)
    assert call(*argv, *small, "--output", tmp_path) == 0
    about = checkpoint(tmp_path)["about"]
    assert about["classes"] == ["frog", "airplane"]
    assert about["model_options"] == {"num_classes": 2, "in_channels": 3}
    assert summary(tmp_path)["best_top1"] >= 0.9


# --- classes and sizes ------------------------------------------------------------------------------------------------


def test_classes_of_cifar10_in_the_order_given(cifar10):
    data = make_data(arguments("--data", cifar10, "--dataset", "cifar10", "--classes", "bird", "airplane"))
    every = make_data(arguments("--data", cifar10, "--dataset", "cifar10"))
    assert every.classes == list(CIFAR10_CLASSES)
    assert data.classes == ["bird", "airplane"]
    numbers = {CIFAR10_CLASSES.index("bird"): 0, CIFAR10_CLASSES.index("airplane"): 1}
    for part in ("train", "val"):
        labels = [label for _, label in getattr(every, part).source]
        wanted = [numbers[label] for label in labels if label in numbers]
        assert [label for _, label in getattr(data, part).source] == wanted


def test_classes_of_a_folder_in_the_order_given(tmp_path):
    path = make_image_folder(tmp_path, classes=("a", "b", "c"), train=2, val=1, size=32)
    data = make_data(arguments("--data", path, "--classes", "c", "a"))
    assert data.classes == ["c", "a"]
    assert {(name.split("/")[-2], label) for name, label in data.train.source.samples} == {("c", 0), ("a", 1)}
    assert len(data.train) == 4


def test_ten_crops_are_averaged(photographs, tmp_path):
    """Ten views of an image, of which the first five are crops and the others their mirror images."""
    argv = ("--data", photographs, "--size", 32, "--val-resize", 40, "--val-tencrop")
    batch = make_data(arguments(*argv)).val.__getitems__([(0, 0), (0, 1)])
    assert batch.images.shape == (2, 10, 3, 32, 32)
    assert torch.equal(batch.images[:, 5:].flip(-1)[:, 4], batch.images[:, 4])  # the centre
    assert of_folder(photographs, tmp_path, "--val-tencrop") == 0


def test_sizes_of_training_and_validation(photographs):
    data = make_data(arguments("--data", photographs, "--size", 24, "--val-size", 32, "--val-resize", 36))
    assert data.train.__getitems__([(0, 0)]).images.shape == (1, 3, 24, 24)
    assert data.val.__getitems__([(0, 0)]).images.shape == (1, 3, 32, 32)


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_auto_augment_changes_the_images(photographs, policy):
    keys = [(0, index) for index in range(0, 80, 5)]
    plain = make_data(arguments("--data", photographs, "--size", 32)).train.__getitems__(keys)
    changed = make_data(arguments("--data", photographs, "--size", 32, "--auto-augment", policy))
    found = changed.train.__getitems__(keys)
    assert found.images.shape == plain.images.shape
    assert torch.isfinite(found.images).all()
    assert not torch.equal(found.images, plain.images)


@pytest.mark.parametrize(
    "argv",
    [("--auto-augment", "ta_wide", "--random-erase", "0.5"), ("--mixup", "0.2"), ("--cutmix", "1"),
     ("--mixup", "0.2", "--cutmix", "1")],
    ids=" ".join,
)  # fmt: skip
def test_augmented_runs_repeat_themselves(photographs, tmp_path, argv):
    for name in "ab":
        assert of_folder(photographs, tmp_path / name, *argv) == 0
    assert of_folder(photographs, tmp_path / "plain") == 0
    a, b, plain = (checkpoint(tmp_path / name)["model"] for name in ("a", "b", "plain"))
    assert not different(a, b)
    assert different(a, plain)


def test_random_erase_fills_a_part_with_zeros(photographs):
    found = make_data(arguments("--data", photographs, "--size", 32, "--random-erase", 1)).train
    images = found.__getitems__([(0, index) for index in range(8)]).images
    erased = (images == 0).all(1).flatten(1).float().mean(1)
    assert ((erased > 0.01) & (erased < 0.4)).all()


@pytest.mark.parametrize("dataset", ["photographs", "digits"])
def test_an_image_is_changed_by_seed_epoch_and_index_alone(photographs, dataset):
    """Not by what was drawn before, nor by the images beside it."""
    argv = ("--data", photographs) if dataset == "photographs" else ("--dataset", "digits")
    argv = (*argv, "--size", 32, "--random-erase", 1)

    def image(epoch, index, *others, seed=0):
        train = make_data(arguments(*argv, "--seed", seed)).train
        torch.rand(random.randrange(10))
        random.random()
        return train.__getitems__([*others, (epoch, index)]).images[-1]

    first = image(3, 5)
    assert torch.equal(image(3, 5, (0, 1), (3, 2)), first)
    for other in (image(4, 5), image(3, 5, seed=1)):
        assert not torch.equal(other, first)


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "told"), [(BrokenPipeError(), False), (EOFError(), False), (OSError("full"), True)])
def test_a_worker_whose_process_was_killed_says_nothing(error, told, capsys):
    _unless_gone(type(error), error, None)
    assert capsys.readouterr().err == (f"OSError: {error}\n" if told else "")


# --- the order of images ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_each_image_is_seen_once_an_epoch(data):
    """Broken off at any batches, and gone on with by any number of processes and with other batches."""
    images = data.draw(st.integers(2, 300), "images")
    seed, epoch = data.draw(st.integers(0, 9), "seed"), data.draw(st.integers(0, 99), "epoch")
    seen, found = 0, []
    while seen < images:
        world = data.draw(st.integers(1, 4), "world")
        batch_size = data.draw(st.integers(2 * world, 64), "batch_size")
        parts = []
        for rank in range(world):
            sampler = EpochSampler(images, batch_size, rank=rank, world=world, seed=seed)
            sampler.start(epoch, seen)
            parts.append(list(sampler))
        stop = data.draw(st.integers(1, len(sampler)), "batches until it is broken off")
        sizes = sampler.sizes()[:stop]
        for size, *of_ranks in zip(sizes, *parts, strict=False):
            batch = [key for of_rank in of_ranks for key in of_rank]
            assert len(batch) == size
            if size >= world:
                assert all(of_ranks)  # no process is without an image
            found += batch
        seen += sum(sizes)
    assert sorted(found) == [(epoch, index) for index in range(images)]
    whole = EpochSampler(images, 64, seed=seed)
    whole.start(epoch)
    assert [index for _, index in found] == whole.order()


@given(images=st.integers(0, 5000), batch_size=st.integers(2, 300))
def test_no_batch_is_small_beside_others(images, batch_size):
    sizes = list(batch_sizes(images, batch_size))
    assert sum(sizes) == images
    assert all(size == batch_size for size in sizes[:-2])
    if len(sizes) > 1:
        assert min(sizes) >= batch_size // 2
        assert max(sizes) <= batch_size


def test_orders_differ_by_epoch_and_seed():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = EpochSampler(50, 10, seed=seed)
        sampler.start(epoch)
        orders.append(tuple(sampler.order()))
    assert len(set(orders)) == 3
    assert len({seed_of(0, 1), seed_of(1, 0), seed_of("0", 1), seed_of(0, 10), seed_of(0, 1, 0)}) == 5
