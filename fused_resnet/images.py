"""Image files as tensors, with the preprocessing of torchvision's ImageNet networks, written with PIL.

Shorter side to 256 (bilinear, antialiased), central crop of 224, the ImageNet mean and standard deviation. As there, a
rotation in the EXIF data is not applied.
"""

from collections.abc import Iterable
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


def resize(image: Image.Image, shorter: int) -> Image.Image:
    """The image with its shorter side `shorter` pixels long, the longer one in proportion, rounded down."""
    width, height = image.size
    if width <= height:
        size = (shorter, int(shorter * height / width))
    else:
        size = (int(shorter * width / height), shorter)
    return image if size == (width, height) else image.resize(size, Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] in fp32, normalised with the ImageNet mean and standard deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def preprocess(image: Image.Image, size: int = 224) -> Tensor:
    """The central crop of `size` pixels, [3, size, size], after the shorter side was brought to size * 256 / 224."""
    image = resize(image, size * 256 // 224)
    left, top = (round((side - size) / 2.0) for side in image.size)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def ten_crop(image: Image.Image, size: int = 224) -> Tensor:
    """Four corners and the centre, of the image and of its mirror image, [10, 3, size, size].

    Krizhevsky et al. 2012, section 4.1.
    """
    image = resize(image, size * 256 // 224)
    width, height = image.size
    middle = (round((width - size) / 2.0), round((height - size) / 2.0))
    corners = [(0, 0), (width - size, 0), (0, height - size), (width - size, height - size), middle]
    both = (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return torch.stack([to_tensor(view.crop((x, y, x + size, y + size))) for view in both for x, y in corners])
