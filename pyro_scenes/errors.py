"""What ends a command in good order: wrong input, as opposed to a wrong program, and SIGTERM."""


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do.

    The commands print it after ``Error:`` and exit with status 2.
    """


class NothingToDraw(UserError):
    """Images lack the objects that a picture of them needs."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated like Ctrl-C."""


def reason(error: Exception) -> str:
    """What another library's exception says, as a part of a line; it may quote any of a file."""
    line = " ".join(str(error).split())[:200]
    return "".join(c if c.isprintable() else "?" for c in line) or type(error).__name__
