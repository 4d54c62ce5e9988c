"""Measures fused_resnet beside its peers: `python -m bench --help`."""
