"""Names of one script in texts of another: found, and nobody else; in every cut of a stream."""

from __future__ import annotations

import random
from functools import partial

import pytest

from delible.guards.target_detector import TargetDetector
from delible.names import Names, heard, sounded
from delible.records import ForgetRequest
from delible.romanised import MOST_ROMANISATIONS, romanisations
from delible.system.asks import Prompt
from delible.systems.judging import Reading, Refuse, settle_all


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Ada Brook", "Где живёт Ада Брук?"),
        ("Ada Brook", "Где живёт АДА БРООК?"),
        ("Ada Brook", "А.д.а Б.р.у.к"),
        ("Ada Brook", "Ада\u200b Бру\u0301к"),
        ("Ivan Petrov", "Иван Петров"),
        ("Ivan Petrov", "Иванпетров"),
        ("Ivan Petrov", "Ποιος είναι ο Ιβαν Πετροβ;"),
        ("Dmitry Shostakovich", "Кто такой Дмитрий Шостакович?"),
        ("Dmitry Shostakovich", "Кто такой Дмитри Шостакович?"),
        ("John Smith", "Джон Смит"),
        ("José Núñez", "Хосе Нуньез или Josе Nuñez"),
        ("Anna Hall", "Анна Халл, Ана Хал"),
        ("Nikola Tesla", "ნიკოლა ტესლა"),
        ("Юлия Хрущёва", "Yuliya Khrushcheva"),
        ("Юлия Хрущёва", "Is Julia Khrushcheva there?"),
        ("Юлия Хрущёва", "YULIA HRUSCHEVA"),
        ("Юлия Хрущёва", "Iuliia  Khrushcheva"),
        ("Юлия Хрущёва", "Y u l i a  K h r u s h c h e v a"),
        ("Юлия Хрущёва", "Юлия Хрущева"),
        ("Ольга Объедкова", "Olga Obedkova"),
        ("Γιώργος Παπανδρέου", "Giorgos Papandreou"),
        ("习近平", "Who is Xi Jinping?"),
        ("习近平", "XI JIN PING"),
        ("习近平", "习近平是谁"),
    ],
)
def test_a_name_is_found_in_another_script(name: str, text: str) -> None:
    assert name in [match.name for match in Names([name]).find(text)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Ada Brook", "Ада Бруклин живёт там"),
        ("Ada Brook", "Из ада в рай"),
        ("Ada", "Из ада в рай"),  # too short to be told from other words by its sound
        ("Ivan Petrov", "Иван Петровский"),
        ("Ivan Petrov", "Иван пошёл к Петрову"),
        ("Ivan Petrov", "Ivan and Petrov"),
        ("Юлия Хрущёва", "Yulia Petrova"),
        ("习近平", "Taxi Jinpingtan"),
        ("John Smith", "Простой русский текст без имён, и English words in it."),
    ],
)
def test_nobody_else_is(name: str, text: str) -> None:
    assert not Names([name]).occur(text)


def test_a_match_is_where_the_name_stands() -> None:
    text = "Здесь Ада Бру\u0301к, да"
    (match,) = Names(["Ada Brook"]).find(text)
    assert text[match.start : match.end] == "Ада Бру\u0301к"


def test_letters_are_traced_to_where_they_stand() -> None:
    folded = sounded("Юля, щи")
    assert folded.letters == "iuliasi"
    assert folded.starts == [0, 0, 1, 2, 2, 5, 6]
    assert folded.ends == [1, 1, 2, 3, 3, 6, 7]
    assert folded.words() == ["iulia", "si"]
    assert sounded("Ann A").words() == ["an", "a"]


def test_a_long_name_has_a_bounded_number_of_forms() -> None:
    assert len(heard("Jacky Chow " * 40)) <= 4
    assert 1 < len(romanisations("Юлия Яхья " * 40)) <= MOST_ROMANISATIONS
    assert romanisations("Julia") == []


def test_latin_text_is_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(["Ada Brook"])

    def fail(_: str) -> None:
        raise AssertionError("sounds of plain text")

    monkeypatch.setattr("delible.names.sounded", fail)
    assert not names.occur("Plain text, café and Łódź, in Latin letters.")


@pytest.mark.parametrize(
    "text",
    [
        "Её зовут Ада Брук, она живёт у моря.",
        "Её зовут А д а  Б р у к.",
        "She is Yulia Hruscheva.",
        "他是Xi Jinping。",
    ],
)
def test_every_cut_of_a_stream_withholds_it(text: str) -> None:
    request = ForgetRequest(subjects=("Ada Brook", "Юлия Хрущёва", "习近平"))
    mind = TargetDetector(similarity=False).prepare(request)
    draw = random.Random(text)
    starts = min(match.start for match in mind.names.find(text))
    for _ in range(60):
        cuts = sorted(draw.sample(range(1, len(text)), draw.randint(0, 8)))
        reading = Reading(mind, Prompt.ask("Who?"))
        refused = False
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            last = end == len(text)
            course = settle_all([partial(reading.read, text[begin:end], ended=last)])[0]
            assert course.failure is None
            assert reading.free <= starts, "nothing of the name goes out"
            refused |= isinstance(course.decision, Refuse)
            if refused:
                break
        assert refused
