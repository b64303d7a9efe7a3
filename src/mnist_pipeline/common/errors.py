"""What a user can get wrong, and how a program then ends."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend. Its message says in one line what is wrong and what would be right."""


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`. A user's mistake ends it with one line and exit code 1, without a traceback.

    So does what the machine refuses, such as a full disk or a missing permission. SIGTERM interrupts like Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
