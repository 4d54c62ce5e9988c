"""Outputs in kept memory: used again when nobody holds them, never before, and given back when asked."""

import gc
import io
import threading

import pytest
import torch

import fused_resnet as fr
from fused_resnet.backends.cpu import extension_missing


@pytest.fixture
def megabytes():
    """A function that returns a fresh output of so many MB."""
    if extension_missing():
        pytest.skip(extension_missing())
    one = torch.ones(16)

    def make(count, value=1.0):
        x = torch.full((count, 16, 128, 128), value).contiguous(memory_format=torch.channels_last)
        return fr.ops.scale_act(x, one, 0 * one, act="none")

    gc.collect()
    fr.empty_cache()
    return make


def test_memory_of_a_dead_output_is_used_again(megabytes):
    y = megabytes(3)
    del y
    assert fr.empty_cache() >= 3 << 20
    assert fr.empty_cache() == 0
    y = megabytes(3)
    address = y.data_ptr()
    view = y[1:]
    del y
    assert megabytes(3).data_ptr() != address  # the view holds it
    assert (view == 1).all()
    del view
    assert megabytes(3).data_ptr() == address  # of those that are idle, the last


def test_living_outputs_never_share_memory(megabytes):
    random, alive = torch.Generator().manual_seed(0), []
    for step in range(200):
        count = int(torch.randint(1, 6, (), generator=random))
        alive.append((megabytes(count, float(step)), float(step)))
        if len(alive) > 8:
            alive.pop(int(torch.randint(0, len(alive), (), generator=random)))
    assert all((y == value).all() for y, value in alive)


def test_outputs_on_many_threads(megabytes):
    wrong = []

    def work(value):
        for _ in range(30):
            y = megabytes(1 + value % 3, float(value))
            if not (y == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_output_is_an_ordinary_tensor(megabytes):
    y = megabytes(2)
    truth = y.clone()
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), truth)
    array = y.numpy()
    y.add_(1)
    assert array.flat[0] == 2
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, truth + 1)


def test_no_more_is_kept_than_was_in_use_at_once(megabytes):
    for count in range(4, 20):  # each too large for the memory of those before it
        megabytes(count)
    assert fr.empty_cache() <= 20 << 20
    del megabytes
    assert fr.empty_cache() == 0
