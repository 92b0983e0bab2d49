"""The warnings of our own; every error is a builtin exception.

Kept apart from the methods so that a user can silence or escalate it without importing one.
"""


class NoEffectWarning(UserWarning):
    """Warns that a setting provably changes nothing: strength 0, or a group that never opens.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", NoEffectWarning)  # make it an error in your own script
    """


class PreflightWarning(UserWarning):
    """Warns, before step 1, of all that will work but not as one may think; each with what to do.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", PreflightWarning)  # make it an error in your own script
    """
