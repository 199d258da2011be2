"""The measurement engine and its cache, on a scripted system."""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delible.errors import ModelError, RunError
from delible.measure import engine
from delible.measure.cache import ABANDONED_SECONDS, Cache, request_key
from delible.measure.engine import measure
from delible.records import Message
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
    Score,
    TokenScores,
)


class ScriptedSystem:
    """Answers that are functions of the request; remembers every call."""

    name = "scripted"

    def __init__(
        self,
        fingerprint: str | None = "weights-1",
        capabilities: Sequence[str] = ("generate", "score"),
        dies_after: int | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.capabilities = frozenset(capabilities)
        self.dies_after = dies_after
        self.generate_calls: list[tuple[list[Prompt], int]] = []
        self.score_calls: list[list[Score]] = []

    def _live(self) -> None:
        if self.dies_after is not None:
            if self.dies_after == 0:
                raise KeyboardInterrupt
            self.dies_after -= 1

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        self._live()
        self.generate_calls.append((list(prompts), decoding.max_new_tokens))
        return [f"{prompt.messages[-1].content} → {decoding.max_new_tokens}" for prompt in prompts]

    def score(self, requests: Sequence[Score]) -> list[TokenScores]:
        self._live()
        self.score_calls.append(list(requests))
        return [scores_of(request) for request in requests]

    @property
    def answered(self) -> int:
        return sum(map(len, self.score_calls)) + sum(len(call[0]) for call in self.generate_calls)


def scores_of(request: Score) -> TokenScores:
    seed = int(request_key(request)[:8], 16)
    generator = np.random.default_rng(seed)
    size = len(request.answer.split()) + 1
    logprobs, hits = -generator.random(size).astype(np.float32), generator.random(size) < 0.5
    moments = (logprobs - 1, logprobs + 2) if request.moments else ()
    return TokenScores(logprobs, hits, True, *moments)


def same(left: object, right: object) -> bool:
    if isinstance(left, TokenScores) and isinstance(right, TokenScores):
        return (
            left.logprobs.dtype == right.logprobs.dtype == np.float32
            and np.array_equal(left.logprobs, right.logprobs, equal_nan=True)
            and left.hits.dtype == right.hits.dtype == np.bool_
            and np.array_equal(left.hits, right.hits)
            and left.has_end is right.has_end
        )
    return type(left) is type(right) and left == right


def some_requests(count: int) -> list[Request]:
    found: list[Request] = []
    for index in range(count):
        prompt = Prompt.ask("Who? " * (1 + index % 7) + str(index))
        found.append(Score(prompt, f"answer number {index}"))
        found.append(Generate(prompt, Decoding(32 if index % 2 else 64)))
    return found


def test_equal_requests_are_asked_once() -> None:
    requests = some_requests(10)
    system = ScriptedSystem()
    answers = measure(system, [*requests, *requests, *some_requests(10)])
    assert answers.report.counts() == {
        "asked": 60, "unique": 20, "cached": 0, "scored": 10, "generated": 10,
        "inspected": 0, "unanswered": 0,
    }  # fmt: skip
    assert system.answered == 20
    assert set(answers) == set(requests)
    for request in requests:
        if isinstance(request, Score):
            assert same(answers[request], scores_of(request))
        else:
            expected = f"{request.prompt.messages[-1].content} → {request.decoding.max_new_tokens}"
            assert answers[request] == expected


def test_generation_is_grouped_by_limit_and_sorted_by_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 4)
    system = ScriptedSystem()
    measure(system, some_requests(20))
    assert [limit for _, limit in system.generate_calls] == [32, 32, 32, 64, 64, 64]
    for limit in (32, 64):
        prompts = [p for batch, n in system.generate_calls if n == limit for p in batch]
        lengths = [len(prompt.messages[-1].content) for prompt in prompts]
        assert len(lengths) == 10
        assert lengths == sorted(lengths, reverse=True)
    lengths = [
        len(request.prompt.messages[-1].content) + len(request.answer)
        for call in system.score_calls
        for request in call
    ]
    assert [len(call) for call in system.score_calls] == [4, 4, 4, 4, 4]
    assert lengths == sorted(lengths, reverse=True)


