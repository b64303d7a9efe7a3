"""The error for a user's mistake, and how a program ends after one."""

import getpass
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can fix. Its message says in one line what is wrong and what would be right."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Return a text as one line: escape what is not printable, such as a newline or a colour code in a file's name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up_process() -> None:
    """Make up for what a terminal, a container or a variable of the user lets fail.

    Raises:
        UserError: Python leaves out docstrings.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (it stays open)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a character
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):  # this user has no name; DVC needs one
        os.environ["LOGNAME"] = "unknown"
    if any(action == "error" for action, *_ in warnings.filters):  # PYTHONWARNINGS: libraries warn of one another
        warnings.simplefilter("default")
    if sys.flags.optimize > 1:
        raise UserError("with PYTHONOPTIMIZE=2 or -OO, the docstrings that Altair reads are missing: set it to 1 or 0")


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`. A UserError or OSError ends it with one line and exit code 1, without a traceback.

    SIGTERM interrupts it like Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        set_up_process()
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
