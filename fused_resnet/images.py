"""Image files as tensors, with the preprocessing of torchvision's ImageNet networks, written with PIL.

Shorter side to 256 (bilinear, antialiased), central crop of 224, the ImageNet mean and standard deviation. As there, a
rotation in the EXIF data is not applied.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class UnreadableImage(Exception):
    """A file that is no image, or a truncated one; the message names it."""

    def __init__(self, path: str | Path, reason: object):
        self.path, self.reason = str(path), f"cannot be read: {reason}"
        super().__init__(f"{self.path}: {self.reason}")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The files of `paths`, and those of its folders (and theirs) that are named like images, sorted.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not inside:
            raise FileNotFoundError(f"{path}: the folder holds no image ({', '.join(SUFFIXES)})")
        found += inside
    return found


def read_image(path: str | Path) -> Image.Image:
    """The image in RGB.

    Raises:
        UnreadableImage: with the file's name and the reason.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders of damaged files raise nearly everything
        reason = "not an image that PIL knows" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UnreadableImage(path, reason) from error


def shorter_side(size: int) -> int:
    """The shorter side that an image is given before a crop of `size` is cut out: torchvision's 256 of 224."""
    return size * 256 // 224


def resize(image: Image.Image, shorter: int) -> Image.Image:
    """The image with its shorter side `shorter` pixels long, the longer one in proportion, rounded down."""
    width, height = image.size
    if width <= height:
        size = (shorter, int(shorter * height / width))
    else:
        size = (int(shorter * width / height), shorter)
    return image if size == (width, height) else image.resize(size, Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """[3, H, W] in fp32, from pixels of 0 to 1 less `mean` and divided by `std`."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@dataclass(frozen=True)
class Preprocessing:
    """Image to tensor: the shorter side to `shorter` pixels, crops of `size`, less `mean` and divided by `std`.

    Args:
        shorter: `shorter_side` of the size by default.
    """

    size: int = 224
    shorter: int | None = None
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def crop(self, image: Image.Image) -> Tensor:
        """The central crop, [3, size, size]."""
        image = self._resized(image)
        return self._tensor(image, *self._middle(image))

    def ten_crops(self, image: Image.Image) -> Tensor:
        """Four corners and the centre, of the image and of its mirror image, [10, 3, size, size].

        Krizhevsky et al. 2012, section 4.1.
        """
        image = self._resized(image)
        right, bottom = (side - self.size for side in image.size)
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), self._middle(image)]
        both = (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        return torch.stack([self._tensor(view, x, y) for view in both for x, y in corners])

    def _resized(self, image: Image.Image) -> Image.Image:
        return resize(image, shorter_side(self.size) if self.shorter is None else self.shorter)

    def _middle(self, image: Image.Image) -> tuple[int, int]:
        return tuple(round((side - self.size) / 2.0) for side in image.size)

    def _tensor(self, image: Image.Image, x: int, y: int) -> Tensor:
        return to_tensor(image.crop((x, y, x + self.size, y + self.size)), self.mean, self.std)


IMAGENET = Preprocessing()  # of torchvision's networks
