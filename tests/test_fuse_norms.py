"""Fused networks with frozen norms, and with norms that have an activation, of other libraries; and several threads."""

import threading

import pytest
import torch
from networks import seeded
from small_networks import Net, assert_as, assert_near, images, net, training_step
from torch import nn

import fused_resnet as fr


def test_fuse_frozen_norms_of_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="FrozenBatchNorm2d is torchvision's")
    model = seeded(torchvision.models.resnet50, norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=5).double()
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.weight.uniform_(0.2, 0.5)
    fused = fr.fuse(model)
    assert fr.fusion_report(fused).skipped == []
    for training in (True, False):
        assert_as(fused.train(training), model.train(training), images(2, (32, 32)))


@pytest.mark.parametrize("name", ["efficientnet_b0", "darknet17"])
def test_fuse_norms_with_an_activation_of_timm(name):
    timm = pytest.importorskip("timm", reason="BatchNormAct2d is timm's")
    model = seeded(lambda: timm.create_model(name, num_classes=5)).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused, x = fr.fuse(model), images(2, (40, 40))
    assert isinstance(next(m for m in fused.modules() if type(m).__name__ == "BatchNormAct2d"), nn.BatchNorm2d)
    for training in (True, False):
        found, expected = (training_step(m.train(training), x) for m in (fused, model))
        assert_near(found, expected)
    model.load_state_dict(fr.unfuse(fused).state_dict())
    with torch.no_grad():
        assert torch.equal(fused.eval()(x), model.eval()(x))


def test_fuse_while_others_run():
    """Eight threads run a fused network and a plain one; the ninth fuses others."""
    fused, plain = fr.fuse(net().eval()), net().eval()
    with torch.no_grad():
        expected, bits = plain(images()), fused(images())
    stop, wrong, done = threading.Event(), [], []

    def work(i: int):
        try:
            count = 0
            with torch.no_grad():
                while not stop.is_set() or count < 3:
                    mine, eager = fused(images()), plain(images())
                    if not (torch.equal(mine, bits) and torch.equal(eager, expected)):
                        raise AssertionError(f"thread {i}: another result")
                    count += 1
            done.append(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    try:
        made = [fr.fuse(seeded(Net, seed=i).double()) for i in range(6)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]
    assert len(done) == 8
    for i, model in enumerate(made):
        assert_as(model, seeded(Net, seed=i).double())
