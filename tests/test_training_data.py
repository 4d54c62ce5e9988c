"""torchvision reads the small data sets that the tests of training make, and a network can learn from them."""

import pickle

import numpy as np
import pytest
import torch
from training_data import CIFAR10_CLASSES, CIFAR10_FOLDER, made_cifar10, make_cifar10, make_image_folder

datasets = pytest.importorskip("torchvision.datasets")
pytest.importorskip("sklearn")


def test_torchvision_reads_the_image_folder(tmp_path):
    make_image_folder(tmp_path / "a", train=5, val=2, size=48)
    make_image_folder(tmp_path / "b", train=5, val=2, size=48)
    for part, count in (("train", 10), ("val", 4)):
        found, again = (datasets.ImageFolder(tmp_path / name / part) for name in "ab")
        assert found.classes == ["china", "flower"]
        assert [label for _, label in found] == [0] * (count // 2) + [1] * (count // 2)
        assert {image.size for image, _ in found} == {(48, 48)}
        pixels = [image.tobytes() for image, _ in found]
        assert len(set(pixels)) == count
        assert pixels == [image.tobytes() for image, _ in again]


def test_more_classes_than_photographs(tmp_path):
    make_image_folder(tmp_path, classes="abcd", train=1, val=1, size=32)
    assert datasets.ImageFolder(tmp_path / "val").classes == list("abcd")
    with pytest.raises(ValueError, match="at most 4"):
        make_image_folder(tmp_path / "more", classes="abcde")


def test_torchvision_reads_the_cifar10(tmp_path):
    make_cifar10(tmp_path, images_per_batch=20)
    with pytest.raises(RuntimeError, match="corrupted"):
        datasets.CIFAR10(tmp_path)
    with made_cifar10(tmp_path):
        train, test = datasets.CIFAR10(tmp_path), datasets.CIFAR10(tmp_path, train=False)
    with pytest.raises(RuntimeError, match="corrupted"):
        datasets.CIFAR10(tmp_path)
    assert (len(train), len(test)) == (100, 20)
    assert tuple(train.classes) == CIFAR10_CLASSES
    assert sorted(test.targets) == sorted(list(range(10)) * 2)
    with open(tmp_path / CIFAR10_FOLDER / "data_batch_1", "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    assert set(batch) == {b"batch_label", b"labels", b"data", b"filenames"}
    assert batch[b"data"].shape == (20, 3072)
    image, label = train[3]
    assert label == batch[b"labels"][3]
    assert batch[b"filenames"][3].decode().startswith(CIFAR10_CLASSES[label])
    assert np.array_equal(np.asarray(image)[..., 2].ravel(), batch[b"data"][3, 2048:])  # the plane of blue


@pytest.mark.parametrize(("learnable", "low", "high"), [(True, 0.95, 1.0), (False, 0.0, 0.3)])
def test_classes_of_the_cifar10_can_be_learnt(tmp_path, one_thread, learnable, low, high):
    make_cifar10(tmp_path, learnable=learnable)
    with made_cifar10(tmp_path):
        train, test = datasets.CIFAR10(tmp_path), datasets.CIFAR10(tmp_path, train=False)
    # The class whose mean colour is nearest.
    x, y = (torch.from_numpy(part.data).float().mean((1, 2)) for part in (train, test))
    labels = torch.tensor(train.targets)
    means = torch.stack([x[labels == label].mean(0) for label in range(10)])
    found = torch.cdist(y, means).argmin(1)
    assert low <= (found == torch.tensor(test.targets)).float().mean() <= high
