"""Which formats `export` is told on the command line."""

import argparse
from typing import get_args

from qlora_contract.run_config import GgufType, Output


def add_formats(exporting: argparse.ArgumentParser) -> None:
    """Add the options."""
    exporting.add_argument(
        "--format", action="append", choices=["merged", "gguf"], required=True, help="repeat for both"
    )
    exporting.add_argument(
        "--gguf-type",
        action="append",
        choices=get_args(GgufType),
        help="default: q8_0; repeat for several; lora is the adapter alone",
    )


def output_of(options: argparse.Namespace) -> Output:
    """What they ask for, as a job's output."""
    return Output(
        formats=list(dict.fromkeys(options.format)),
        gguf_types=list(dict.fromkeys(options.gguf_type or ["q8_0"])),
    )
