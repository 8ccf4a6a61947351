"""What ends a command in good order: wrong input, as opposed to a wrong program, and SIGTERM."""


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do.

    The commands print it after ``Error:`` and exit with status 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated like Ctrl-C."""
