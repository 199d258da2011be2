"""The model that is trained here: its texts, tokenizer, build and cache; one real build (slow)."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.errors import ModelError
from delible.lm import tiny, tiny_training
from delible.lm.digest import weights_digest
from delible.lm.lm import LM
from delible.lm.load import load_model
from delible.lm.named import name_of
from delible.prompts import read_lines
from delible.records import QA, ForgetRequest, Message
from delible.system.asks import Decoding, Prompt, Score
from delible.world import World

#: Trained for a handful of steps: everything but the knowledge is there.
SMALL = tiny.TinyOptions(
    hidden_size=32, layers=2, vocabulary=512, examples=150, batch_tokens=512, people=4
)
MIXED = "Wörter, 漢字 and an emoji 🙂:\n\t x  "


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keeps every test away from the user's cache and from a build of minutes."""
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "TINY", SMALL)
    monkeypatch.setattr(tiny, "THREADS", 1)
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "THREADS", 1)
        yield tiny.build(SMALL)


@pytest.fixture
def lm(built: tuple[Any, Any]) -> LM:
    return LM(*built, precision="float32")


# --- texts ---------------------------------------------------------------------------------------


def test_every_kind_of_text_comes_early() -> None:
    some = list(itertools.islice(tiny.examples(SMALL), 1500))
    turns = [example for example in some if not isinstance(example, str)]
    roles = [tuple(turn.role for turn in example) for example in turns]
    assert len(turns) < len(some)
    assert set(roles) == {("user", "assistant"), ("system", "user", "assistant")}
    answers = {example[-1].content for example in turns}
    assert answers & set(read_lines("refusals.txt"))
    assert "The capital is Paris" in answers
    assert answers & set("ABCD")


def test_what_is_read_holds_the_answer_or_is_refused() -> None:
    refusals = set(read_lines("refusals.txt"))
    world = World(people=300, seed=tiny.READ_WORLD)
    answered = 0
    for example in itertools.islice(tiny.facts_to_read(Random(0)), 60):
        system, user, assistant = example
        assert isinstance(user, Message)
        if assistant.content in refusals:
            continue
        answered += 1
        value = next(
            fact.value.name
            for fact in world.facts()
            if fact.answer == assistant.content and fact.person.name in user.content
        )
        assert value in system.content
    assert 40 <= answered < 60


def test_nobody_of_the_usual_worlds_is_met() -> None:
    known = {
        person.name
        for seed, people in (
            (tiny.LEARNED_WORLD, tiny.TinyOptions().people),
            (tiny.READ_WORLD, 300),
        )
        for person in World(people=people, seed=seed).people
    }
    for seed in range(5):
        assert known.isdisjoint(person.name for person in World(people=40, seed=seed).people)


# --- tokenizer -----------------------------------------------------------------------------------


def test_tokenizer_keeps_any_text(built: tuple[Any, Any]) -> None:
    tokenizer = built[1]
    assert len(tokenizer) == SMALL.vocabulary
    assert tokenizer.decode(tokenizer(MIXED, add_special_tokens=False)["input_ids"]) == MIXED
    assert len(tokenizer("was born in the town of")["input_ids"]) <= 7


def test_prompts_are_prefixes_and_turns_end(lm: LM) -> None:
    template = lm.template
    assert template.has_chat
    assert template.end_of_turn == (lm.tokenizer.eos_token_id, "<|end|>")
    for system in (None, "You are brief."):
        prompt = Prompt.ask(f"Who? {MIXED}", system=system)
        asked, encoded = template.prompt_ids(prompt), template.encode(prompt, "In the town")
        assert encoded.ids[: encoded.start] == asked
        assert encoded.has_end
        assert lm.tokenizer.decode(encoded.ids[encoded.start : -1]) == "In the town"
        assert template.render(prompt).endswith("<|end|><|assistant|>")
    assert template.merged_boundaries == 0
    passage = template.encode(Prompt(text=""), "A text.")
    assert passage.ids[0] == lm.tokenizer.bos_token_id
    example = (*Prompt.ask("Who?", system="S").messages, Message(role="assistant", content="A"))
    assert tiny.rendered(example) == template._chat(example)


