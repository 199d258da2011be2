"""Adding, finding, forgetting: what is refused, what goes along, and what stays."""

from __future__ import annotations

import sqlite3
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from memory_by_hand import Letters, cosine
from pydantic import ValidationError

from delible.errors import DataError, RunError
from delible.memory import Item, Memory, database, near
from delible.memory.vectors import Vectors


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    made = Memory(tmp_path / "memory", Letters())
    made.add([
        Item(id="ada", text="Ada Brook lives in Casta", subject="Ada Brook"),
        Item(id="jon", text="Jon Lind grows plums"),
        Item(id="both", text="Two neighbours and a tree", kind="summary", parents=("ada", "jon")),
        Item(id="far", text="A tree was seen", parents=("both",)),
        Item(id="mei", text="Mei Tan sails", key="who sails", data={"reward": 1, "plan": ["go"]}),
    ])  # fmt: skip
    return made


def ids(memory: Memory, **chosen: str) -> list[str]:
    return [one.id for one in memory.items(**chosen)]  # type: ignore[arg-type]


def test_items_come_back_as_they_went_in(memory: Memory) -> None:
    again = Memory(memory.folder, Letters(), make_new=False)
    assert again.get("mei") == Item(
        id="mei", text="Mei Tan sails", key="who sails", data={"plan": ["go"], "reward": 1}
    )
    assert again.get("both").parents == ("ada", "jon")
    assert ids(again, kind="summary") == ["both"]
    assert ids(again, subject="Ada Brook") == ["ada"]
    (made,) = again.add([Item(text="An item without an id")])
    assert len(made) == 32
    assert again.get(made).text == "An item without an id"


def test_zero_matches_are_an_error_and_change_nothing(memory: Memory) -> None:
    before = memory.state
    for asked in (
        {"ids": ["nobody"]}, {"ids": ["ada", "nobody"]}, {"subject": "Zoe Quill"},
        {"text": "nothing like it"}, {"ids": []}, {},
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"nobody|matches|named"):
            memory.forget(**asked)  # type: ignore[arg-type]
        with pytest.raises(DataError):
            memory.closure(**asked)  # type: ignore[arg-type]
    assert (memory.state, len(memory), memory.deletions()) == (before, 5, [])


@pytest.mark.parametrize(
    ("asked", "gone"),
    [
        ({"ids": ["jon"]}, {"jon", "both", "far"}),
        ({"ids": ["far"]}, {"far"}),
        ({"subject": "ada BROOK"}, {"ada", "both", "far"}),
        ({"subject": "Mei Tan"}, {"mei"}),
        ({"text": "GROWS  plums"}, {"jon", "both", "far"}),
        ({"text": "who sails"}, {"mei"}),
        ({"text": "go"}, {"mei"}),
    ],
)
def test_descendants_go_along(memory: Memory, asked: dict[str, object], gone: set[str]) -> None:
    seen = memory.closure(**asked)  # type: ignore[arg-type]
    assert {one.item.id for one in seen.members.values()} == gone
    assert len(memory) == 5
    memory.forget(**asked)  # type: ignore[arg-type]
    assert set(ids(memory)) == {"ada", "jon", "both", "far", "mei"} - gone


def test_the_closure_says_why(memory: Memory) -> None:
    twin = Item(id="twin", text="ADA  brook lives in Casta")
    memory.add([twin, Item(id="kid", text="Kid", parents=("twin",))])
    told = {
        one.item.id: (one.root, one.why) for one in memory.closure(ids=["ada"]).members.values()
    }
    assert told == {
        "ada": (True, "named by its id"), "twin": (True, "says the same as ada"),
        "both": (False, "made from ada"), "far": (False, "made from both"),
        "kid": (False, "made from twin"),
    }  # fmt: skip


def test_equal_texts_go_even_where_descendants_stay(memory: Memory) -> None:
    memory.add([
        Item(id="twin", text="jon lind\ngrows PLUMS"),
        Item(id="k", text="jon lind grows plums", key="other"),
    ])  # fmt: skip
    memory.forget(ids=["jon"], descendants="quarantine")
    assert ids(memory) == ["ada", "mei"]
    assert ids(memory, state="quarantined") == ["both", "far"]


