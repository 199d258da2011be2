"""The suffix search: gradients, the search itself, its settings, and its place in an audit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.attacks.dua import DUA
from delible.audit.run import audit
from delible.component import build
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.records import QA, Dialogue, ForgetRequest, Message, Passage, RecordBase
from delible.search.questions import START
from delible.search.suffix import (
    Case,
    gives_away,
    search,
    suffix_losses,
    text_of,
    token_gradient,
    usable_tokens,
    with_suffix,
)
from delible.system.asks import Prompt, Score, TokenScores
from delible.system.questions import ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.randomness import generator
from delible.train.recipe import Recipe

PEOPLE = ("Ada", "Ben", "Cy", "Di")
FORGET = [
    QA(question=f"{ask_for} {name}?", answer=answer, subject=name)
    for name, answer in zip(PEOPLE, ("Oslo", "Rome", "Bern", "Riga"), strict=True)
    for ask_for in ("Where lives", "Which city is home to", "Home of")
]
SMALL: dict[str, Any] = {"length": 4, "steps": 3, "candidates": 8, "top_k": 16, "rows": 2}


@cache
def tiny(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed), tiny_tokenizer(), precision="float32")


def context(
    forget: list[Any] = FORGET, seed: int = 0, original: LM | None = None, **more: Any
) -> AttackContext:
    return AttackContext(forget, (), (), original, seed, **more)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def case_of(lm: LM, record: QA, start: str = " ! !") -> Case:
    prompt = ask(record)
    assert prompt is not None
    case = Case.cut(lm, prompt, record.answer, tokens(start))
    assert case is not None
    return case


def nll_of(lm: LM, record: QA, suffix: str) -> float:
    """-log p(answer) as the system itself scores the prompt's text."""
    prompt = ask(record)
    assert prompt is not None
    (score,) = lm.score([Score(with_suffix(prompt, suffix), record.answer)])
    assert isinstance(score, TokenScores)
    return -float(score.logprobs.sum())


def run(lm: LM, records: list[QA], *, seed: int = 0, start: str = " ! !", **options: Any) -> Any:
    cases = [case_of(lm, record, start) for record in records]
    settings = {"steps": 6, "top_k": 24, "candidates": 12, **options}
    return search(
        cases, tokens(start), usable_tokens(lm), random=generator(seed, "test"), **settings
    )


