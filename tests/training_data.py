"""Small data sets for the tests of training, in the formats of real ones."""

import colorsys
import contextlib
import hashlib
import pickle
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FOLDER = "cifar-10-batches-py"


def make_image_folder(
    path: Path, classes: Sequence[str] = ("china", "flower"), train=40, val=12, size=96, seed=0
) -> Path:
    """`train/<class>/*.jpg` and `val/<class>/*.jpg`: crops of scikit-learn's two photographs, `size` pixels a side.

    A class has a photograph, the third and fourth its negative. Crops of training and validation may overlap.
    """
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    sources = (china, flower, 255 - china, 255 - flower)
    if len(classes) > len(sources):
        raise ValueError(f"expected at most {len(sources)} classes, got {len(classes)}")
    random = np.random.default_rng(seed)
    for name, photo in zip(classes, sources, strict=False):
        for part, count in (("train", train), ("val", val)):
            folder = Path(path) / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                _crop(photo, size, random).save(folder / f"{i:04}.jpg", quality=90)
    return Path(path)


def _crop(photo: np.ndarray, size: int, random: np.random.Generator) -> Image.Image:
    """A square of a random place and scale."""
    height, width = photo.shape[:2]
    side = int(random.integers(min(size, height // 2), height + 1))
    top, left = random.integers(height - side + 1), random.integers(width - side + 1)
    square = Image.fromarray(photo[top : top + side, left : left + side])
    return square.resize((size, size), Image.Resampling.BILINEAR)


def make_cifar10(path: Path, images_per_batch=100, seed=0, learnable=True) -> Path:
    """The files of CIFAR-10's archive for Python, unpacked, with few images; `path` is what torchvision calls root.

    Learnable: a class has a hue, which neither flips nor crops change; else labels say nothing of their images.
    torchvision reads them within `made_cifar10`.
    """
    folder = Path(path) / CIFAR10_FOLDER
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names, 1):
        labels = random.permutation(np.arange(images_per_batch) % 10)
        images = random.normal(128, 30, (images_per_batch, 3, 32, 32))
        if learnable:
            hues = [colorsys.hsv_to_rgb(label / 10, 0.6, 1.0) for label in labels]
            images += 160 * (np.array(hues)[:, :, None, None] - 0.7)
        label = "testing batch 1 of 1" if name == "test_batch" else f"training batch {number} of 5"
        batch = {
            "batch_label": label,
            "labels": labels.tolist(),
            "data": images.clip(0, 255).astype(np.uint8).reshape(images_per_batch, 3072),  # planes of R, G and B
            "filenames": [f"{CIFAR10_CLASSES[label]}_s_{i:06}.png" for i, label in enumerate(labels)],
        }
        _dump(batch, folder / name)
    meta = {"num_cases_per_batch": images_per_batch, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072}
    _dump(meta, folder / "batches.meta")
    return Path(path)


@contextlib.contextmanager
def made_cifar10(path: Path) -> Iterator[None]:
    """torchvision takes the files that `make_cifar10` made: it compares each with the MD5 of the real archive's."""
    from torchvision.datasets import CIFAR10

    def digest(name: str) -> str:
        return hashlib.md5((Path(path) / CIFAR10_FOLDER / name).read_bytes()).hexdigest()

    changed = {
        "train_list": [[name, digest(name)] for name, _ in CIFAR10.train_list],
        "test_list": [[name, digest(name)] for name, _ in CIFAR10.test_list],
        "meta": {**CIFAR10.meta, "md5": digest(CIFAR10.meta["filename"])},
    }
    with mock.patch.multiple(CIFAR10, **changed):
        yield


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes as the one string type of Python 2, as the archive has it.

    Its readers say what becomes of it: torchvision `encoding="latin1"`, the archive's own page `encoding="bytes"`.
    """

    def save_string(self, value: str | bytes) -> None:
        found = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(found)) + found)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def _dump(value: dict, path: Path) -> None:
    with open(path, "wb") as file:
        _Python2Pickler(file, protocol=2).dump(value)
