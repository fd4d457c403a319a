"""The one exception for what the user can mend."""


class CptError(Exception):
    """Something the user gave cannot work; the message says what, with the value, and what to do about it.

    Command lines turn it into its message on stderr and exit code 2, without a traceback.
    """

    exit_code = 2
