"""Networks of others, built from their names without weights, and what a test of them asks of every one."""

import torch
import torch.nn.functional as F
from networks import batch_norms, calibrate
from torch import Tensor, nn

from fused_resnet.fusion import FusionReport

# Not run, with the reason.
LEFT_OUT = {
    "torchvision:vit_h_14": "632 million parameters: with copies in fp64 and in channels_last 10 GB",
    "torchvision:regnet_y_128gf": "645 million parameters: with copies in fp64 and in channels_last 10 GB",
}

# The smallest image that a network takes, or a multiple of its windows; 64 for all others.
SIZES = {
    "torchvision:inception_v3": 299,
    "torchvision:maxvit_t": 224,
    **dict.fromkeys(("timm:inception_v4", "timm:inception_resnet_v2"), 96),
    **{
        f"timm:{name}": 224
        for name in ("levit_conv_128s", "efficientformer_l1", "coatnet_nano_rw_224", "visformer_tiny")
    },
    "timm:botnet26t_256": 256,
}

# Networks whose size of image is fixed when they are built.
_OPTIONS = {
    "torchvision:googlenet": {"init_weights": False},
    "torchvision:inception_v3": {"init_weights": False},
    **{f"torchvision:vit_{name}": {"image_size": 64} for name in ("b_16", "b_32", "l_16", "l_32")},
}

# Scale and shift of a batch norm in front of an activation.
_AWAY = {"relu": (1.0, 5.0), "relu6": (0.6, 3.0), "hardswish": (0.6, 0.0)}

_SMALL = {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 32, 64, 128], "embedding_size": 16}

# Name: the class without "ForImageClassification" and the arguments of its configuration.
TRANSFORMERS = {
    "resnet": ("ResNet", {}),
    "resnet_basic": ("ResNet", {"layer_type": "basic", **_SMALL}),
    "resnet_bottleneck": ("ResNet", {"layer_type": "bottleneck", **_SMALL}),
    "resnet_first_stage": ("ResNet", {"downsample_in_first_stage": True, "downsample_in_bottleneck": True, **_SMALL}),
    "regnet_x": ("RegNet", {"layer_type": "x", "groups_width": 16, **_SMALL}),
    "regnet_y": ("RegNet", {"layer_type": "y", "groups_width": 16, **_SMALL}),
    # Their padding is computed from the image, which no trace can see; "even": it is not.
    "mobilenet_v1": ("MobileNetV1", {"depth_multiplier": 0.25}),
    "mobilenet_v2": ("MobileNetV2", {"depth_multiplier": 0.35}),
    "mobilenet_v2_even": ("MobileNetV2", {"depth_multiplier": 0.35, "tf_padding": False}),
    "efficientnet": ("EfficientNet", {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}),
    "hgnet_v2": ("HGNetV2", {}),
    "cvt": ("Cvt", {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}),
    "levit": ("Levit", {"image_size": 64, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1]}),
    "mobilevit": ("MobileViT", {"image_size": 64, "hidden_sizes": [32, 40, 48]}),
    "poolformer": ("PoolFormer", {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128]}),
    "swiftformer": ("SwiftFormer", {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 96]}),
    "textnet": ("TextNet", {}),
    "pp_lcnet": ("PPLCNet", {}),
}


def size_of(name: str) -> int:
    return SIZES.get(name, 64)


def build(name: str) -> nn.Module:
    """The network `library:name` with random weights, none of which leaves a branch without influence."""
    library, _, short = name.partition(":")
    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        model = torchvision.models.get_model(short, weights=None, **_OPTIONS.get(name, {}))
    elif library == "timm":
        import timm

        model = timm.create_model(short, pretrained=False, **_OPTIONS.get(name, {}))
    else:
        import transformers

        kind, arguments = TRANSFORMERS[short]
        config = getattr(transformers, f"{kind}Config")(**arguments)
        model = getattr(transformers, f"{kind}ForImageClassification")(config)
    return _no_dropout(_awake(model))


def _awake(model: nn.Module) -> nn.Module:
    """Scales and shifts that differ by channel, and no weight of zeros: some start as the identity."""
    with torch.no_grad():
        for bn in batch_norms(model):
            if bn.affine:
                bn.weight.uniform_(0.75, 1.25)
                bn.bias.normal_(0, 0.1)
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.abs().max() < 1e-4:  # a layer's scale of 1e-6 hides the layer
                parameter.normal_(0, 0.05)
    return model


def _no_dropout(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def images(name: str, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size_of(name), size_of(name), generator=torch.Generator().manual_seed(1))


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, and two images.

    The running statistics are those of eight images: with those of two, whose last maps have few values, some networks
    make a rounding a thousand times larger, and how large is chance.
    """
    return calibrate(build(name), images(name, 8)), images(name)


def logits(result) -> list[Tensor]:
    """All outputs: of the head, and in training of auxiliary ones."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):  # transformers' outputs are
        return [next(iter(result.values()))]
    return [value for value in result if value is not None]


def training_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One forward and backward pass in training mode; the gradients, zeros where there is none."""
    labels = torch.arange(len(x))
    sum(F.cross_entropy(out, labels) for out in logits(model.train()(x))).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def leave_kinks(model: nn.Module, report: FusionReport) -> None:
    """Keep every batch norm's values five deviations away from the kinks of the activation behind it.

    A sign that rounding decides would otherwise move the gradients of small images by 1e-2 in any network.
    """
    with torch.no_grad():
        for place in report.fused:
            act = place.pattern.split("+")[-1]
            for norm in map(model.get_submodule, place.modules):
                if act in _AWAY and isinstance(norm, nn.BatchNorm2d) and norm.affine:
                    scale, shift = _AWAY[act]
                    norm.weight.fill_(scale)
                    norm.bias.fill_(shift)


def left_alone(model: nn.Module, report: FusionReport) -> list[str]:
    """The 2-d convolutions that are in no fused place."""
    inside = {path for place in report.fused for path in place.modules}
    return [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d) and path not in inside]
