"""Hashes of the chain, the tree and the envelope, against computations written here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delible.ledger import chain
from delible.ledger.chain import canonical, event_hash, faults, following, root
from delible.ledger.texts import commitment


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_an_event_has_the_hash_of_its_json_by_hand() -> None:
    """The JSON is written out, so that no encoder of the project takes part."""
    first = following(None, "2026-03-01T10:00:00+00:00", "created", body={"b": 1, "a": "é"})
    text = (
        '{"body":{"a":"é","b":1},"kind":"created","model":null,"previous":"' + "0" * 64 + '",'
        '"request":null,"sequence":1,"time":"2026-03-01T10:00:00+00:00"}'
    )
    expected = hashlib.sha256(b"delible ledger event v1\x00" + text.encode("utf-8")).hexdigest()
    assert first.hash == expected
    second = following(first, "1999-01-01T00:00:00+00:00", "requested", "r-1", "m", {})
    assert (second.sequence, second.previous) == (2, expected)
    text = (
        '{"body":{},"kind":"requested","model":"m","previous":"' + expected + '",'
        '"request":"r-1","sequence":2,"time":"1999-01-01T00:00:00+00:00"}'
    )
    assert second.hash == hashlib.sha256(b"delible ledger event v1\x00" + text.encode()).hexdigest()


def test_a_private_text_is_hashed_with_its_salt() -> None:
    expected = hashlib.sha256(b"delible ledger text v1\x00" + b"ab" + b"\x00" + "Ñame".encode())
    assert commitment("ab", "Ñame") == expected.hexdigest()
    assert commitment("ac", "Ñame") != expected.hexdigest()


def by_levels(leaves: list[bytes]) -> bytes:
    """RFC 6962's tree from the leaves up: pairs are joined, and an odd last one moves up."""
    level = [sha(b"\x00" + leaf) for leaf in leaves]
    while len(level) > 1:
        pairs = [sha(b"\x01" + a + b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0] if level else sha(b"")


@pytest.mark.parametrize("size", [*range(10), 31, 32, 33])
def test_the_root_is_that_of_rfc_6962(size: int) -> None:
    hashes = [hashlib.sha256(bytes([place])).hexdigest() for place in range(size)]
    assert root(hashes) == by_levels([bytes.fromhex(one) for one in hashes]).hex()


def test_the_root_of_nothing_is_the_one_of_the_rfc() -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert root([]) == empty
    leaf, other = "00" * 32, "11" * 32
    assert root([leaf]) != leaf, "a leaf is told from a node"
    assert root([leaf, other]) != root([other, leaf])


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_is_read_back_and_has_one_form(content: object) -> None:
    try:
        data = canonical(content)
    except UnicodeEncodeError:
        return  # half of a surrogate pair is no text
    assert json.loads(data) == content
    assert canonical(json.loads(data)) == data


def test_numbers_that_are_not_whole_are_refused() -> None:
    for content in (0.5, {"a": [1.0]}, ({"b": (float("nan"),)},)):
        with pytest.raises(TypeError, match="no whole number"):
            canonical(content)


def five() -> list[chain.Event]:
    events: list[chain.Event] = []
    for place in range(5):
        last = events[-1] if events else None
        events.append(following(last, "t", "noted", f"r-{place}", body={"place": place}))
    return events


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda events: [*events[:2], replace(events[2], body={"place": 9}), *events[3:]],
         "event 3 was changed"),
        (lambda events: [*events[:2], replace(events[2], time="u"), *events[3:]],
         "event 3 was changed"),
        (lambda events: [*events[:2], *events[3:]], "missing, added or in another order"),
        (lambda events: [events[0], events[2], events[1], *events[3:]], "in another order"),
        (lambda events: events[1:], "does not follow the beginning"),
        (lambda events: [*events, events[-1]], "at place 6 stands event 5"),
        (lambda events: [*events[:4], following(events[2], "t", "noted")], "does not follow"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_and_said(spoil: object, told: str) -> None:
    events = five()
    assert faults(events) == []
    assert told in "\n".join(faults(spoil(events)))  # type: ignore[operator]


def test_whoever_changes_an_event_must_change_all_that_follow() -> None:
    events = five()
    forged = replace(events[1], body={"place": 7})
    forged = replace(forged, hash=event_hash(forged.content()))
    assert "event 3" in faults([events[0], forged, *events[2:]])[0]
