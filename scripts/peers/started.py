"""Starting the programs that are compared."""

import sys
from collections.abc import Callable


def started(start: Callable, command: list[str], **options: object):
    """What `start` makes of `command`; one line and exit status 2 where there is no such program."""
    try:
        return start(command, **options)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}; see scripts/peers/README.md", file=sys.stderr)
        sys.exit(2)
