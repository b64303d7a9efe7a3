"""What a user can get wrong, and how a program ends when they did."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, and what would be right."""


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`; a `UserError` ends it with its one line and exit code 1, no traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
