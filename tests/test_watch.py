"""What a graphed network compares at every call: nothing that PyTorch counts, replaces or moves escapes it."""

import copy

import pytest
import torch
from networks import batch_norms
from problems import image, randomised
from test_inference import transpose_weight
from test_state import CHANGES, data_in_place_then_eval, new_eps
from test_verify import small
from torch import nn

import fused_resnet as fr
from fused_resnet.watch import Watch

NOT_TENSORS = (data_in_place_then_eval, new_eps)  # what `fr.graph` says that it does not notice


def one_statistic(model, x):
    batch_norms(model)[-1].running_var.mul_(2)


def one_statistic_in_inference_mode(model, x):
    with torch.inference_mode():
        batch_norms(model)[-1].running_var.mul_(2)


def another_buffer(model, x):
    batch_norms(model)[0].running_mean = torch.zeros(8)


def another_module(model, x):
    model.fc = nn.Linear(8, 5)


def a_module_fewer(model, x):
    model.dropout = None


def a_module_more(model, x):
    model.after = nn.ReLU()


def filled_list(model, x):
    model.later.append(nn.ReLU())


def a_bias_more(model, x):
    model.conv1.bias = nn.Parameter(torch.zeros(8))


def parametrised(model, x):
    nn.utils.parametrizations.weight_norm(model.fc)


def loaded_by_assignment(model, x):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def to_bfloat16(model, x):
    model.bfloat16()


def transposed(model, x):
    transpose_weight(nn.ModuleDict({"conv": model.basic.conv1}))


MORE = [one_statistic, one_statistic_in_inference_mode, another_buffer, another_module,
        a_module_fewer, a_module_more, filled_list, a_bias_more, parametrised, loaded_by_assignment, to_bfloat16,
        transposed]  # fmt: skip


def watched():
    model = randomised(small())
    model.later = nn.ModuleList()
    return model.eval()


@pytest.mark.parametrize(
    "change", [*[change for change in CHANGES if change not in NOT_TENSORS], *MORE], ids=lambda f: f.__name__
)
def test_watch_notices(change):
    model, x = watched(), image(2, 3, 12, 12)
    watch = Watch(model)
    with torch.no_grad():
        change(model, x)
    assert not watch.same()
    assert Watch(model).same()


def calls(model, x):
    with torch.no_grad():
        model(x)
    model(x).sum().backward()


def mode_and_back(model, x):
    model.train()
    model.eval()


def counted_batch(model, x):
    for bn in batch_norms(model):
        bn.num_batches_tracked.add_(1)


def gradients_switched_off(model, x):
    model.requires_grad_(False)


def the_same_once_more(model, x):
    model.float().to("cpu")


@pytest.mark.parametrize(
    "nothing",
    [calls, mode_and_back, counted_batch, gradients_switched_off, the_same_once_more],
    ids=lambda f: f.__name__,
)
def test_watch_ignores(nothing):
    """What changes no output would cost a capture for nothing."""
    model = watched()
    watch = Watch(model)
    nothing(model, image(2, 3, 12, 12))
    assert watch.same()


def test_watch_replaced_memory_does_not_come_back():
    """The memory of a weight is held: freed, its address could be that of other contents."""
    module = nn.Linear(512, 512)
    watch = Watch(module)
    for _ in range(3):
        module.weight.data = module.weight.data * 2
        assert not watch.same()


def test_watch_training():
    model = watched()
    watch = Watch(model)
    assert not watch.training()
    model.dropout.train()
    assert watch.training()


def test_watch_refuses_inference_tensors():
    with torch.inference_mode():
        model = fr.BasicBlock(8, 8).eval()
    with pytest.raises(RuntimeError, match="BasicBlock has inference tensors"):
        Watch(model)
