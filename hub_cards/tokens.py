"""A Hub's token, before a client puts it into a header and, where that fails, into its error."""


def check_token(token: str | None) -> None:
    r"""Raise unless a token can be sent; changes nothing. The error does not show it.

    Args:
        token: what the user gave; None: the one that is logged in.

    Raises:
        ValueError: it is empty, or has blanks, line ends or other characters that no token has.

    Example:
        >>> check_token("hf_abc\n")
        Traceback (most recent call last):
        ValueError: the token begins or ends in a blank or a line end; ... Pass token=token.strip().
    """
    if token is None:
        return
    if token and token.isascii() and token.isprintable() and " " not in token:
        return
    if not token.strip():
        what, remedy = "is empty", "Leave token= out to use the one that is logged in"
    elif token != token.strip():
        what, remedy = "begins or ends in a blank or a line end", "Pass token=token.strip()"
    else:
        what, remedy = "has a character that no token has", "Copy it again from the settings of the Hub"
    raise ValueError(f"the token {what}; expected the characters of the Hub's, such as `hf_` and letters. {remedy}.")
