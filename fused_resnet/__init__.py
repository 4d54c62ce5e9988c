from fused_resnet._version import __version__
