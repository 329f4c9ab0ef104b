"""The one exception that is the user's to mend."""


class InputError(Exception):
    """Bad usage or bad input. The message is one line that names the flag, file or value and says what to do."""
