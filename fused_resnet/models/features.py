"""The feature maps of a ResNet, for detectors and segmenters; arguments and `feature_info` as in timm."""

from collections.abc import Sequence

from torch import Tensor

from fused_resnet.models.resnet import ResNet
from fused_resnet.modules.blocks import run_in_turn

MAPS = ("bn1", "layer1", "layer2", "layer3", "layer4")


class FeatureInfo(list):
    """One dict a map that is returned: `num_chs` (channels), `reduction` (pixels a step), `module` (where it ends)."""

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        return [info["module"] for info in self]


class ResNetFeatures(ResNet):
    """A ResNet without its head, returning feature maps; its state dict is the ResNet's without what it does not need.

    It loads the whole ResNet's state dict: what belongs to the head and to the stages left out is passed over.

    Shapes:
        x: [N, in_channels, H, W]; returns: a list, for each of `out_indices` one [N, C, P, Q] in channels_last with the
        channels and the reduction that `feature_info` tells.

    Args:
        out_indices: which maps, in this order; 0: the stem before pooling, 1 to 4: the stages; negative from the end.
        block, layers, **kwargs: as `ResNet`.

    Raises:
        ValueError: no index, or one outside -5 to 4.
    """

    def __init__(self, block, layers: Sequence[int], *, out_indices: Sequence[int] = (0, 1, 2, 3, 4), **kwargs):
        indices = tuple(range(5)[i] if -5 <= i <= 4 else None for i in out_indices)
        if not indices or None in indices:
            raise ValueError(f"out_indices must be a sequence of indices from -5 to 4, got {out_indices}")
        super().__init__(block, layers, **kwargs)
        self.out_indices = indices
        channels, reductions = [self.conv1.out_channels], [2]
        for index, planes in enumerate((64, 128, 256, 512), start=1):
            stage = getattr(self, MAPS[index])
            channels.append(planes * block.expansion)
            reductions.append(reductions[-1] * (2 if index == 1 else stage[0].stride))  # layer1 follows the max-pool
        self.feature_info = FeatureInfo(
            {"num_chs": channels[i], "reduction": reductions[i], "module": MAPS[i]} for i in indices
        )
        # A child that is None has no keys, and those that a state dict has for it are passed over.
        for name in ("avgpool", "fc", *MAPS[max(indices) + 1 :]):
            setattr(self, name, None)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        x = self.maxpool(maps[0])
        for stage in self.stages():
            x = run_in_turn(stage, x)
            maps.append(x)
        return [maps[i] for i in self.out_indices]