def test_the_order_of_requests_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK", 3)
    requests = some_requests(15)
    first, second = ScriptedSystem(), ScriptedSystem()
    answers = measure(first, requests)
    shuffled = requests[:]
    random.Random(0).shuffle(shuffled)
    others = measure(second, shuffled)
    assert first.score_calls == second.score_calls
    assert first.generate_calls == second.generate_calls
    assert all(same(answers[request], others[request]) for request in requests)


def test_long_texts_are_stored_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK", 8)
    sizes = {256: [8, 2], 1024: [2, 2, 2, 2, 2]}
    for limit, expected in sizes.items():
        system = ScriptedSystem()
        measure(system, [Generate(Prompt.ask(f"{n}?"), Decoding(limit)) for n in range(10)])
        assert [len(prompts) for prompts, _ in system.generate_calls] == expected


def test_answers_to_one_question_share_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK", 4)
    first, second, third = (Prompt.ask(text) for text in ("One?", "Two?", "Three?"))
    requests = [
        *(Score(prompt, "so " * size) for size in (1, 9, 5) for prompt in (first, second, third)),
        Score(second, "so it is", moments=True),
    ]
    system = ScriptedSystem(capabilities=("score", "distribution"))
    measure(system, requests)
    assert [{request.prompt for request in call} for call in system.score_calls] == [
        {third}, {first}, {second},
    ]  # fmt: skip
    assert [len(call) for call in system.score_calls] == [3, 3, 4]  # the one with moments last
    many = ScriptedSystem()
    measure(many, [Score(Prompt(text=""), f"passage {number}") for number in range(10)])
    assert [len(call) for call in many.score_calls] == [4, 4, 2]


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    requests = some_requests(10)
    answers = measure(ScriptedSystem(), requests, cache=Cache(tmp_path))
    again = ScriptedSystem()
    cached = measure(again, requests, cache=Cache(tmp_path))
    assert again.answered == 0
    assert cached.report.counts() == {
        "asked": 20, "unique": 20, "cached": 20, "scored": 0, "generated": 0,
        "inspected": 0, "unanswered": 0,
    }  # fmt: skip
    assert all(same(answers[request], cached[request]) for request in requests)
    more = measure(again, some_requests(12), cache=Cache(tmp_path))
    assert (more.report.cached, again.answered) == (20, 4)


def test_another_fingerprint_shares_nothing(tmp_path: Path) -> None:
    requests = some_requests(3)
    measure(ScriptedSystem("a/b:c"), requests, cache=Cache(tmp_path))
    other = ScriptedSystem("a/b:d")
    assert measure(other, requests, cache=Cache(tmp_path)).report.cached == 0
    assert other.answered == 6


def test_one_cache_object_sees_what_another_process_wrote(tmp_path: Path) -> None:
    requests = some_requests(4)
    mine = Cache(tmp_path)
    assert measure(ScriptedSystem(), requests[:2], cache=mine).report.cached == 0
    measure(ScriptedSystem(), requests[2:], cache=Cache(tmp_path))
    assert measure(ScriptedSystem(), requests, cache=mine).report.cached == 8


def test_without_fingerprint_nothing_is_cached(tmp_path: Path) -> None:
    system = ScriptedSystem(fingerprint=None)
    for _ in range(2):
        assert measure(system, some_requests(3), cache=Cache(tmp_path)).report.cached == 0
    assert system.answered == 12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [0, 1, 4])
def test_a_killed_measurement_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 5)
    requests = some_requests(15)
    with pytest.raises(KeyboardInterrupt):
        measure(ScriptedSystem(dies_after=finished), requests, cache=Cache(tmp_path))
    system = ScriptedSystem()
    answers = measure(system, requests, cache=Cache(tmp_path))
    assert answers.report.cached == 5 * finished
    assert system.answered == 30 - 5 * finished
    whole = measure(ScriptedSystem(), requests)
    assert all(same(answers[request], whole[request]) for request in requests)


def test_progress_counts_up_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK", 5)
    seen: list[tuple[int, int]] = []
    cache = Cache(tmp_path)
    measure(ScriptedSystem(), some_requests(5)[:4], cache=cache)
    measure(
        ScriptedSystem(), some_requests(5), cache=cache,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[0] == (4, 10)
    assert seen[-1] == (10, 10)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(seen))


