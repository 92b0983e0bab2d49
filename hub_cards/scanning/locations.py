"""Finds e-mail addresses and paths of this machine in a text.

A path is what begins at the root of a file system, at a home folder or at a drive; a model id, a URL, a fraction, a
closing tag and a formula are none. Decided here, since the text alone does not say:

- links of Markdown and HTML to the root of the site (`[text](/docs/hub)`) are URLs, unless they begin with a folder
  that only a machine has (`/home`, `/Users`, `/mnt`, ...); so are `/api/...` and `/v1/...`, the routes of a server;
- `/path/to/...`, `/dev/null` and the `#!` line of a script name no machine; `/usr/bin/env` elsewhere is reported;
- the addresses of RFC 2606 (`example.com`, `.test`, ...) and `git@host` are public.
"""

import re
from collections.abc import Iterator

from hub_cards.scanning.detect import RESERVED_HOST, Hit, starts_of

EMAIL, PATH = "e-mail address", "absolute path"

_ADDRESS = re.compile(
    r"(?P<local>[\w.%+'-]{1,64})@(?P<host>(?:[\w-]{1,63}\.)+(?P<top>[^\W\d_]{2,24}|xn--[\w-]+))(?![\w@])"
)
_NO_TOP = frozenset(
    {"png", "jpg", "jpeg", "gif", "svg", "webp", "json", "txt", "yaml", "yml", "csv", "bin", "js", "css", "html"}
)

# Folders at the root of a file system that are no part of a web site.
_ROOTS = (
    "home|Users|root|mnt|tmp|var|opt|usr|etc|srv|media|private|Volumes|workspace|scratch|gpfs|lustre|nfs|proc|sys|dbfs|export|"
    "cluster|storage|kaggle|cygdrive|Applications|Library|System|data|content|work|net|nix|snap|boot|lib|lib64|sbin|bin|run"
)
_MACHINE = re.compile(rf"/(?:{_ROOTS})/")
# The slash comes first, so that the search is one for a letter; what stands before it decides whether a path begins.
_POSIX = re.compile(r"/(?<![\w./\\~$#%?\])}^]/)(?:[\w.@+-][\w.@+~%=-]*/)+[\w.@+-][\w.@+~%=-]*")
_PERSONAL = re.compile(r"/(?:home|Users|root|mnt|Volumes)/")
_NO_PATH = re.compile(
    r"/(?:path/to\b|dev/(?:null|zero|u?random|std(?:in|out|err)|tty|shm)\b|(?:api|v\d+)/|(?:\d+/)+\d+$)"
)
_LINK = re.compile(r"""(?:\]\(|(?:href|src|action|poster)\s*=\s*["']?)<?$""")
_FILE_URL = re.compile(r"(?i)file:(?<![a-z]file:)/{1,3}(?=[\w.~%\\])[^\s\"'<>)]+")
_HOME = re.compile(
    r"~(?<![\w/~.\\)\]}]~)(?:/[\w.][^\s\"'<>`,;]*|(?P<user>[a-z_][\w-]*)/[\w.][\w.-]*(?P<more>/[\w.]*)?)"
)
_DRIVE = re.compile(r"(?<![\w?+-])[A-Za-z]:(?:\\{1,2}|/)(?!/)(?P<parts>[\w.$~@ -]+(?:(?:\\{1,2}|/)[\w.$~@ -]+)*)")
_SHARE = re.compile(
    r"(?<![^\s\"'=(\[,:])(?:\\\\(?P<one>\w[\w.-]+\\[\w$.-]{2,})|\\{4}(?P<two>\w[\w.-]+\\\\[\w$.-]{2,}))[^\s\"']*"
)
_FORMULA = re.compile(
    r"\\(?:to|in|R|N|Z|C|text|times|math\w+|right\w*|left\w*|mapsto|frac|sum|prod|int|cdot|ldots|hline|begin|end|quad|alpha|beta|"
    r"gamma|delta|sigma|theta|lambda|mu|phi|psi|omega|partial|infty|leq?|geq?|neq|sim|approx|bf|it|rm|operatorname|hat|bar|tilde)\b"
)
_HOME_IN_VOCABULARY = re.compile(
    r"(?:/home|/Users)/[\w.-]{2,}|/root/[\w.-]{2,}|[A-Za-z]:(?:\\{1,2}|/)Users(?:\\{1,2}|/)[\w.-]{2,}"
)


