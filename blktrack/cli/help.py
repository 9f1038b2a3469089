"""Tell what a command does, and its options: the same as its --help.

blktrack help
blktrack help sync
blktrack help service install
"""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", metavar="COMMAND", nargs="*", help="and its action, if it has any")


def run(args: argparse.Namespace) -> int:
    from blktrack.cli import main

    return main([*args.topic, "--help"])
