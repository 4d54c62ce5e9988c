"""`fused-resnet eval` counts what the network says of the images."""

import argparse
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from tolerances import tolerance
from train_arguments import arguments

import fused_resnet as fr
from fused_resnet.options import UsageError, calibrate
from fused_resnet.training import eval_command
from fused_resnet.training.checkpoint import Checkpoints, write
from fused_resnet.training.data import make_data

pytestmark = pytest.mark.usefixtures("one_thread")


def training_options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments()), "workers": 0, "batch_size": 64, **given})


def trained(folder, *, average: bool = False, **given):
    """A run's folder with a checkpoint of a network with random weights; the network and its data."""
    args = training_options(**given)
    data = make_data(args)
    about = {
        "model": "cifar_resnet20",
        "model_options": {"num_classes": len(data.classes), "in_channels": data.in_channels},
        "dataset": args.dataset,
        **data.about(),
        "args": {name: value for name, value in vars(args).items() if name != "random_erase"},  # of an older version
    }
    model, ema = (network(seed, data) for seed in (0, 1))
    kept = {"model": model.state_dict(), "ema": ema.state_dict() if average else None, "optimizer": {}}
    Checkpoints(folder, 1).save({"format": 1, "epoch": 1, "step": 3, "about": about, **kept})
    return (ema if average else model), data


def network(seed: int, data):
    kinds = {"num_classes": len(data.classes), "in_channels": data.in_channels}
    model = seeded(fr.create_model, seed, name="cifar_resnet20", **kinds)
    calibrate(model, torch.randn(8, data.in_channels, data.val_size, data.val_size))
    return model


def evaluated(capsys, *arguments) -> tuple[str, str]:
    parser = argparse.ArgumentParser(description="")
    eval_command.add_arguments(parser)
    assert eval_command.run(parser.parse_args(["--device", "cpu", *map(str, arguments)])) == 0
    return tuple(capsys.readouterr())


def scored(model, data) -> dict:
    """The same by plain PyTorch, over all images at once."""
    batch = data.val.__getitems__([(0, index) for index in range(len(data.val))])
    views = batch.images if batch.images.dim() == 5 else batch.images[:, None]
    with torch.no_grad():
        probabilities = model(views.flatten(0, 1)).softmax(-1).unflatten(0, views.shape[:2]).mean(1)
    hits = probabilities.topk(min(5, len(data.classes))).indices == batch.labels[:, None]
    return {
        "images": len(batch.labels),
        "loss": F.nll_loss(probabilities.log(), batch.labels).item(),
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
    }


def assert_same_score(found: dict, expected: dict) -> None:
    assert found["images"] == expected["images"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance("model_eval_fp32"))
    for name in ("top1", "top5"):
        assert found[name] == pytest.approx(expected[name], abs=1.5 / expected["images"])  # one image on the edge


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of three classes, one of which cannot be read."""
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(0, 256, (24, 30, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    (root / "val" / "bee" / "torn.png").write_bytes(b"\x89PNG no more")
    return root


@pytest.mark.parametrize("average", [False, True])
def test_digits(tmp_path, capsys, average):
    pytest.importorskip("sklearn")
    model, data = trained(tmp_path, dataset="digits", size=8, average=average)
    out, err = evaluated(capsys, tmp_path, "--json")
    found = json.loads(out)
    assert_same_score(found, scored(model, data))
    assert found["source"]["ema"] is average
    assert err == ""
    if average:
        other = json.loads(evaluated(capsys, tmp_path, "--no-ema", "--json")[0])
        assert_same_score(other, scored(network(0, data), data))


def test_synthetic(tmp_path, capsys):
    model, data = trained(tmp_path, dataset="synthetic", size=16, num_classes=4)
    out, _ = evaluated(capsys, tmp_path, "--batch-size", "7", "--json")
    assert_same_score(json.loads(out), scored(model, data))


@pytest.mark.parametrize("tencrop", [False, True])
def test_a_folder(tmp_path, capsys, photos, tencrop):
    classes = ["cat", "bee"]  # in another order than the folder's
    model, data = trained(tmp_path, data=str(photos), size=16, classes=classes)
    if tencrop:
        data = make_data(training_options(data=str(photos), size=16, classes=classes, val_tencrop=True))
    out, err = evaluated(capsys, tmp_path, "--json", *(["--tencrop"] if tencrop else []))
    found = json.loads(out)
    assert found["images"] == 8
    assert_same_score(found, scored(model, data))
    assert [path.rpartition("/")[2] for path in found["unreadable"]] == ["torn.png"]
    assert "torn.png" in err
    assert "1 of 9 images could not be read" in err


def test_validation_alone_is_read(tmp_path, capsys, photos):
    """A folder without train/ will do, and one whose training images are broken."""
    trained(tmp_path, data=str(photos), size=16)
    shutil.copytree(photos / "val", tmp_path / "new" / "val")
    here = json.loads(evaluated(capsys, tmp_path, "--json", "--data", str(tmp_path / "new"))[0])
    there = json.loads(evaluated(capsys, tmp_path, "--json")[0])
    assert (here["loss"], here["images"]) == (there["loss"], 12)


def test_the_table_says_the_same(tmp_path, capsys, photos):
    trained(tmp_path, data=str(photos), size=16)
    found = json.loads(evaluated(capsys, tmp_path, "--json")[0])
    said = evaluated(capsys, tmp_path)[0]
    assert f"{found['top1']:.2%}" in said
    assert f"{found['loss']:.4f}" in said
    assert f"12 of imagefolder {photos}" in said


def test_lower_precision_is_used_where_it_is_asked_for(tmp_path, capsys):
    trained(tmp_path, dataset="synthetic", size=16, num_classes=4)
    full, low = (json.loads(evaluated(capsys, tmp_path, "--json", *more)[0]) for more in ([], ["--amp"]))
    assert (full["precision"], low["precision"]) == ("fp32", "bf16")
    assert low["loss"] != full["loss"]
    assert low["loss"] == pytest.approx(full["loss"], rel=tolerance("loss_autocast"))


def test_other_data(tmp_path, capsys, photos):
    trained(tmp_path, dataset="synthetic", size=16, num_classes=3)
    with pytest.raises(UsageError, match="needs --data"):
        evaluated(capsys, tmp_path, "--dataset", "imagefolder")
    with pytest.raises(UsageError, match="has no class 0, 1, 2; it has ant, bee, cat"):
        evaluated(capsys, tmp_path, "--dataset", "imagefolder", "--data", photos)
    with pytest.raises(UsageError, match="no such folder"):
        evaluated(capsys, tmp_path, "--dataset", "imagefolder", "--data", tmp_path / "none")
    with pytest.raises(UsageError, match="--tencrop is for --dataset imagefolder"):
        evaluated(capsys, tmp_path, "--tencrop")
    with pytest.raises(UsageError, match="--backend"):
        evaluated(capsys, tmp_path, "--backend", "none")


def test_images_that_the_network_does_not_know(tmp_path, capsys):
    pytest.importorskip("sklearn")
    folder = tmp_path / "digits"
    folder.mkdir()
    _, data = trained(folder, dataset="digits", size=8)
    with pytest.raises(UsageError, match="images have 3 channels, the network takes 1"):
        evaluated(capsys, folder, "--dataset", "synthetic")
    state = torch.load(folder / "checkpoint-00000003.pth")
    state["about"]["mean"] = [0.5]
    write(tmp_path / "best.pth", {key: state[key] for key in ("format", "model", "about", "epoch", "step")})
    _, err = evaluated(capsys, tmp_path)
    assert "WARNING: images minus [0.3]" in err
    assert data.mean == [0.3]