def test_what_was_deleted_is_not_added_again(memory: Memory) -> None:
    memory.forget(ids=["mei", "far"])
    for text in ("Mei Tan sails", " mei  tan SAILS\n", "Ｍei Tan sails", "Mei\u200b Tan sails",
                 "who sails", "A TREE was seen"):  # fmt: skip
        for item in (Item(text=text), Item(text="Quite another", key=text)):
            with pytest.raises(DataError, match="deleted from this memory"):
                memory.add([Item(id="new", text="New"), item])
    assert "new" not in ids(memory)
    memory.add([Item(id="mei", text="Mei Tan sails home")])  # another text under the old id
    assert memory.get("mei").key == ""
    memory.lift("a tree WAS seen")
    memory.add([Item(id="far", text="A tree was seen")])
    with pytest.raises(DataError, match="not deleted"):
        memory.lift("A tree was seen")


def test_hashes_tell_nothing_without_the_key(memory: Memory, tmp_path: Path) -> None:
    other = Memory(tmp_path / "other", Letters())
    for one in (memory, other):
        if one is other:
            one.add([Item(id="mei", text="Mei Tan sails")])
        one.forget(ids=["mei"])
    forms = [
        {form for (form,) in sqlite3.connect(one.folder / "memory.db").execute(
            "SELECT same FROM tombstones")}
        for one in (memory, other)
    ]  # fmt: skip
    assert not forms[0] & forms[1]
    for path in memory.folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    (memory.folder / "key").unlink()
    with pytest.raises(RunError, match="key"):
        Memory(memory.folder, Letters())


def test_quarantined_items_are_found_by_nobody_until_they_are_released(memory: Memory) -> None:
    memory.forget(ids=["ada"], descendants="quarantine")
    with pytest.raises(DataError):
        memory.get("far")
    assert {one.item.id for one in memory.search("tree", 9)} == {"jon", "mei"}
    assert memory.search_words("tree", 9) == []
    with pytest.raises(DataError, match="not there"):
        memory.add([Item(text="of it", parents=("far",))])
    with pytest.raises(DataError, match="not quarantined"):
        memory.release(["far", "jon"])
    memory.release(["far"])
    assert [one.item.id for one in memory.search_words("tree", 9)] == ["far"]
    assert {one.item.id for one in memory.search("tree", 9)} == {"jon", "mei", "far"}
    certificate = memory.certify()
    assert certificate.counted == memory.state
    memory.forget(ids=["both"])  # quarantined, and deleted all the same, with what came from it
    assert ids(memory) == ["jon", "mei"]


def test_rebuilt_items_are_made_from_what_is_left(memory: Memory) -> None:
    asked: list[tuple[str, list[str]]] = []

    def rebuild(item: Item, parents: tuple[Item, ...]) -> Item | None:
        asked.append((item.id, [one.text for one in parents]))
        if item.id == "far":
            return item  # looked through, and clean
        return Item(text=f"From {len(parents)} neighbour and a tree", kind=item.kind)

    memory.forget(ids=["ada"], descendants="rebuild", rebuild=rebuild)
    assert asked == [
        ("both", ["Jon Lind grows plums"]), ("far", ["From 1 neighbour and a tree"]),
    ]  # fmt: skip
    assert memory.get("both").parents == ("jon",)
    assert memory.get("far") == Item(id="far", text="A tree was seen", parents=("both",))
    best = memory.search("From 1 neighbour and a tree", 1)[0]
    assert (best.item.id, best.score) == ("both", cosine(*["From 1 neighbour and a tree"] * 2))
    assert [one.item.id for one in memory.search_words("neighbours", 9)] == []
    assert [one.item.id for one in memory.search_words("neighbour", 9)] == ["both"]
    with pytest.raises(DataError, match="deleted"):
        memory.add([Item(text="two neighbours and a tree")])


def test_a_rebuilt_item_may_not_hold_what_went(memory: Memory) -> None:
    before = memory.state
    for text in ("I heard: ada brook  LIVES in casta!", "ok"):
        with pytest.raises(DataError, match="still holds"):
            memory.forget(
                ids=["ada"], descendants="rebuild",
                rebuild=lambda item, _, text=text: item.model_copy(
                    update={"text": text, "data": {"was": ["Ada Brook lives in Casta"]}}
                ),
            )  # fmt: skip
    with pytest.raises(DataError, match="function"):
        memory.forget(ids=["ada"], descendants="rebuild")
    assert (memory.state, len(memory)) == (before, 5)


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([Item(id="ada", text="Another")], "taken"),
        ([Item(id="x", text="X"), Item(id="x", text="Y")], "taken"),
        ([Item(id="x", text="X", parents=("y",))], "made from 'y'"),
        ([Item(id="x", text="X", parents=("y",)), Item(id="y", text="Y")], "made from 'y'"),
    ],
)
def test_all_items_are_added_or_none(memory: Memory, items: list[Item], problem: str) -> None:
    before = memory.state
    with pytest.raises(DataError, match=problem):
        memory.add([Item(id="good", text="Good"), *items])
    assert (memory.state, len(memory)) == (before, 5)


