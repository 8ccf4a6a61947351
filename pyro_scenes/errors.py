"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do.

    The commands print it after ``Error:`` and exit with status 2.
    """
