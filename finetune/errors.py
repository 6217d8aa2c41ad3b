"""The one exception that means "the user can mend this": it is shown as a line, never as a traceback."""


class UserError(Exception):
    """Wrong input. The message names the key, the value and the remedy; the program exits with code 2."""