# ---- gradient and loss


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "opt"])
def test_the_gradient_is_that_of_one_hot_tokens_in_float64(family: str) -> None:
    lm = tiny(family)
    cases = [case_of(lm, record) for record in (FORGET[0], FORGET[5])]
    suffix = tokens("x y!")
    found = token_gradient(cases, suffix)
    twin: Any = lm.copy().model.double()
    table = twin.get_input_embeddings().weight.detach()
    if family.startswith("gemma"):  # its embedding module scales what it looks up
        table = table * 32**0.5
    total = torch.zeros(len(suffix), len(table), dtype=torch.float64)
    for case in cases:
        row = torch.tensor(case.row(suffix))
        hot = torch.nn.functional.one_hot(row, len(table)).double().requires_grad_(True)
        logits = twin(inputs_embeds=(hot @ table)[None]).logits[0]
        at = len(row) - len(case.target)
        losses = torch.nn.functional.cross_entropy(logits[at - 1 : -1], row[at:], reduction="sum")
        (part,) = torch.autograd.grad(losses, hot)
        total += part[len(case.before) : len(case.before) + len(suffix)]
    assert found.shape == total.shape
    assert float((found.double() - total).norm()) < 1e-4 * float(total.norm())
    assert all(value.grad is None for value in lm.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_losses_are_those_of_the_text_as_it_is_sent(family: str) -> None:
    lm = tiny(family)
    records = [FORGET[0], FORGET[4]]
    cases = [case_of(lm, record) for record in records]
    suffixes = [tokens(" a b"), tokens(" ! !"), tokens(" zz?")]
    losses, solved = suffix_losses(cases, suffixes)
    for suffix, loss in zip(suffixes, losses.tolist(), strict=True):
        assert all(case.reads(suffix) for case in cases)
        expected = sum(nll_of(lm, record, text_of(lm, suffix)) for record in records) / 2
        assert loss == pytest.approx(expected, rel=1e-4)
    assert not solved.any()


def test_a_suffix_that_is_read_otherwise_is_noticed() -> None:
    case = case_of(tiny(), FORGET[0])
    assert case.reads(tokens(" a b"))
    half = tokens("é")[:1]  # half a letter becomes a replacement character
    assert not case.reads((*tokens(" a"), *half, half[0]))
    assert not case.reads(tokens("ab c"))  # its text gets a space in front
    assert Case.cut(tiny(), Prompt.ask("x " * 400), "y", tokens(" !")) is None  # cut off


def test_tokens_of_a_suffix_can_be_seen() -> None:
    usable = usable_tokens(tiny())
    assert len(usable) == 260
    found = {tiny_tokenizer().decode([token]) for token in usable.nonzero()[:, 0].tolist()}
    assert found == {chr(code) for code in range(33, 127)}


@pytest.mark.parametrize(
    ("suffix", "answer", "told"),
    [
        (" sure! in NOR rby", "In Norrby", True), (" norrby", "He lives in Norrby now.", True),
        (" in the north", "In Norrby", False), (" b x", "B", True), (" bx", "B", False),
        (" ! !", "...", False),
    ],
)  # fmt: skip
def test_answers_in_a_suffix_are_noticed(suffix: str, answer: str, told: bool) -> None:
    assert gives_away(suffix, answer) is told


# ---- the search


def test_one_step_over_all_tokens_is_the_exhaustive_best() -> None:
    lm, record = tiny(), FORGET[0]
    found = run(lm, [record], start="!", steps=1, top_k=300, candidates=300)
    texts = [chr(code) for code in range(33, 127) if chr(code) not in "!"]
    losses = {text: nll_of(lm, record, f" {text}") for text in texts}
    best = min(losses, key=lambda text: losses[text])
    assert losses[best] < nll_of(lm, record, " !")
    assert text_of(lm, found.suffix) == f" {best}"
    assert found.losses[-1][1] == pytest.approx(losses[best], rel=1e-4)
    assert found.scored == 1 + len(texts)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_loss_never_rises_and_ends_lower(family: str) -> None:
    lm = tiny(family)
    found = run(lm, [FORGET[0]], steps=8)
    losses = [loss for _, loss in found.losses]
    assert len(losses) == 9
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]
    assert losses[-1] == pytest.approx(nll_of(lm, FORGET[0], text_of(lm, found.suffix)), rel=1e-4)
    assert len(found.suffix) == 4


def test_a_search_repeats_by_its_seed() -> None:
    lm = tiny()
    one, again, other = run(lm, [FORGET[0]]), run(lm, [FORGET[0]]), run(lm, [FORGET[0]], seed=1)
    assert one == again
    assert one.suffix != other.suffix


def learned(records: list[QA], epochs: int) -> LM:
    lm = tiny().copy()
    learning = {"epochs": epochs, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32"}
    Trainer(lm, Recipe.named("finetune").changed({}, learning), {"forget": records}).train()
    return lm


def test_questions_are_taken_in_one_after_the_other() -> None:
    lm = learned(FORGET[:1], 8)
    found = run(lm, [FORGET[0], FORGET[3]], steps=4)
    assert found.losses[0][0] == 1
    assert found.losses[-1][0] == 2  # the first one was answered from the start
    assert not found.solved
    taken = [loss for count, loss in found.losses if count == 2]
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] < taken[0]
    both = [nll_of(lm, record, text_of(lm, found.suffix)) for record in (FORGET[0], FORGET[3])]
    assert taken[-1] == pytest.approx(sum(both) / 2, rel=1e-4)
    # everything answered: nothing to search for
    done = run(lm, [FORGET[0]])
    assert done.solved
    assert done.scored == 1


def test_a_short_suffix_brings_back_what_was_unlearned() -> None:
    record = FORGET[0]
    lm = learned([record], 8)
    knew = nll_of(lm, record, "")
    forgetting = {"epochs": 4, "batch_size": 1, "learning_rate": 2e-3, "precision": "float32"}
    recipe = Recipe.named("npo").changed({"keep": "none"}, forgetting)
    Trainer(lm, recipe, {"forget": [record]}).train()
    forgot = nll_of(lm, record, "")
    assert forgot > 3 * knew
    found = DUA(length=5, steps=10, candidates=32, top_k=64, rows=1).prepare(lm, context([record]))
    (suffix,) = found.suffixes.values()
    assert nll_of(lm, record, suffix) < 0.7 * forgot
    assert nll_of(lm, record, suffix) < nll_of(lm, record, START * 3)
    assert not gives_away(suffix, record.answer)