def find_emails(text: str) -> Iterator[Hit]:
    """Yields the e-mail addresses of `text`, but those of reserved domains.

    Example:
        >>> [hit.start for hit in find_emails("ada@lovelace.org, you@example.com, mAP@50.large, git@github.com:a/b")]
        [0]
    """
    done = 0
    for at in starts_of(text, ("@",)):
        if at < done or (match := _ADDRESS.search(text, max(done, at - 65), at + 260)) is None:
            continue
        if not match.start() <= at < match.end():
            continue
        done = match.end()
        host = match["host"]
        is_name = re.search(r"[^\W\d_]", host.rpartition(".")[0]) and match["top"].lower() not in _NO_TOP
        if is_name and match["local"].lower() != "git" and not RESERVED_HOST.fullmatch(host):
            yield Hit(*match.span(), EMAIL)


def find_paths(text: str) -> Iterator[Hit]:
    r"""Yields the absolute paths of `text`: POSIX, Windows, network shares, `file:` URLs and home folders.

    Example:
        >>> texts = ["see /home/ada/x", r"C:\Users\ada", "~/x"]
        >>> [text[hit.start : hit.end] for text in texts for hit in find_paths(text)]
        ['/home/ada/x', 'C:\\Users\\ada', '~/x']
        >>> list(find_paths("org/name, and/or, 1/2/3, https://x.org/a/b, </p>, [link](/docs/hub), $f:\\R\\to\\R$"))
        []
    """
    for match in _POSIX.finditer(text):
        whole = match[0].rstrip(".,")
        if _NO_PATH.match(whole):
            continue
        if not _PERSONAL.match(whole) and _is_part(text, match.start(), is_machine=bool(_MACHINE.match(whole))):
            continue
        yield Hit(match.start(), match.start() + len(whole), PATH)
    if "~" in text:
        for match in _HOME.finditer(text):
            is_value = match.start() == 0 or text[match.start() - 1] in "\"'=`\n"
            if match["user"] is None or match["more"] or is_value:
                yield Hit(*match.span(), PATH)
    for at in starts_of(text, (":\\", ":/")):
        if (drive := _DRIVE.match(text, max(0, at - 1))) and _is_drive_path(drive):
            yield Hit(*drive.span(), PATH)
        elif url := _FILE_URL.match(text, max(0, at - 4)):
            yield Hit(*url.span(), PATH)
    for at in starts_of(text, ("\\\\",)):
        if (share := _SHARE.match(text, at)) and not _FORMULA.search("\\" + share[0].lstrip("\\")):
            yield Hit(*share.span(), PATH)


def find_homes(text: str) -> Iterator[Hit]:
    """Yields the home folders of `text`: the only paths that are told of a vocabulary.

    Example:
        >>> [text[hit.start : hit.end] for text in ["/usr/local/bin", "/home/ada"] for hit in find_homes(text)]
        ['/home/ada']
    """
    if any(needle in text for needle in ("/home/", "/Users/", "/root/", "\\Users", ":/Users")):
        yield from (Hit(*match.span(), PATH) for match in _HOME_IN_VOCABULARY.finditer(text))


def _is_part(text: str, at: int, *, is_machine: bool) -> bool:
    """Returns whether the path at `at` goes on a word: a tag, a pattern, a URL, a link to the root of a site."""
    before = re.split(r"[\s\"'`(]", text[max(0, at - 300) : at])[-1]
    if before[-1:] in tuple("<@*|+&!-") or "://" in before:
        return True
    return not is_machine and bool(_LINK.search(text, max(0, at - 20), at))


def _is_drive_path(match: re.Match[str]) -> bool:
    parts = re.split(r"\\{1,2}|/", match["parts"].strip())
    if _FORMULA.search(match[0]) or not all(part.strip(" .") for part in parts):
        return False
    return len(parts) > 1 or bool(re.search(r"\w\.\w{1,12}$", parts[0])) or (len(parts[0]) > 2 and match[0][0] in "CDE")
