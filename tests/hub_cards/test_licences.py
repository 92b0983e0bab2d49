"""The licence of a card: every class of own licence, base and data against each other."""

import itertools

import pytest

from hub_cards.licences import LicenceError, resolve
from hub_cards.terms import IDENTIFIERS, LATER, NAMED

FREE, NC, SHARE, NC_SHARE, NAMED_MODEL, ND, NC_ND = (
    "apache-2.0",
    "cc-by-nc-4.0",
    "gpl-3.0",
    "cc-by-nc-sa-4.0",
    "llama3.1",
    "cc-by-nd-4.0",
    "cc-by-nc-nd-4.0",
)
CLASSES = (FREE, NC, SHARE, NC_SHARE, NAMED_MODEL, ND, NC_ND)

# base -> the own licences of CLASSES that fit, written out by hand.
FITS_BASE = {
    FREE: {FREE, NC, SHARE, NC_SHARE, NAMED_MODEL, ND, NC_ND},
    NC: {NC, NC_SHARE, NC_ND},
    SHARE: {SHARE},
    NC_SHARE: {NC_SHARE},
    NAMED_MODEL: {NAMED_MODEL},
    ND: set(),
    NC_ND: set(),
    None: set(CLASSES),
}
FITS_DATA = {
    FREE: set(CLASSES),
    NC: {NC, NC_SHARE, NC_ND},
    SHARE: set(CLASSES),
    NC_SHARE: {NC, NC_SHARE, NC_ND},
    NAMED_MODEL: set(CLASSES),
    ND: {ND, NC_ND},
    NC_ND: {NC_ND},
    None: set(CLASSES),
}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(("own", "base", "data"), list(itertools.product(CLASSES, FITS_BASE, FITS_DATA)))
def test_the_matrix(own: str, base: str | None, data: str | None, adapter: bool) -> None:
    if own in FITS_BASE[base] and own in FITS_DATA[data]:
        licence = resolve(own, base=base, datasets={"org/data": data}, adapter=adapter)
        assert (licence.identifier, licence.name, licence.link) == (own, None, None)
        assert any("base" in note and "not known" in note for note in licence.notes) == (base is None)
        assert any("data" in note and "not known" in note for note in licence.notes) == (data is None)
    else:
        with pytest.raises(LicenceError):
            resolve(own, base=base, datasets={"org/data": data}, adapter=adapter)


# base -> what a card states when the publisher states nothing.
UNSTATED = {
    FREE: "other",
    NC: "other",
    SHARE: SHARE,
    NC_SHARE: NC_SHARE,
    NAMED_MODEL: NAMED_MODEL,
    "gemma": "gemma",
    None: "other",
}


@pytest.mark.parametrize("base", UNSTATED)
@pytest.mark.parametrize("own", [None, "unknown"])
def test_nothing_stated(base: str | None, own: str | None) -> None:
    licence = resolve(own, base=base)
    assert licence.identifier == UNSTATED[base]
    assert licence.notes[0].startswith("No licence was stated")
    assert ('license="…"' in licence.notes[0]) == (licence.identifier == "other")
    assert "other" not in resolve("mit", base=None).identifier


def test_data_alone_does_not_choose_a_licence() -> None:
    licence = resolve(None, base="mit", datasets={"org/data": "cc-by-nc-4.0"})
    assert licence.identifier == "other"
    assert 'The licence "cc-by-nc-4.0" of the data "org/data" forbids commercial use.' in licence.notes
    assert any("nothing has checked" in note for note in licence.notes)
    assert resolve(None, base="mit", datasets={"org/data": "cc-by-sa-4.0"}).identifier == "other"


@pytest.mark.parametrize("base", ["gpl-3.0", "cc-by-sa-4.0", "llama3", "openrail"])
@pytest.mark.parametrize("data", ["cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0"])
def test_base_and_data_refuse_each_other(base: str, data: str) -> None:
    for own in (None, base):
        with pytest.raises(
            LicenceError, match=r"has to be kept and permits what .* forbids. No listed licence fits both"
        ):
            resolve(own, base=base, datasets={"a": "mit", "b": data})
    licence = resolve("other", base=base, datasets={"a": "mit", "b": data}, name="both", link="LICENSE")
    assert (licence.identifier, licence.name, licence.link) == ("other", "both", "LICENSE")
    assert any("nothing has checked" in note for note in licence.notes)


