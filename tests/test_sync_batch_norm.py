"""SyncBatchNorm, DDP and FSDP2 in two and four processes beside one process with all images; fp64 throughout."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from networks import batch_norms, nonzero, relative
from tolerances import tolerance
from torch import nn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

from several_networks import images_and_labels, loss_of, network, work
from several_processes import MODULES, SHARES, SHARES_OF_NETWORK, WORLDS, batches, kinds_of, module_of, share, steps

import fused_resnet as fr
from fused_resnet.modules import BatchNorm2d, unit

names = pytest.mark.parametrize("name", MODULES)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, for both numbers of them: a start costs seconds, so that all is done in one."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=max(WORLDS))
    return {
        world: [torch.load(folder / f"{world}_{rank}.pt", weights_only=False) for rank in range(world)]
        for world in WORLDS
    }


@pytest.fixture(params=WORLDS, ids=lambda world: f"{world}_processes")
def ranks(request, found):
    return found[request.param]


def assert_same(found, truth, what):
    """Tensors beside those of one process; what is rounding in exact arithmetic is left out."""
    assert len(found) == len(truth), what
    for i in nonzero(truth):
        assert relative(found[i], truth[i]) < tolerance("model_fp64"), f"{what} {i}"


def assert_buffers(results, truth):
    """Every process has the running statistics, to the same bits, and the count of batches, of all images."""
    for result in results:
        assert_same(*([b.double() for b in buffers] for buffers in (result["buffers"], truth)), "buffer")
        assert all(torch.equal(a, b) for a, b in zip(result["buffers"], results[0]["buffers"], strict=True))


def assert_steps(results, truth):
    for i, (y, d_x) in enumerate(truth["images"]):
        assert_same([torch.cat([r["images"][i][0] for r in results])], [y], "output")
        assert_same([torch.cat([r["images"][i][1] for r in results])], [d_x], "gradient of x")
    parameters = [sum(grads) for grads in zip(*(r["parameters"] for r in results), strict=True)]
    assert_same(parameters, truth["parameters"], "gradient of parameter")
    assert_buffers(results, truth["buffers"])


def shares(table):
    return pytest.mark.parametrize("world_kind", table, ids=lambda pair: f"{pair[0]}_{pair[1]}")


@names
@shares(SHARES)
def test_modules_as_one_process(world_kind, name, found):
    world, kind = world_kind
    results = [result["modules"][name, kind] for result in found[world]]
    module = module_of(name)
    assert_steps(results, steps(module, batches(module)))
    norms, projected = len(batch_norms(module)), getattr(module, "downsample", None) is not None
    for result in results:
        assert len(result["groups"]) == 2  # of two batches: one operator each
        assert all(result["groups"])
        assert result["counts"] == (2 * norms, 2 * (norms - projected))


def test_subgroup(ranks):
    """Each pair of processes is one process with the images of both."""
    for first in range(0, len(ranks), 2):
        module, pair = module_of("basic"), range(first, first + 2)
        given = [
            tuple(torch.cat([share(t, kinds_of(len(ranks))[0], rank, len(ranks)) for rank in pair]) for t in batch)
            for batch in batches(module)
        ]
        assert_steps([ranks[rank]["subgroup"] for rank in pair], steps(module, given))


def test_eval_exchanges_nothing(ranks):
    assert all(all(found["eval"]) for found in ranks)


@pytest.fixture(scope="module")
def one_process():
    model = network()
    logits, loss = loss_of(model, *images_and_labels())
    loss.backward()
    return logits.detach(), [p.grad for p in model.parameters()], list(model.buffers())


@shares(SHARES_OF_NETWORK)
def test_ddp_as_one_process(world_kind, found, one_process):
    """ResNet-18 in DDP: logits, averaged gradients, running statistics; one collective a layer and direction."""
    world, kind = world_kind
    results = [result["ddp"][kind] for result in found[world]]
    logits, gradients, buffers = one_process
    assert_same([torch.cat([r["logits"] for r in results])], [logits], "logits")
    assert_same(results[0]["gradients"], gradients, "gradient of parameter")
    for result in results:
        assert len(result["groups"]) == 9  # the stem and eight blocks
        assert all(result["groups"])
        assert result["counts"] == (20, 17)  # the projections' three sums go with those of the norms beside them
    assert_buffers(results, buffers)


def test_fsdp_as_ddp(found):
    """ResNet-18 in FSDP2, plain batch norm: outputs of three steps and inferences, parameters and buffers."""
    for result in found[2]:
        assert result["fsdp"].keys() >= {"outputs of step 2", "parameters", "buffers"}
        for what, error in result["fsdp"].items():
            assert error < tolerance("model_fp64"), what


def test_fsdp_inference_between_steps(ranks):
    assert all(all(result["fsdp_inference"]) for result in ranks)


# --- the conversion ---------------------------------------------------------------------------------------------------


def test_conversion_keeps_the_activation_state_and_frozen_ones():
    module = nn.Sequential(fr.BNAct2d(8, eps=1e-3, momentum=0.3, act="silu"), fr.BasicBlock(8, 8), nn.BatchNorm1d(5))
    fr.freeze_batch_norm(module[1])
    shared = nn.ModuleList([module, module[0]])
    state, parameters = copy.deepcopy(module.state_dict()), list(module.parameters())
    module[0].bias.requires_grad_(False)
    assert fr.convert_sync_batchnorm(shared) is shared
    assert [type(m) for m in module] == [fr.SyncBNAct2d, fr.BasicBlock, nn.SyncBatchNorm]
    assert shared[1] is module[0]
    assert type(module[1].bn1) is BatchNorm2d
    assert (module[0].eps, module[0].momentum, module[0].act) == (1e-3, 0.3, "silu")
    assert "act='silu'" in repr(module)
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))  # an optimizer holds them
    module.train()
    assert not module[1].bn1.training


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_converted_without_other_processes(options, training):
    """The same bits, mode and count; also after a write through `.data`, which `eval()` makes seen."""
    bn = fr.BNAct2d(8, act="relu6", **options).train(training)
    converted = fr.convert_sync_batchnorm(copy.deepcopy(bn), None)
    assert converted.training is training
    x, residual = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    for _ in range(2):
        assert torch.equal(converted(x, residual), bn(x, residual))
        for module in (bn, converted):
            for p in module.parameters():
                p.data.mul_(1.5)
            module.train(training)
    assert all(torch.equal(a, b) for a, b in zip(converted.buffers(), bn.buffers(), strict=True))


def test_conversion_refuses_a_forward_of_its_own():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return -super().forward(x)

    module = nn.Sequential(fr.BNAct2d(8), Own(8))
    with pytest.raises(TypeError, match="convert_sync_batchnorm: 1 is a Own, whose own forward would be lost"):
        fr.convert_sync_batchnorm(module)
    assert type(module[0]) is fr.BNAct2d


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(nn.BatchNorm2d, True), (BatchNorm2d, True), (nn.SyncBatchNorm, True), (fr.BNAct2d, False),
     (fr.SyncBNAct2d, False), (nn.InstanceNorm2d, False)],
)  # fmt: skip
def test_plain_batch_norms(kind, plain):
    """Those that a convolution before them may take: they do nothing else."""
    assert unit.plain_batch_norm(kind(8)) is plain


def test_unknown_act():
    with pytest.raises(ValueError, match="SyncBNAct2d: unknown act 'gelu'"):
        fr.SyncBNAct2d(8, act="gelu")
