"""Values into Markdown so that they stay data: no name of a label, a file or a data set becomes markup."""

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"


class Markdown(str):
    """Text that is Markdown already, and is not escaped again."""


def escape(value: Any) -> str:
    r"""Return a value as one line of Markdown that shows its text; None as "not measured".

    Example:
        >>> escape("a*b <img> | # x"), escape(None), escape(Markdown("**bold**"))
        ('a\\*b &lt;img&gt; \\| \\# x', 'not measured', '**bold**')
    """
    if isinstance(value, Markdown):
        return value
    if value is None:
        return NOT_MEASURED
    text = one_line(number(value) if isinstance(value, float) else str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", text)
    return re.sub(r"^(\d*)([-+=.)])(?=\s|$)", r"\1\\\2", text)  # the marks of lists and headings


def code(value: Any) -> Markdown:
    """Return a value as a code span, which shows every character as it is.

    Example:
        >>> code("layer_norm"), code("a`b"), code(None)
        ('`layer_norm`', '`` a`b ``', 'not recorded')
    """
    if value is None:
        return Markdown(NOT_RECORDED)
    text = one_line(str(value)) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{fence} {text} {fence}" if "`" in text or text[0] == " " else f"{fence}{text}{fence}")


def cell(value: Any) -> Markdown:
    r"""Return a value as a code span within a table, where a bar would end the cell.

    Example:
        >>> print(cell("a|b"))
        `a\|b`
    """
    return Markdown(code(value).replace("|", r"\|"))


def setting(value: Any) -> Markdown:
    """Return an option's value as a code span, as it would be written in JSON.

    Example:
        >>> setting(None), setting(0.8), setting(["a"])
        ('`null`', '`0.8`', '`["a"]`')
    """
    return code(json.dumps(value, ensure_ascii=False, default=str))


def fenced(text: str, language: str = "") -> Markdown:
    """Return text as a code block, whose fence is longer than any run of backticks in it.

    Example:
        >>> print(fenced("x = 1", "python"))
        ```python
        x = 1
        ```
    """
    text = _printable(text, keep="\n\t").strip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def number(value: float | None, spec: str = ".4g") -> str:
    """Return a number for people; what is not finite is named.

    Example:
        >>> number(0.123456), number(None), number(float("nan"))
        ('0.1235', 'not measured', 'not finite (nan)')
    """
    if value is None:
        return NOT_MEASURED
    return format(value, spec) if abs(value) < float("inf") else f"not finite ({value})"


def size(num_bytes: int | None) -> str:
    """Return a number of bytes for people, in powers of ten as the Hub shows them.

    Example:
        >>> size(1_400_000), size(90_900_000), size(12), size(None)
        ('1.4 MB', '90.9 MB', '12 B', 'not measured')
    """
    if num_bytes is None:
        return NOT_MEASURED
    amount, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def listed(values: Iterable[Any], most: int = 60) -> Markdown:
    """Return code spans with commas between them; of very many the first, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        '`a`, `b` and 1 more'
    """
    spans = [str(code(value)) for value in values]
    more = f" and {len(spans) - most:,} more" if len(spans) > most else ""
    return Markdown(", ".join(spans[:most]) + more)


def literal(value: Any) -> Markdown:
    """Return a value as a Python literal, for code that a reader runs.

    Example:
        >>> literal("jo/news")
        '"jo/news"'
    """
    return Markdown(json.dumps(value) if isinstance(value, str) else repr(value))


def one_line(text: str) -> str:
    """Return text without line breaks and characters that steer a terminal or the direction of writing."""
    return " ".join(_printable(text).split())


def _printable(text: str, keep: str = "") -> str:
    bidirectional = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return "".join(
        c
        if c in keep or (unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and ord(c) not in bidirectional)
        else " "
        for c in text
    )