def test_another_encoder_is_refused(memory: Memory, tmp_path: Path) -> None:
    class Other(Letters):
        identity = "other"

    with pytest.raises(RunError, match="another encoder"):
        Memory(memory.folder, Other())
    plain = Memory(memory.folder)
    assert plain.search_words("plums")[0].item.id == "jon"
    with pytest.raises(RunError, match="encoder"):
        plain.search("plums")
    with pytest.raises(RunError, match="has vectors"):
        plain.add([Item(text="New")])
    plain.forget(ids=["jon"])  # nothing needs to be encoded for that
    assert {one.item.id for one in memory.search("plums", 9)} == {"ada", "mei"}
    words = Memory(tmp_path / "words")
    words.add([Item(text="red")])
    with pytest.raises(RunError, match="no vectors"):
        Memory(words.folder, Letters())
    with pytest.raises(RunError, match="holds no memory"):
        Memory(tmp_path / "nowhere", make_new=False)


def test_what_was_trained_on_deleted_items_is_stale(memory: Memory, tmp_path: Path) -> None:
    (weights := tmp_path / "scorer.safetensors").write_bytes(b"weights")
    memory.learned("scorer", ["ada", "mei"], weights)
    memory.learned("other", ["jon"])
    with pytest.raises(DataError, match="nobody"):
        memory.learned("scorer", ["nobody"])
    assert memory.stale() == {}
    deletion = memory.forget(ids=["ada"], descendants="quarantine")
    assert memory.stale() == {"scorer": 1}
    assert memory.certificate(deletion).stale == {"scorer": 1}
    memory.forget(ids=["mei"])
    assert memory.stale() == {"scorer": 2}
    memory.learned("scorer", ["jon"], weights)
    assert memory.stale() == {}
    memory.drop_learned("scorer")
    assert not weights.exists()
    with pytest.raises(DataError, match="Did you mean 'other'"):
        memory.drop_learned("othr")


def test_exact_search_finds_what_comparing_all_finds(tmp_path: Path) -> None:
    """Also where float32 cannot tell the best apart, and with many that are equal."""
    draw = np.random.default_rng(0)
    base = draw.normal(size=64)
    rows = base + 3e-8 * draw.normal(size=(400, 64))
    rows[100:140] = rows[7]
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    query = base + 2 * draw.normal(size=64)
    query = (query / np.linalg.norm(query)).astype(np.float32)
    vectors = Vectors(tmp_path / "v", 64)
    vectors.write({slot: row.tobytes() for slot, row in enumerate(unit)})
    wanted = [Fraction(float(number)) for number in query]
    exact = [
        float(sum(Fraction(float(a)) * b for a, b in zip(row, wanted, strict=True))) for row in unit
    ]
    order = sorted(range(400), key=lambda slot: (-exact[slot], slot))
    for count in (1, 8, 60):
        found = vectors.closest(query, 400, count)
        best = sorted(found, key=lambda slot: (-found[slot], slot))[:count]
        assert [exact[slot] for slot in best] == [exact[slot] for slot in order[:count]]
        assert best == order[:count]
    among = np.array([3, 7, 101, 300])
    assert set(vectors.closest(query, 400, 2, among)) <= set(among.tolist())
    assert vectors.closest(query, 400, 0) == {}
    assert near("  ＡB\u200bc ß ") == "abc ss"


def test_a_memory_that_is_read_for_too_long_is_told(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 0.01)
    other = sqlite3.connect(memory.folder / "memory.db", isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM items").fetchone()
    with pytest.raises(RunError, match="in use"):
        memory.add([Item(text="New")])
    other.close()
    memory.add([Item(text="New")])


def test_odd_texts_are_kept_as_they_are(memory: Memory) -> None:
    odd = [
        'He said "so"\\ and\nleft',
        "nul\0inside",
        "ＷＩＤＥ ß İ",
        "🦛" * 3,
        "x" * 30_000,
        "OR NOT*",
    ]
    memory.add([Item(id=f"odd{n}", text=text, data={"again": text}) for n, text in enumerate(odd)])
    for n, text in enumerate(odd):
        assert memory.get(f"odd{n}").text == memory.get(f"odd{n}").data["again"] == text
    assert [one.item.id for one in memory.search_words('"OR NOT* (')] == ["odd5"]
    deletion = memory.forget(ids=[f"odd{n}" for n in range(len(odd))])
    assert memory.certificate(deletion).verdict == "nothing found"
    for text in ("", "  \n\u200b", "\ud800"):
        with pytest.raises(ValidationError):
            Item(text=text)