def test_extreme_values_come_back_to_the_bit(tmp_path: Path) -> None:
    request = Score(Prompt.ask("q"), "a")
    values = np.array([-math.inf, math.nan, -0.0, -1e-45, -3.4e38], np.float32)
    scores = TokenScores(values, np.array([True, False, True, False, True]), has_end=False)
    empty = Score(Prompt(text=""), "b")
    nothing = TokenScores(np.zeros(0, np.float32), np.zeros(0, np.bool_), has_end=False)
    text = Generate(Prompt.ask("ü\n\0"), Decoding(4))
    Cache(tmp_path).write("f", {request: scores, empty: nothing, text: "  naïve\n漢\0 "})
    found = Cache(tmp_path).read("f", [request, empty, text])
    read = found[request]
    assert isinstance(read, TokenScores)
    assert read.logprobs.tobytes() == values.tobytes()
    assert same(found[request], scores)
    assert same(found[empty], nothing)
    assert found[text] == "  naïve\n漢\0 "


def test_text_that_utf8_cannot_hold_is_not_cached_but_returned(tmp_path: Path) -> None:
    requests: list[Request] = [
        Generate(Prompt.ask("a"), Decoding(4)),
        Generate(Prompt.ask("b"), Decoding(4)),
    ]
    cache = Cache(tmp_path)
    cache.write("f", {requests[0]: "\ud83d", requests[1]: "fine"})
    assert Cache(tmp_path).read("f", requests) == {requests[1]: "fine"}


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other schema", "other system"])
def test_a_damaged_part_is_ignored_with_a_note(tmp_path: Path, damage: str) -> None:
    requests = some_requests(3)
    cache = Cache(tmp_path)
    cache.write("weights-1", measure(ScriptedSystem(), requests[:2]))
    cache.write("weights-1", measure(ScriptedSystem(), requests[2:]))
    part = sorted(cache.folder_of("weights-1").iterdir())[0]
    lost = len(pq.read_table(part))
    if damage == "empty":
        part.write_bytes(b"")
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "noise":
        part.write_bytes(b"PAR1" + bytes(range(200)) + b"PAR1")
    elif damage == "other schema":
        pq.write_table(pa.table({"key": ["x"]}), part)
    else:
        table = pq.read_table(part)
        pq.write_table(table.replace_schema_metadata({b"delible.fingerprint": b"else"}), part)
    fresh = Cache(tmp_path)
    system = ScriptedSystem()
    answers = measure(system, requests, cache=fresh)
    assert system.answered == lost
    assert measure(system, requests, cache=fresh).report.cached == len(requests)
    assert len(fresh.notes) == 1
    assert part.name in fresh.notes[0]
    whole = measure(ScriptedSystem(), requests)
    assert all(same(answers[request], whole[request]) for request in requests)
    assert part.exists()


def test_an_unfinished_part_is_not_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write("weights-1", measure(ScriptedSystem(), some_requests(1)))
    part = next(cache.folder_of("weights-1").iterdir())
    part.rename(part.with_suffix(".unfinished"))
    fresh = Cache(tmp_path)
    assert measure(ScriptedSystem(), some_requests(1), cache=fresh).report.cached == 0
    assert fresh.notes == []


def test_a_write_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def half(table: pa.Table, path: Path, **options: object) -> None:
        path.write_bytes(b"PAR1 half")
        seen.extend(tmp_path.rglob("answers-*.parquet"))
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", half)
    cache = Cache(tmp_path)
    measure(ScriptedSystem(), some_requests(1), cache=cache)
    assert "no space left" in cache.notes[0]
    assert seen == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_says_so_once_and_measuring_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 4)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    cache, requests = Cache(blocked), some_requests(10)
    expected = measure(ScriptedSystem(), requests)
    found = measure(ScriptedSystem(), requests, cache=cache)
    assert all(same(found[request], expected[request]) for request in requests)
    (note,) = cache.notes
    assert "the measurement cache cannot be written" in note
    # what is known in this process is still not asked twice, and what is on disk is read
    again = ScriptedSystem()
    measure(again, requests, cache=cache)
    assert again.answered == 0


