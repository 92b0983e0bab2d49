"""Undoes what hides a text from a search: escapes, invisible characters, base64, hexadecimal digits.

Each step keeps a map back to the text it came from, so that what is found can be shown, masked, where it stands.
"""

import base64
import binascii
import html
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import unquote

BREAK = "\v"  # stands for an escaped line break: white space, but no new line of the file
ROUNDS = 4

_INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U000e0000-\U000e007f"
# One class of characters comes first, so that the search of a long text for it is quick.
_ESCAPE = re.compile(
    rf"[\\%&={_INVISIBLE}\uff01-\uff5e](?:"
    r"(?<=\\)(?:"
    r"(?P<unicode>u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2})"
    r"|(?P<octal>[0-7]{3}(?:\\[0-7]{3}){3,})"
    r"|(?P<fold>\r?\n[ \t]*)"
    r"|(?P<control>[nrtbfv])"
    r"|(?P<quoted>[!-/:-@\[-`{-~]))"
    r"|(?<=%)(?P<percent>[0-9a-fA-F]{2}(?:%[0-9a-fA-F]{2})*)"
    r"|(?<=&)(?P<entity>(?:\#[0-9]{1,7}|\#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});)"
    r"|(?<==)(?P<printable>[0-9A-F]{2}(?:=[0-9A-F]{2}){3,})"
    rf"|(?<=[{_INVISIBLE}])(?P<invisible>[{_INVISIBLE}]*)"
    r"|(?<=[\uff01-\uff5e])(?P<wide>[\uff01-\uff5e]*))"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{20,}(?:[\r\n\v]{1,2}[ \t]*[A-Za-z0-9+/_-]+)*")
_HEX = re.compile(r"[0-9a-fA-F]{32,}")
_BASE32 = re.compile(r"[A-Z2-7]{26,}")
_BYTES = re.compile(r"(?<![0-9a-fA-F])(?:(?:0x)?[0-9a-fA-F]{2}[ ,:;-]{1,2}){15,}(?:0x)?[0-9a-fA-F]{2}")
LONG = 2_000_000  # characters; beyond, lists of single bytes are not looked for: that search alone would take seconds
_AROUND = 300  # characters before and after a change that are searched again
_PRINTABLE = re.compile(rb"[\t\n\r\x20-\x7e]{12,}")


def _character(number: int) -> str:
    return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\ufffd"


_DECODE: dict[str, Callable[[str], str]] = {
    "unicode": lambda s: _character(int(s[2:].strip("{}"), 16)),
    "octal": lambda s: "".join(chr(int(digits, 8)) for digits in s[1:].split("\\")),
    "fold": lambda s: "",
    "control": lambda s: BREAK,
    "quoted": lambda s: s[1],
    "percent": lambda s: unquote(s, errors="replace"),
    "entity": html.unescape,
    "printable": lambda s: bytes.fromhex(s.replace("=", "")).decode("utf-8", "replace"),
    "invisible": lambda s: "",
    "wide": lambda s: "".join(chr(ord(character) - 0xFEE0) for character in s),
}


class View:
    r"""A text with its escapes undone, and the way back to the text that it was made of.

    Args:
        text: the text as it can be searched.
        cuts: for each changed stretch `(start here, end here, start there, end there)`, in order; empty: unchanged.
        source: the view that `cuts` refers to; None: the text itself is the file's.

    Example:
        >>> view = list(views(r'"h\u0066_x"'))[-1]
        >>> view.text, view.origin(1, 4)
        ('"hf_x"', (1, 9))
    """

    def __init__(self, text: str, cuts: list[tuple[int, int, int, int]] | None = None, source: "View | None" = None):
        self.text = text
        self._cuts = cuts or []
        self._starts = [cut[0] for cut in self._cuts]
        self._source = source

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """Returns where `text[start:end]` stands in the text of the file.

        Example:
            >>> View("abc").origin(1, 2)
            (1, 2)
        """
        if self._source is None:
            return start, end
        return self._source.origin(self._back(start, first=True), self._back(end, first=False))

    def changed(self) -> list[tuple[int, int]]:
        """Returns the stretches of the text in which something can be found that the source did not show.

        These are the changed places with what stands around them; all of the text where there is no source.

        Example:
            >>> view = list(views("%68f_" + " " * 1000 + "%41"))[-1]
            >>> view.changed()
            [(0, 301), (703, 1004)]
        """
        if self._source is None:
            return [(0, len(self.text))]
        stretches: list[tuple[int, int]] = []
        for here, here_end, _, _ in self._cuts:
            low, high = max(0, here - _AROUND), min(len(self.text), here_end + _AROUND)
            if stretches and low <= stretches[-1][1]:
                stretches[-1] = stretches[-1][0], high
            else:
                stretches.append((low, high))
        return stretches

    def _back(self, at: int, *, first: bool) -> int:
        index = bisect_right(self._starts, at if first else at - 1) - 1
        if index < 0:
            return at
        here, here_end, there, there_end = self._cuts[index]
        if at < here_end or (not first and at == here_end and here < here_end):
            return there if first else there_end
        return there_end + (at - here_end)


def views(text: str) -> Iterator[View]:
    r"""Yields `text` as it is, then with one layer of escapes after the other undone.

    JSON, YAML, JavaScript and C escapes, backslashes of Markdown, percent signs, HTML entities, quoted-printable,
    invisible characters, full-width letters and continued lines; four layers at the most.

    Example:
        >>> [view.text for view in views("%2568f_")]
        ['%2568f_', '%68f_', 'hf_']
    """
    view = View(text)
    yield view
    for _ in range(ROUNDS):
        pieces: list[str] = []
        cuts: list[tuple[int, int, int, int]] = []
        last = length = 0
        for match in _ESCAPE.finditer(view.text):
            plain = _DECODE[match.lastgroup or ""](match[0])
            start, end = match.span()
            length += start - last
            pieces += (view.text[last:start], plain)
            if plain != match[0]:
                cuts.append((length, length + len(plain), start, end))
            length += len(plain)
            last = end
        if not cuts:
            return
        view = View("".join([*pieces, view.text[last:]]), cuts, view)
        yield view


def joined(view: View) -> View | None:
    r"""Returns the view without the escaped line breaks inside words, or None where there are none.

    Example:
        >>> joined(list(views(r"hf_ab\ncd"))[-1]).text
        'hf_abcd'
    """
    cuts: list[tuple[int, int, int, int]] = []
    pieces, last, length = [], 0, 0
    for match in re.finditer(rf"{BREAK}(?<=[\w-]{BREAK}){BREAK}*[ \t]*(?=[\w-])", view.text):
        length += match.start() - last
        pieces.append(view.text[last : match.start()])
        cuts.append((length, length, *match.span()))
        last = match.end()
    return View("".join([*pieces, view.text[last:]]), cuts, view) if cuts else None


class Packed(NamedTuple):
    """A stretch `text[start:end]` that decodes to the readable `inside`.

    Example:
        >>> Packed(0, 4, "abc").inside
        'abc'
    """

    start: int
    end: int
    inside: str


def packed(text: str) -> Iterator[Packed]:
    """Yields what is readable inside runs of base64 (both alphabets, at any offset), base32 and hexadecimal digits.

    Example:
        >>> [piece.inside for piece in packed("x: " + "aGVsbG8sIGhlbGxvLCBoZWxsbyE=")]
        ['hello, hello, hello!']
    """
    for run in _BASE64.finditer(text):
        letters = re.sub(r"\s", "", run[0])
        yield from _readable(run.span(), *(_base64(letters[offset:]) for offset in range(4)))
        for digits in _HEX.findall(letters):
            yield from _readable(
                run.span(), *(bytes.fromhex(part[: len(part) // 2 * 2]) for part in (digits, digits[1:]))
            )
        for digits in _BASE32.findall(letters):
            yield from _readable(run.span(), _base32(digits))
    for run in _BYTES.finditer(text) if len(text) < LONG else ():
        yield from _readable(run.span(), bytes.fromhex(re.sub("0x|[ ,:;-]", "", run[0])))


def _base64(letters: str) -> bytes:
    whole = letters[: len(letters) - (len(letters) % 4 == 1)]
    return base64.b64decode(whole.replace("-", "+").replace("_", "/") + "=" * (-len(whole) % 4))


def _base32(letters: str) -> bytes:
    try:
        return base64.b32decode(letters[: len(letters) // 8 * 8])
    except binascii.Error:
        return b""


def _readable(span: tuple[int, int], *decoded: bytes) -> Iterator[Packed]:
    for data in decoded:
        text = data.replace(b"\0", b"") if data.count(0) > len(data) // 4 else data
        for match in _PRINTABLE.finditer(text):
            yield Packed(*span, match[0].decode("ascii"))