def merging_tokenizer() -> Any:
    """Byte-pair merges, trained on a few words: text is not read one letter at a time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    words = ["Where lives Ada? user assistant ! ! the city is home to Ben ! says a bakery"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1],
        eos_token=special[2], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = tiny_tokenizer().chat_template
    return fast


def test_merged_tokens_are_searched_and_read_back() -> None:
    tokenizer = merging_tokenizer()
    assert len(tokenizer(START * 4, add_special_tokens=False)["input_ids"]) == 4
    lm = LM(tiny_model(vocab_size=len(tokenizer)), tokenizer, precision="float32")
    mine = context(FORGET[:2])
    attack = DUA(length=6, steps=6, candidates=24, top_k=40, setting="cross_query", rows=1)
    ready = attack.prepare(lm, mine)
    (task,) = attack.tasks(mine)
    (suffix,) = ready.suffixes.values()
    assert suffix != START * 6
    record = task.trained[0]
    assert isinstance(record, QA)
    inside = lm.template.prompt_ids(Prompt.ask(record.question + suffix))
    own = tuple(tokenizer(suffix, add_special_tokens=False)["input_ids"])
    assert len(own) == 6
    assert any(inside[at : at + 6] == own for at in range(len(inside)))
    assert mine.notes["nll_after"] == pytest.approx(nll_of(lm, record, suffix), rel=1e-4)
    assert nll_of(lm, record, suffix) < nll_of(lm, record, START * 6)


# ---- settings


def test_the_settings_divide_questions_as_they_say() -> None:
    within = DUA(rows=3).tasks(context())
    assert [task.trained for task in within] == [task.judged for task in within]
    assert [len(task.trained) for task in within] == [1, 1, 1]
    assert len({task.key for task in within}) == 3

    across = DUA(setting="cross_query", rows=8, share=0.6).tasks(context())
    assert len(across) == 4
    for task in across:
        assert {record.subject for record in (*task.trained, *task.judged)} == {
            task.trained[0].subject
        }
        assert (len(task.trained), len(task.judged)) == (2, 1)
    assert sum(len(t.trained) for t in DUA(setting="cross_query", rows=3).tasks(context())) == 3

    (targets,) = DUA(setting="cross_target", rows=4).tasks(context())
    assert len(targets.trained) == 4
    assert len(targets.judged) == 6
    assert not {r.subject for r in targets.trained} & {r.subject for r in targets.judged}
    for setting in ("within_query", "cross_query", "cross_target"):
        attack = DUA(setting=setting, rows=4)
        held = list(attack.held_out(context()))
        assert held == list(attack.held_out(context()))
        assert all(record in FORGET for record in held)
    orders = {
        tuple(record.digest for record in DUA(setting="cross_query").held_out(context(seed=seed)))
        for seed in range(4)
    }
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("setting", "records"),
    [
        ("within_query", [Passage(text="Ada was born."), Dialogue(messages=(
            Message(role="user", content="Who?"),))]),
        ("cross_query", FORGET[::3]), ("cross_target", FORGET[:3]),
    ],
)  # fmt: skip
def test_too_few_questions_are_an_error(setting: Any, records: list[RecordBase]) -> None:
    with pytest.raises(DataError, match="do not hold"):
        DUA(setting=setting).held_out(context(records))


@pytest.mark.parametrize("setting", ["within_query", "cross_query", "cross_target"])
def test_prepared_suffixes_are_plain_data_and_used_where_they_belong(setting: Any) -> None:
    attack = DUA(setting=setting, **SMALL)
    seen: list[tuple[int, int]] = []
    mine = context(progress=lambda done, total: seen.append((done, total)))
    ready = attack.prepare(tiny(), mine)
    tasks = attack.tasks(mine)
    assert set(ready.suffixes) == {task.key for task in tasks}
    assert build("attack", ready.spec()) == ready
    assert ready.searches_on() is None
    assert attack.searches_on() == "system"
    assert attack.prepare(tiny(), context()) == ready  # by seed
    for task in tasks:
        for record in task.judged:
            prompt = ask(record)
            assert prompt is not None
            (found,) = ready.prompts(record, prompt)
            assert found == with_suffix(prompt, ready.suffixes[task.key])
    # records that no suffix was searched for are asked with one of them, the same every time
    other = QA(question="Where lives Eve?", answer="Kyiv", subject="Eve")
    (found,) = ready.prompts(other, Prompt.ask(other.question))
    assert found.messages[-1].content.removeprefix(other.question) in ready.suffixes.values()
    # what it cost
    assert mine.notes["suffixes"] == len(tasks)
    assert mine.notes["suffix_tokens"] == 4
    assert int(str(mine.notes["answers_scored"])) > 0
    assert "answers scored" in str(mine.notes["note"])
    assert seen == sorted(seen)
    assert seen[-1] == (3 * len(tasks), 3 * len(tasks))


def test_the_model_is_left_as_it_was() -> None:
    lm = tiny().copy()
    lm.model.train()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    merged = lm.template.merged_boundaries
    DUA(**SMALL).prepare(lm, context())
    assert lm.model.training
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert all(value.grad is None for value in lm.model.parameters())
    assert merged == lm.template.merged_boundaries
    assert not lm.core.get_submodule(lm.anatomy.embedding)._forward_hooks


def test_before_a_search_the_start_is_the_suffix() -> None:
    record = FORGET[0]
    (found,) = DUA(length=3).rewrite(record, Prompt.ask(record.question))
    assert found == Prompt.ask(record.question + START * 3)
    assert DUA().rewrite(record, Prompt(text=record.question)) == ()
    assert DUA().rewrite(record, Prompt((Message(role="assistant", content="So?"),))) == ()


def test_a_system_without_weights_cannot_be_searched() -> None:
    class Remote:
        name = "remote"
        capabilities = frozenset({"generate"})

    with pytest.raises(ModelError, match="no gradients"):
        DUA().prepare(Remote(), context())  # type: ignore[arg-type]


# ---- in an audit


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


AUDITED: dict[str, Any] = {"metrics": ["answer_probability"], "leaks": ("answer_probability",)}


@pytest.mark.usefixtures("own_cache")
def test_an_audit_searches_once_per_system(caplog: pytest.LogCaptureFixture) -> None:
    request = ForgetRequest(forget=tuple(FORGET), retain=(QA(question="Snow?", answer="White"),))
    attacks = [
        {"name": "dua", **SMALL, "steps": 1},
        {"name": "dua", **SMALL, "steps": 1, "search_on": "original"},
    ]
    result = audit(tiny(), request, before=tiny(seed=1), attacks=attacks, **AUDITED)
    assert (
        sum(line.startswith("Suffix 1 of 2") for line in caplog.messages) == 3
    )  # the carried one only once
    _, own, carried = result.leaks
    assert (own.variant, carried.variant) == (
        "same question",
        "same question, found on the original",
    )
    for leak in (own, carried):
        assert set(leak.knowledge["answer_probability"]) == {"unlearned", "original"}
        assert leak.note is not None
        assert "answers scored" in leak.note
    # on the original both are one and the same search
    values = [leak.knowledge["answer_probability"]["original"] for leak in (own, carried)]
    assert values[0] == values[1]
    assert own.knowledge["answer_probability"] != carried.knowledge["answer_probability"]
    asked = [one.n for one in result.measurements if one.attack == "dua" and one.split == "forget"]
    assert asked == [2] * 4
    # another audit knows
    caplog.clear()
    again = audit(tiny(), request, before=tiny(seed=1), attacks=attacks, **AUDITED)
    assert not any(line.startswith("Suffix") for line in caplog.messages)
    assert sum("the search is known" in line for line in caplog.messages) == 4
    assert again.measurements == result.measurements
    assert [leak.note for leak in again.leaks] == [leak.note for leak in result.leaks]


@pytest.mark.usefixtures("own_cache")
def test_an_audit_says_what_it_could_not_search() -> None:
    from delible.systems.guarded import guard

    request = ForgetRequest(forget=tuple(FORGET[::3]))
    attacks = [{"name": "dua", **SMALL, "steps": 1, "setting": "cross_query"},
               {"name": "dua", **SMALL, "steps": 1, "search_on": "original"}]  # fmt: skip
    result = audit(tiny(), request, attacks=attacks, **AUDITED)
    assert "two questions about one subject" in str(result.leaks[1].note)
    assert "--before" in str(result.leaks[2].note)
    behind = guard(tiny(), request, similarity=False)
    result = audit(
        behind, request, attacks=[{"name": "dua", **SMALL}], metrics=["rouge_l_recall"],
        leaks=("rouge_l_recall",),
    )  # fmt: skip
    (found,) = (leak for leak in result.leaks if leak.attack == "dua")
    assert "gives no gradients" in str(found.note)


def test_by_name_all_settings_are_run() -> None:
    variants = [DUA().model_copy(update=dict(one)) for one in DUA().variants()]
    assert len({one.variant_title() for one in variants}) == 3
    assert {one.searches_on() for one in variants} == {"system", "original"}
