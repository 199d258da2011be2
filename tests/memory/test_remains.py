"""Where a deleted text may be left: written otherwise, in part, in a name, in what was rebuilt."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_by_hand import Letters

from delible.errors import DataError
from delible.memory import Item, Memory
from delible.memory.certificate import Certificate

ADA = "Ada Brook keeps a hippopotamus in the cellar of the lighthouse"
CAFE = "Zoë hides the résumé of her brother under the café"
RUSSIAN = "Ада держит бегемота в подвале старого маяка"


def filled(folder: Path, *items: Item) -> Memory:
    memory = Memory(folder, Letters())
    memory.add([*items, Item(id="stays", text="Somebody likes tea a lot today")])
    return memory


def forgotten(memory: Memory) -> Certificate:
    return memory.certificate(memory.forget(ids=["x"]))


@pytest.mark.parametrize(("text", "write"), [
    (ADA, lambda text: text.upper().encode()), (ADA, lambda text: text.lower().encode()),
    (ADA, lambda text: text.encode("utf-16-le")), (RUSSIAN, lambda text: text.encode("utf-16-be")),
    (RUSSIAN, lambda text: json.dumps({"note": text}).encode()),
    (RUSSIAN, lambda text: text.upper().encode()),
    (CAFE, lambda text: unicodedata.normalize("NFD", text).encode()),
])  # fmt: skip
def test_a_copy_that_is_written_otherwise_is_found(
    text: str, write: Callable[[str], bytes], tmp_path: Path
) -> None:
    memory = filled(tmp_path, Item(id="x", text=text))
    (tmp_path / "copy.log").write_bytes(b"1 " + write(text))
    certificate = forgotten(memory)
    assert certificate.verdict == "remains found"
    assert {name for name, _ in certificate.remains} == {"copy.log"}
    (tmp_path / "copy.log").unlink()
    assert memory.certify([text]).verdict == "nothing found"


def test_what_stays_may_be_written_otherwise_too(tmp_path: Path) -> None:
    memory = filled(tmp_path, Item(id="x", text="likes tea a lot\nAda of the lighthouse"))
    (tmp_path / "copy.log").write_bytes("Somebody likes tea a lot today".encode("utf-16-le"))
    assert forgotten(memory).verdict == "nothing found"
    memory.add([Item(id="x", text="Settings")])  # a word of the tables, but for its case
    assert forgotten(memory).verdict == "nothing found"


def test_a_part_of_a_long_text_is_found(tmp_path: Path) -> None:
    draw = random.Random(5)
    text = " ".join("".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(300))
    memory = filled(tmp_path, Item(id="x", text=text))
    (tmp_path / "part").write_text(text[1003:1067], encoding="utf-8")
    certificate = forgotten(memory)
    assert (certificate.verdict, len(certificate.remains)) == ("remains found", 1)


def test_a_name_of_a_file_is_looked_at_and_not_told(tmp_path: Path) -> None:
    memory = filled(tmp_path, Item(id="x", text=ADA))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"{ADA}.txt").write_text("nothing", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    certificate = forgotten(memory)
    assert certificate.verdict == "remains found"
    assert [at for _, at in certificate.remains] == [-1]
    assert "hippopotamus" not in certificate.model_dump_json()
    assert any(one.startswith("1 links") for one in certificate.not_computed)


def test_what_no_piece_can_tell_is_not_shown(tmp_path: Path) -> None:
    short = filled(tmp_path / "short", Item(id="x", text="PIN 7", source="records of a bank"))
    assert (found := forgotten(short)).verdict == "not shown"
    assert found.unknown == 1
    shared = filled(tmp_path / "shared", Item(id="x", text="likes tea a lot"))
    assert forgotten(shared).verdict == "not shown"
    both = filled(tmp_path / "both", Item(id="x", text=ADA), Item(id="y", text="PIN 7"))
    certificate = both.certificate(both.forget(ids=["x", "y"]))
    assert (certificate.verdict, certificate.unknown) == ("nothing found", 1)
    assert any("Of 1 of 2 items" in one for one in certificate.reasons)


def test_a_text_that_an_item_holds_is_no_proof_of_its_absence(tmp_path: Path) -> None:
    memory = filled(tmp_path, Item(id="x", text=ADA))
    memory.forget(ids=["x"])
    assert (found := memory.certify([ADA])).held == 0
    assert found.verdict == "nothing found"
    memory.add([Item(text=f"Note: {ADA.upper()}")])  # holds it, and is not it
    assert (found := memory.certify([ADA])).held == 1
    assert found.verdict == "remains found"
    assert memory.certify(["a note"]).held == 0
    for part in ("mebody", "Somebo"):  # a part of a word is something else
        assert memory.certify([part]).held == 0
    short = memory.certify(["PIN"])
    assert (short.verdict, short.unknown) == ("not shown", 1)


def test_a_rebuilt_item_says_neither_the_removed_text_nor_its_own_old_one(tmp_path: Path) -> None:
    memory = filled(tmp_path, Item(id="x", text="PIN 7"), Item(id="y", text="a second note of it"),
                    Item(id="sum", text=ADA, parents=("x", "y")))  # fmt: skip

    def rebuilt(text: str) -> Certificate:
        deletion = memory.forget(
            ids=["x"], descendants="rebuild",
            rebuild=lambda item, _: item.model_copy(update={"text": text}),
        )  # fmt: skip
        return memory.certificate(deletion)

    with pytest.raises(DataError, match="still holds what 'x' says"):
        rebuilt("pin  7")
    (tmp_path / "old.txt").write_text(ADA, encoding="utf-8")
    certificate = rebuilt("A number is known")
    assert {name for name, _ in certificate.remains} == {"old.txt"}
    assert any("may say a part" in one for one in certificate.not_computed)
    assert memory.get("sum").parents == ("y",)


def test_a_text_is_looked_for_wherever_an_item_holds_it(tmp_path: Path) -> None:
    memory = filled(
        tmp_path, Item(id="x", text="likes plums", source="user ada@example.com"),
        Item(id="y", text="likes pears", subject="ada@example.com"),
        Item(id="z", text="write to ADA@example.com"),
    )  # fmt: skip
    memory.forget(text="ada@example.com")
    assert [one.id for one in memory.items()] == ["stays"]
    assert b"ada@example.com" not in (tmp_path / "memory.db").read_bytes().lower()


def test_what_was_learned_is_dropped_with_its_file_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    memory = filled(Path("m"), Item(id="x", text=ADA))
    for file in (Path("m") / "scorer", Path("beside")):
        file.write_text("weights", encoding="utf-8")
        memory.learned("scorer", ["x"], file)
        whole = Memory(tmp_path / "m", Letters())
        (tmp_path / "else").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "else")
        whole.drop_learned("scorer")
        monkeypatch.chdir(tmp_path)
        assert not file.exists()
    memory.drop_learned("scorer", missing_ok=True)
    with pytest.raises(DataError, match="nothing called"):
        memory.drop_learned("scorer")


def test_what_still_knows_is_told(tmp_path: Path) -> None:
    memory = filled(tmp_path, Item(id="x", text=ADA), Item(id="y", text="A pond", parents=("x",)))
    memory.learned("scorer", ["x"])
    certificate = memory.certificate(memory.forget(ids=["x"], descendants="quarantine"))
    assert any(one.endswith("until it is retrained: scorer.") for one in certificate.not_computed)
    assert any(one.startswith("What is quarantined is kept") for one in certificate.not_computed)
    memory.drop_learned("scorer")
    later = memory.certificate(memory.forget(ids=["stays"]))
    assert not any("retrained" in one or "quarantined" in one for one in later.not_computed)


def test_nothing_is_rebuilt_into_what_was_deleted_before(tmp_path: Path) -> None:
    memory = filled(tmp_path, Item(id="x", text=ADA), Item(id="y", text="A pond"),
                    Item(id="sum", text="All of it", parents=("y",)))  # fmt: skip
    memory.forget(ids=["x"])
    with pytest.raises(DataError, match="was deleted from this memory"):
        memory.forget(ids=["y"], descendants="rebuild",
                      rebuild=lambda item, _: item.model_copy(update={"text": ADA}))  # fmt: skip
    assert memory.get("y").text == "A pond"
