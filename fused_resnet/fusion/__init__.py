"""Conversion of existing networks: `fuse`, `unfuse` and the report."""

from fused_resnet.fusion.convert import FusedForward, fuse, fusion_report, is_fused, unfuse
from fused_resnet.fusion.report import FusionReport

__all__ = ["FusedForward", "FusionReport", "fuse", "fusion_report", "is_fused", "unfuse"]
