"""Print a script that lets a shell complete commands, options, devices and files. It is made from
the same source as --help and needs nothing but the shell: print it anew after an upgrade.

  blktrack completion bash > /etc/bash_completion.d/blktrack
  blktrack completion zsh > /usr/local/share/zsh/site-functions/_blktrack
  . <(blktrack completion bash)
"""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"], help="for which shell")


def run(args: argparse.Namespace) -> int:
    from blktrack.cli import bash, parsers, zsh

    script = {"bash": bash.script, "zsh": zsh.script}[args.shell]
    print(script(parsers()), end="")
    return 0
