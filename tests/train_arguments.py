"""Arguments of `fused-resnet train`, as its command line would give them."""

import argparse

from fused_resnet.training import options


def arguments(*argv) -> argparse.Namespace:
    """What `train` gets from these options; bad ones end in SystemExit, contradictions are not looked for."""
    return options.make_parser().parse_args([str(argument) for argument in argv])
