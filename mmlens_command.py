"""The first lines of the `mmlens` command.

Importing mmlens takes seconds, and what an interrupt does before that is done must be said before it: hence a module
beside the package.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """`mmlens.cli.main`, with Ctrl-C as one line from the start."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored:
        signal.signal(signal.SIGINT, _stop)
    from mmlens.cli import main as command

    if not ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command()


def _stop(number: int, frame: object) -> None:
    # Nothing has been begun, and an exception in the midst of an import may be swallowed or come out as another.
    os.write(2, b"mmlens: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
