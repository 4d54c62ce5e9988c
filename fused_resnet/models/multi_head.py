"""Several named linear heads over one trunk."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fused_resnet.models.registry import with_weights
from fused_resnet.models.resnet import resnet34

# Parts of a handwritten Bengali grapheme: the three-headed network's own task.
GRAPHEME_HEADS = {"vowel_diacritic": 11, "grapheme_root": 168, "consonant_diacritic": 7}


class MultiHead(nn.Module):
    """`{name: head(trunk(x))}` for several linear heads.

    Shapes:
        x: what the trunk takes; returns: a dict from each head's name to its logits [N, classes].

    Args:
        trunk: a network with a linear classifier under `fc` or `classifier`, which is replaced by `nn.Identity` here
            (the network given is changed); or, with `in_features`, any module that returns [N, in_features].
        heads: classes of each head.

    Raises:
        ValueError: no heads, or a trunk without such a classifier where `in_features` is not given.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, int], in_features: int | None = None):
        super().__init__()
        if not heads:
            raise ValueError("MultiHead: heads must name at least one head, for example {'digit': 10}")
        if in_features is None:
            in_features = remove_classifier(trunk)
        self.trunk = trunk
        self.heads = nn.ModuleDict({name: nn.Linear(in_features, classes) for name, classes in heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}


def remove_classifier(model: nn.Module) -> int:
    """Replace the last linear layer of `model.fc` or `model.classifier` by `nn.Identity`; return its `in_features`.

    Raises:
        ValueError: there is none.
    """
    for name in ("fc", "classifier"):
        head = getattr(model, name, None)
        parent, key = (head, str(len(head) - 1)) if isinstance(head, nn.Sequential) and len(head) else (model, name)
        linear = getattr(parent, key, None)
        if isinstance(linear, nn.Linear):
            setattr(parent, key, nn.Identity())
            return linear.in_features
    raise ValueError(f"{type(model).__name__} has no linear layer at the end of fc or classifier; give in_features")


def resnet34_multi_head(
    heads: Mapping[str, int] = GRAPHEME_HEADS,
    *,
    weights: Any = None,
    progress: bool = True,
    in_channels: int = 1,
    lean: bool = False,
    **kwargs,
) -> MultiHead:
    """A ResNet-34 on `in_channels` channels under one linear head for each of `heads`.

    `weights` are the whole network's, heads included. For weights of the trunk alone:
    `MultiHead(resnet34(weights, in_channels=...), heads)`.
    """

    def build():
        return MultiHead(resnet34(in_channels=in_channels, lean=lean, **kwargs), heads)

    return with_weights(build, weights, progress=progress)