@pytest.mark.parametrize(("earlier", "later"), [(key, name) for key, names in LATER.items() for name in names.split()])
def test_a_compatible_later_licence(earlier: str, later: str) -> None:
    assert resolve(later, base=earlier).identifier == later
    if earlier not in LATER.get(later, "").split():
        with pytest.raises(LicenceError, match="asks for the same licence"):
            resolve(earlier, base=later)


def test_messages() -> None:
    with pytest.raises(
        LicenceError,
        match=r'"apache-2.0" permits commercial use, "cc-by-nc-4.0" of the base does not.*such as "cc-by-nc-4.0"',
    ):
        resolve("apache-2.0", base="cc-by-nc-4.0")
    with pytest.raises(
        LicenceError, match=r'permits commercial use, "cc-by-nc-4.0" of the data "d" does not.*or train on other data'
    ):
        resolve("mit", base="mit", datasets={"d": "cc-by-nc-4.0"})
    with pytest.raises(LicenceError, match=r'"mit" permits derived works, "cc-by-nd-4.0" of the data "d" does not'):
        resolve("mit", base="mit", datasets={"d": "cc-by-nd-4.0"})
    with pytest.raises(
        LicenceError,
        match=r'"cc-by-sa-3.0" asks for the same licence, "mit" is another. State "cc-by-sa-3.0" or "cc-by-sa-4.0"',
    ):
        resolve("mit", base="cc-by-sa-3.0")
    with pytest.raises(LicenceError, match="permits no derived works, so a model made from it cannot be published"):
        resolve(None, base="cc-by-nd-4.0")
    with pytest.raises(LicenceError, match="so an adapter made for it cannot be published"):
        resolve("other", base="cc-by-nc-nd-4.0", adapter=True)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("apache2", "apache-2.0"),
        ("Apache-2.0", "apache-2.0"),
        ("MIT", "mit"),
        ("gpl3", "gpl-3.0"),
        ("cc-by-4", "cc-by-4.0"),
        ("llama-3", "llama3"),
        ("", "none"),
    ],
)
def test_an_unknown_identifier_names_the_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf'knows no licence "{wrong}". Closest identifiers: .*{near}'):
        resolve(wrong, base="mit")


@pytest.mark.parametrize("named", NAMED)
def test_a_licence_that_the_hub_calls_other_by_name(named: str) -> None:
    assert resolve(None, base=named).identifier == "other"
    licence = resolve(named, base=named, link="https://x.org/LICENSE")
    assert (licence.identifier, licence.name, licence.link) == ("other", named, "https://x.org/LICENSE")
    with pytest.raises(LicenceError, match="asks for the same licence"):
        resolve("apache-2.0", base=named)


def test_what_others_wrote_is_read_kindly_and_what_says_nothing_is_not_known() -> None:
    with pytest.raises(LicenceError):
        resolve("mit", base=" CC-BY-NC-4.0 ")
    for nothing in ("other", "unknown", "", None):
        licence = resolve("mit", base=nothing, datasets={"d": nothing})
        assert licence.identifier == "mit"
        assert sum("not known" in note for note in licence.notes) == 2
    assert any("not one of the Hub's" in note for note in resolve("mit", base="my-own-terms").notes)
    assert any("not specific" in note for note in resolve("mit", base="mit", datasets={"d": "cc"}).notes)


def test_hostile_strings_stay_on_one_line_and_in_their_quotes() -> None:
    hostile = 'x"\n---\nlicense: mit\n# {{ 7*7 }}\x1b[31m' + "y" * 500
    for note in resolve("mit", base=hostile, datasets={hostile: hostile, f"{hostile}2": None}).notes:
        assert note.isprintable()
        assert note.count('"') % 2 == 0
        assert len(note) < 500
    with pytest.raises(LicenceError) as error:
        resolve(hostile, base="mit")
    assert str(error.value).isprintable()


def test_an_adapter_says_that_its_user_needs_the_base_licence() -> None:
    note = 'This adapter holds no weights of the base; who runs it accepts "llama3.1" of the base as well.'
    assert note in resolve(None, base="llama3.1", adapter=True).notes
    assert note not in resolve(None, base="llama3.1").notes


def test_the_list_is_the_hubs() -> None:
    assert len(IDENTIFIERS) == len(set(IDENTIFIERS)) == 83
    assert {"apache-2.0", "llama4", "gemma", "openmdw-1.0", "openrail++", "lgpl-lr", "unknown", "other"} <= set(
        IDENTIFIERS
    )