def test_what_a_process_killed_long_ago_left_is_cleared(tmp_path: Path) -> None:
    folder = Cache(tmp_path).folder_of("weights-1")
    folder.mkdir(parents=True)
    for name, age in (("old", 2 * ABANDONED_SECONDS), ("new", 60.0)):
        (folder / f"answers-{name}.unfinished").touch()
        then = time.time() - age
        os.utime(folder / f"answers-{name}.unfinished", (then, then))
    measure(ScriptedSystem(), some_requests(1), cache=Cache(tmp_path))
    assert [path.name for path in folder.glob("*.unfinished")] == ["answers-new.unfinished"]


def test_keys_tell_requests_apart() -> None:
    ask = Prompt.ask
    system_turn = Prompt((Message(role="system", content="q"),))
    requests: list[Request] = [
        Score(ask("q"), "a"), Score(ask("q"), "a "), Score(ask("q", prefill="a"), "a"),
        Score(ask("q", system="a"), "a"), Score(Prompt(text="q"), "a"), Score(system_turn, "a"),
        Score(Prompt(text=""), "a"), Score(Prompt(), "a"),
        Generate(ask("q"), Decoding(1)), Generate(ask("q"), Decoding(2)),
        Generate(ask('q","a'), Decoding(1)),
    ]  # fmt: skip
    assert len({request_key(request) for request in requests}) == len(requests)


def test_keys_never_change() -> None:
    # The key is the cache format: a change would silently lose everybody's cache.
    assert request_key(Score(Prompt.ask("Who?"), "Me.")) == (
        "e22748f5deaa976a1e27d74974adf0e79518554c6047bea5588e1c9910a9a49a"
    )
    assert request_key(Generate(Prompt.ask("Who?", prefill="Sure"), Decoding(8))) == (
        "3b7ee796656f790aadd651ff0c779a0eb6e99865417da1df4beb2f6a44a12399"
    )


def test_a_missing_capability_is_told_before_anything_is_asked() -> None:
    system = ScriptedSystem(capabilities=["generate"])
    with pytest.raises(ModelError, match="'scripted': it cannot 'score'"):
        measure(system, some_requests(2))
    assert system.answered == 0
    only_texts = [request for request in some_requests(2) if isinstance(request, Generate)]
    assert len(measure(system, only_texts)) == 2


def test_a_system_that_loses_answers_is_an_error() -> None:
    class Lossy(ScriptedSystem):
        def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
            return super().generate(prompts, decoding)[1:]

    with pytest.raises(RunError, match="one answer per request"):
        measure(Lossy(), [Generate(Prompt.ask("q"))])


def test_nothing_asked_is_nothing_done(tmp_path: Path) -> None:
    system = ScriptedSystem()
    assert measure(system, [], cache=Cache(tmp_path)) == {}
    assert system.answered == 0


# ---- how far it is


def test_a_system_that_can_tells_of_answers_within_a_chunk() -> None:
    class Telling(ScriptedSystem):
        on_answers = None

        def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
            for _ in prompts:
                assert self.on_answers is not None
                self.on_answers(1)  # type: ignore[unreachable]
            return super().generate(prompts, decoding)

    system, told = Telling(), list[tuple[int, int]]()
    requests = [Generate(Prompt.ask(f"{number}?"), Decoding(4)) for number in range(3)]
    measure(system, requests, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 3)]
    assert system.on_answers is None


def test_a_model_tells_of_every_batch() -> None:
    from delible.lm.body import Budget
    from delible.lm.lm import LM
    from delible.testing.tiny import tiny_model, tiny_tokenizer

    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    lm.budget = Budget(tokens=1, cached_tokens=1, rows=1)
    asked = [Generate(Prompt.ask(f"{number}?"), Decoding(2)) for number in range(3)]
    scored = [Score(Prompt.ask(f"{number}?"), "yes") for number in range(3)]
    told: list[int] = []
    measure(lm, [*asked, *scored], progress=lambda done, total: told.append(done))
    assert sorted(set(told)) == [0, 1, 2, 3, 4, 5, 6]


def test_a_model_tells_within_a_batch_of_long_texts() -> None:
    from delible.lm.lm import LM
    from delible.testing.tiny import tiny_model, tiny_tokenizer

    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    asked = [Generate(Prompt.ask(f"{number}?"), Decoding(16)) for number in range(8)]
    told: list[int] = []
    measure(lm, asked, progress=lambda done, total: told.append(done))
    assert told == sorted(told)
    assert told[-1] == 8
    assert len(set(told)) >= 6, "all eight are one batch"
