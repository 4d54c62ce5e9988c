"""Preprocessing is torchvision's, ten crops are averaged, and files that cannot be read are named."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image
from tolerances import tolerance
from torch import nn

import fused_resnet as fr
from fused_resnet.files import write_atomically
from fused_resnet.images import Preprocessing, UnreadableImage, find_images, read_image
from fused_resnet.predict import Prediction, as_csv, as_json, as_table, predict, probabilities

SMALL = Preprocessing(32)
SIZES = [(300, 200), (200, 301), (64, 64), (257, 640), (255, 254)]


def photo(size=(300, 200), seed=0) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        photo(seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        fr.ConvBNAct2d(3, 6, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7)
    ).eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocess_equals_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms")
    image = photo(size)
    theirs = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    assert torch.equal(Preprocessing().crop(image), theirs(image))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ten_crop_equals_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms")
    image = photo(size)
    crops = transforms.TenCrop(224)(transforms.Resize(256)(image))
    theirs = torch.stack([transforms.functional.to_tensor(crop) for crop in crops])
    theirs = transforms.functional.normalize(theirs, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.equal(Preprocessing().ten_crops(image), theirs)


def test_tencrop_averages_the_softmax_of_ten_crops(folder, model):
    net = model
    crops = SMALL.ten_crops(photo())
    assert crops.shape == (10, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack([net(crop[None]).softmax(-1)[0] for crop in crops]).mean(0)
    torch.testing.assert_close(probabilities(net, crops[None])[0], expected)
    (found,) = predict(net, [folder / "0.png"], tencrop=True, preprocessing=SMALL, topk=7)
    assert [i for i, _, _ in found.classes] == expected.argsort(descending=True).tolist()
    assert sum(p for _, _, p in found.classes) == pytest.approx(1.0, abs=tolerance("probabilities"))


def test_predict_does_not_depend_on_the_batch_size(folder, model):
    files = find_images([folder])
    assert [f.name for f in files] == ["0.png", "1.png", "2.png"]
    one, all_at_once = (list(predict(model, files, preprocessing=SMALL, batch_size=n)) for n in (1, 16))
    assert [p.path for p in one] == [str(f) for f in files]
    for a, b in zip(one, all_at_once, strict=True):
        assert [i for i, _, _ in a.classes] == [i for i, _, _ in b.classes]
        values = ([v for *_, v in prediction.classes] for prediction in (a, b))
        np.testing.assert_allclose(*values, rtol=tolerance("probabilities"))


def test_predict_takes_grey_palette_and_transparent_images(tmp_path, model):
    for mode in ("L", "P", "RGBA", "1"):
        photo((40, 40)).convert(mode).save(tmp_path / f"{mode}.png")
    assert len(list(predict(model, find_images([tmp_path]), preprocessing=SMALL))) == 4


def test_predict_passes_over_what_cannot_be_read_and_names_it(folder, model):
    whole = (folder / "0.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").write_text("this is no image")
    errors = []
    found = list(predict(model, find_images([folder]), preprocessing=SMALL, errors=errors))
    assert [p.path for p in found] == [str(folder / "0.png")]
    assert len(errors) == 2
    assert "1.png: cannot be read: " in errors[0]
    assert "truncated" in errors[0]
    assert "2.png: cannot be read: not an image" in errors[1]
    with pytest.raises(UnreadableImage, match=r"2\.png"):
        read_image(folder / "2.png")


def test_find_images_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="the folder holds no image"):
        find_images([tmp_path])


def test_predict_refuses_too_few_labels(folder, model):
    with pytest.raises(ValueError, match="2 labels for a model of 7 classes"):
        list(predict(model, find_images([folder]), preprocessing=SMALL, labels=["a", "b"]))


def test_outputs_say_the_same():
    found = [Prediction("a, b.png", [(3, "cat", 0.75), (1, "dog", 0.25)])]
    assert as_csv(found).splitlines() == [
        "path,rank,index,label,probability",
        '"a, b.png",1,3,cat,0.75',
        '"a, b.png",2,1,dog,0.25',
    ]
    assert '"label": "cat"' in as_json(found, ["x"], {"model": "m"})
    assert as_table(found).splitlines()[2].split() == ["a,", "b.png", "1", "3", "cat", "0.7500"]


def test_output_file_is_whole_or_absent(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    write_atomically(target, "first")
    assert target.read_text() == "first"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "second")
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]