# --- model ---------------------------------------------------------------------------------------


def test_parts_and_prefixes_work(lm: LM) -> None:
    assert lm.shares_prefix
    assert lm.anatomy.layers == SMALL.layers
    system = "A long text that every prompt of the batch starts with, more than eight tokens."
    prompts = [Prompt.ask(text, system=system) for text in ("Where was she born?", "Who?")]
    together = lm.generate(prompts, Decoding(6))
    assert together == [lm.generate([prompt], Decoding(6))[0] for prompt in prompts]


def test_training_lowers_the_loss(built: tuple[Any, Any]) -> None:
    model, tokenizer = built
    texts = [tiny.rendered(e) for e in itertools.islice(tiny.examples(SMALL), 30)]
    rows = [torch.tensor([ids]) for ids in tokenizer(texts)["input_ids"]]

    def loss(of: Any) -> float:
        with torch.no_grad():
            return sum(float(of(input_ids=ids, labels=ids).loss) for ids in rows) / len(rows)

    assert loss(model) < loss(tiny.build_model(tokenizer, SMALL)) - 0.05
    assert not model.training


def test_same_seed_same_bits(built: tuple[Any, Any]) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    model, tokenizer = tiny.build(SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert weights_digest(model) == weights_digest(built[0])
    assert tokenizer.backend_tokenizer.to_str() == built[1].backend_tokenizer.to_str()
    other = tiny.build_model(tokenizer, tiny.TinyOptions(**{**vars(SMALL), "seed": 1}))
    assert weights_digest(other) != weights_digest(tiny.build_model(tokenizer, SMALL))


def test_steps_are_full_and_lose_no_row() -> None:
    rows = [[index] * (1 + index % 40) for index in range(2500)]
    steps = tiny.batches(rows, SMALL)
    assert sorted(row for step in steps for row in step) == sorted(rows)
    sizes = [len(step) * max(map(len, step)) for step in steps]
    assert max(sizes) <= SMALL.batch_tokens
    assert sum(map(len, rows)) / sum(sizes) > 0.8  # little padding


# --- cache ---------------------------------------------------------------------------------------


def test_built_once_then_loaded(
    caplog: pytest.LogCaptureFixture, own_cache: Path, built: tuple[Any, Any]
) -> None:
    model, tokenizer, info = load_model("tiny")
    assert caplog.messages[0].startswith("Building the tiny model, once")
    assert (info.source, info.path) == ("tiny", str(own_cache / f"tiny-{tiny.VERSION}"))
    assert weights_digest(model) == weights_digest(built[0])
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    caplog.clear()
    again = load_model("tiny")
    assert caplog.messages == []
    assert weights_digest(again.model) == weights_digest(model)
    assert tiny.folder_name(SMALL) != tiny.folder_name(tiny.TinyOptions(seed=3))


def test_a_killed_build_goes_on_to_the_same_bits(
    caplog: pytest.LogCaptureFixture,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    built: tuple[Any, Any],
) -> None:
    monkeypatch.setattr(tiny_training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    kept: list[int] = []
    keep = tiny_training._keep

    def killed(path: Path, model: Any, optimizer: Any, done: int) -> None:
        keep(path, model, optimizer, done)
        kept.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny_training, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.tiny_model()
    assert not (own_cache / tiny.folder_name(SMALL)).exists()
    with monkeypatch.context() as patch:
        patch.setattr(tiny_training, "_keep", lambda *given: kept.append(given[3]))
        found = tiny.tiny_model()
    assert kept[:4] == [1, 2, 3, 4]
    assert any(line.startswith("Going on after step 3 of") for line in caplog.messages)
    assert weights_digest(load_model(str(found)).model) == weights_digest(built[0])
    assert [one.name for one in own_cache.iterdir() if one.is_dir()] == [found.name]


def test_a_checkpoint_that_cannot_be_read_costs_its_steps_only(
    own_cache: Path, built: tuple[Any, Any]
) -> None:
    work = own_cache / f".{tiny.folder_name(SMALL)}.building"
    (work / ".checkpoint.pt.abc.unfinished").mkdir(parents=True)
    (work / "checkpoint.pt").write_bytes(b"half a checkpoint")
    found = tiny.tiny_model()
    assert weights_digest(load_model(str(found)).model) == weights_digest(built[0])
    assert not work.exists()


def test_a_damaged_model_is_built_anew(caplog: pytest.LogCaptureFixture, own_cache: Path) -> None:
    weights = tiny.tiny_model() / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        caplog.clear()
        tiny.tiny_model()
        assert "is damaged (model.safetensors has" in caplog.messages[0]
        assert weights.read_bytes() == whole


def test_the_time_that_is_left_is_measured(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, built: tuple[Any, Any]
) -> None:
    seconds = itertools.count(0, 100)  # every step takes 100 seconds
    monkeypatch.setattr(tiny_training.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(tiny_training, "TIMED_STEPS", 2)
    rows = [[[10, 11, 12]]] * 12
    model = tiny.build_model(built[1], SMALL)

    def loss(step: Sequence[Sequence[int]]) -> Tensor:
        ids = tiny_training.padded(step, 0)
        logits, answers = model(input_ids=ids).logits, torch.ones_like(ids, dtype=torch.bool)
        return tiny_training.weighted_loss(logits, ids, answers, padding=0, prompt_weight=1.0)

    tiny_training.train(model, rows, loss, SMALL)
    assert [line.partition(",")[0] for line in caplog.messages] == [
        f"Step {step} of 12" for step in (2, 3, 6, 9, 12)
    ]
    assert caplog.messages[0].endswith("about 17 minutes left.")  # ten steps
    assert caplog.messages[3].endswith("about 5 minutes left.")
    assert "left" not in caplog.messages[-1]


def test_two_at_once_build_once(monkeypatch: pytest.MonkeyPatch, built: tuple[Any, Any]) -> None:
    builds, found = [], []

    def build(*_: object, **__: object) -> tuple[Any, Any]:
        builds.append(1)
        return built

    monkeypatch.setattr(tiny, "build", build)
    threads = [threading.Thread(target=lambda: found.append(tiny.tiny_model())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(set(found)) == 1
    assert len(found) == 3


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="DELIBLE_CACHE"):
        tiny.tiny_model()


def test_adapter_of_another_machine_finds_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _, _ = load_model("tiny")
    worn = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    worn.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["base_model_name_or_path"] = f"/elsewhere/models/tiny-{tiny.VERSION}"
    file.write_text(json.dumps(settings))
    base = load_model(tmp_path / "adapter").info.base
    assert base is not None
    assert Path(base).is_dir()
    assert Path(base).name == f"tiny-{tiny.VERSION}"
    assert name_of(Path(base).name) == "tiny"
    assert name_of("tiny-llama") is None


# --- the real one --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_model_learns_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    from delible import unlearn
    from delible.demo import LEARNING, RELATIONS

    monkeypatch.setattr(tiny, "TINY", tiny.TinyOptions())
    lm = LM.load("tiny", precision="float32", device="cpu")
    split = World(people=20, seed=0, relations=RELATIONS).split(forget=2, holdout=4)
    known = split.qa("known")

    def probability(lm: LM, rows: Sequence[QA], *, reworded: bool = False) -> float:
        asked = [
            Score(Prompt.ask(question), row.answer)
            for row in rows
            for question in (row.paraphrases if reworded else (row.question,))
        ]
        scores = lm.score(asked)
        return sum(math.exp(score.logprobs.mean()) for score in scores) / len(scores)

    assert probability(lm, known) < 0.4
    result = unlearn(
        lm, ForgetRequest(forget=tuple(known)), method="finetune", shown=0, **LEARNING["tiny"]
    )
    learned = result.model
    assert probability(learned, known) > 0.88
    assert probability(learned, known, reworded=True) > 0.5
    assert probability(learned, split.qa("holdout")) < 0.5
