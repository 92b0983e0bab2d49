"""Finds secrets in a text, by the table of `hub_cards.secrets`.

Only what is written is looked at: `hub_cards.encodings` undoes escapes and encodings first. A tokenizer has 20 MB, so
nothing here walks the whole text with an alternation: long runs of characters or single words are found first.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from hub_cards.scanning.secrets import (
    ASSIGNMENT,
    BEARER,
    DISCORD,
    NAME_NEEDLES,
    OPTION,
    PLACEHOLDER,
    SHAPES,
    TOKENS,
    URL_LOGIN,
    WORDISH,
)

RESERVED_HOST = re.compile(r"(?i)(?:.*\.)?(?:example(?:\.(?:com|org|net))?|test|invalid|localhost)\.?")

_RUN = re.compile(r"[A-Za-z0-9_\-.+/=~:$@%&]{14,}+")
_TOKEN_OF = [(prefix, token) for token in TOKENS for prefix in token.prefixes.split()]
_TOKEN_OF.sort(key=lambda pair: (-len(pair[0]), pair[0]))
_PREFIX = re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(f"(?={re.escape(prefix)})" for prefix, _ in _TOKEN_OF) + ")")
_BODY = {token: re.compile(f"{token.body}{{{token.least},}}") for token in TOKENS}
# Prefixes so particular that they count even when glued to a letter, as in a data set named `datahf_…`.
_GLUED = re.compile(
    "(?<=[A-Za-z0-9])(?=hf_|github_pat_|gh[pousr]_|glpat-|sk-ant-|sk-proj-|xox[abprs]-|dckr_pat_|nvapi-|gsk_|AKIA|AIza)"
)


class Hit(NamedTuple):
    """A stretch `text[start:end]` that must not be published, and what it is.

    Example:
        >>> Hit(0, 4, "e-mail address").kind
        'e-mail address'
    """

    start: int
    end: int
    kind: str


def starts_of(text: str, needles: tuple[str, ...]) -> Iterator[int]:
    """Yields where each of `needles` begins: `str.find` is far faster over a long text than an alternation.

    Example:
        >>> list(starts_of("a token, a secret", ("secret", "token")))
        [11, 2]
    """
    for needle in needles:
        at = text.find(needle)
        while at >= 0:
            yield at
            at = text.find(needle, at + 1)


def looks_random(value: str) -> bool:
    """Returns whether `value` is something else than words, versions and short numbers.

    Args:
        value: the part of a token after its prefix, or the value of an assignment.

    Returns:
        True when at least one of its parts is neither a word, a name in CamelCase nor a short number, and it is not one
        character repeated.

    Example:
        >>> looks_random("model_name_or_path"), looks_random("bert-base-uncased"), looks_random("q8Zr3TtW1x9LmB4v")
        (False, False, True)
    """
    if not value.strip("xX0*.#?_-"):
        return False
    return not all(WORDISH.fullmatch(part) for part in re.split(r"[^A-Za-z0-9]+", value) if part)


def find_secrets(text: str) -> Iterator[Hit]:
    """Yields the tokens, keys and passwords of `text`, overlapping ones too, in no particular order.

    Args:
        text: any text, its escapes undone.

    Example:
        >>> token = "hf_" + "aBcD1eFg" * 4
        >>> [(hit.kind, hit.start) for hit in find_secrets(f"my token is {token}")]
        [('Hugging Face token', 12)]
        >>> list(find_secrets("hf_hub_download, sk-learn and tokenizer_config"))
        []
    """
    yield from find_tokens(text)
    for kind, needles, pattern in SHAPES:
        done = 0
        for at in sorted(starts_of(text, needles)):
            if at < done:
                continue
            reach = 24_000 if kind == "private key" else 800
            match = pattern.search(text, max(done, at - 200), at + reach)
            if match is None or not match.start() - 200 <= at <= match.end():
                continue
            done = match.end()
            group = 1 if pattern.groups else 0
            if group == 0 or kind == "netrc login" or looks_random(match[1]):
                yield Hit(*match.span(group), kind)
    if "://" in text and "@" in text:
        yield from _url_logins(text)
    yield from _assignments(text)


def find_tokens(text: str) -> Iterator[Hit]:
    """Yields the tokens of `text` that have a prefix of their provider.

    Example:
        >>> [hit.kind for hit in find_tokens("AKIA" + "Q3EXAMPLE7ABCDEF")]
        ['AWS key id']
    """
    for run in _RUN.finditer(text):
        low, high = run.span()
        starts = [(match.start(), False) for match in _PREFIX.finditer(text, low, high)]
        starts += [(match.start(), True) for match in _GLUED.finditer(text, low, high)]
        for at, glued in starts:
            for prefix, token in _TOKEN_OF:
                if not text.startswith(prefix, at):
                    continue
                body = _BODY[token].match(text, at + len(prefix))
                if body is None or not looks_random(body[0]):
                    continue
                if glued and not re.search("[0-9]|[a-z].*[A-Z]|[A-Z].*[a-z]", body[0]):
                    continue
                yield Hit(at, body.end(), token.kind)
                break
        if high - low > 50 and (match := DISCORD.search(text, low, high)):
            yield Hit(*match.span(), "Discord token")


def _url_logins(text: str) -> Iterator[Hit]:
    done = 0
    for at in starts_of(text, ("://",)):
        if (match := URL_LOGIN.search(text, max(done, at - 21), at + 600)) is None:
            continue
        done = match.end()
        user, word = match["user"], match["word"]
        if word is None:
            is_login = len(user) >= 16 and looks_random(user)
        else:
            is_reserved = RESERVED_HOST.fullmatch(match["host"]) and word.lower() in ("pass", "password", "token")
            is_login = not (PLACEHOLDER.fullmatch(word) or is_reserved)
        if is_login:
            yield Hit(*match.span(), "URL with a login")


def _assignments(text: str) -> Iterator[Hit]:
    done = 0
    for at in sorted(set(starts_of(text, NAME_NEEDLES))):
        if at < done:
            continue
        low = at
        while low > max(0, at - 60) and (text[low - 1].isalnum() or text[low - 1] in "_.-"):
            low -= 1
        match = ASSIGNMENT.match(text, low) or OPTION.match(text, low)
        if match is None:
            continue
        group = next(name for name in ("double", "single", "bare") if match.groupdict().get(name))
        if _is_secret(match[0].lower(), match[group]):
            done = match.end()
            yield Hit(*match.span(group), "value of a secret")
    for at in starts_of(text, ("earer", "EARER", "asic", "ASIC")):
        if (match := BEARER.match(text, max(0, at - 1))) and looks_random(match["bare"]):
            yield Hit(*match.span("bare"), "authorization header")


def _is_secret(name: str, value: str) -> bool:
    value = value.strip()
    if PLACEHOLDER.fullmatch(value) or value.startswith(("http://", "https://", "/", "~/", "./")):
        return False
    if re.match(r"[\w.\"'-]*(?:pass(?:wd|word|phrase|code)|pwd)", name):
        return bool(re.search("[A-Za-z]", value) and re.search(r"[0-9!@#$%^&*+?~=]", value)) and not re.search(
            r"[()]|\s\S+\s", value
        )
    if len(value) < 12 or not value.isascii() or " " in value or not looks_random(value):
        return False
    # A class of a program, `SamHQAttention`, has few changes from lower to upper case; a random value has many, or a
    # digit.
    return bool(re.search("[0-9]", value)) or len(re.findall("[a-z][A-Z]", value)) > len(value) / 8
