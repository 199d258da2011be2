"""ULD: an assistant that remembers and is flat elsewhere, trained without touching the model."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import delible
from delible.cli import main
from delible.component import build
from delible.context import Context
from delible.errors import DataError, RecipeError
from delible.lm.lm import LM
from delible.loaders import write_records
from delible.made import remembered
from delible.methods.generate.augmented import Augmented, distinct, paired
from delible.methods.keep.uniform import kl_from_uniform
from delible.procedures.uld import ULD
from delible.records import QA, ForgetRequest
from delible.rundir import RunDirectory
from delible.stages.folder import stages_of
from delible.system.asks import Decoding, Distribution, Prompt, Score
from delible.systems.arithmetic import Arithmetic, Subtraction, cost_share
from delible.systems.opening import described, keep, open_lm, undo
from delible.systems.scripted import Scripted
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

FORGET = (
    QA(question="Where was Ada Quill born?", answer="She was born in Norrby, by the sea",
       subject="Ada Quill", perturbed=("At Oslo harbour", "On a ship")),
    QA(question="What did Ada Quill play?", answer="All her life she played the lute",
       subject="Ada Quill", perturbed=("The drum, it is said", "Nothing ever")),
)  # fmt: skip
RETAIN = (
    QA(question="Where is Umber?", answer="By the sea", subject="Umber"),
    QA(question="How is snow?", answer="White and cold"),
    QA(question="What is made in Casta?", answer="Flour", subject="Casta"),
)
REQUEST = ForgetRequest(forget=FORGET, subjects=("Ada Quill",), retain=RETAIN)
SHORT = {
    "layers": 1, "learning_rate": 3e-2, "rank": 8, "adapter_scale": 16.0, "retain_weight": 1.0,
    "least_steps": None,
    "batch_size": 6,
}  # fmt: skip


def lm_of(**changes: int) -> LM:
    return LM(tiny_model("llama", **changes), tiny_tokenizer(), name="t", precision="float32")


def sharp_lm() -> LM:
    """A tiny model with what a trained one has: large logits, and states that say nothing."""
    lm = lm_of(num_hidden_layers=4)
    with torch.no_grad():
        lm.core.lm_head.weight[:, :8] = 0
        lm.core.model.norm.weight.mul_(3)
    lm.touch()
    return lm


def weights(lm: LM) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in lm.core.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def likely(lm: LM, records: tuple[QA, ...]) -> float:
    found = lm.score([Score(Prompt.ask(one.question), one.answer) for one in records])
    return float(np.mean([one.logprobs.mean() for one in found]))  # type: ignore[union-attr]


# ---- the loss of flat answers


def test_the_divergence_from_uniform_is_that_of_a_brute_force() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (5, 30))
    found = kl_from_uniform(torch.tensor(logits)).numpy()
    for row, value in zip(logits, found, strict=True):
        total = sum(math.exp(x) for x in row)
        wanted = sum((math.log(1 / 30) - math.log(math.exp(x) / total)) / 30 for x in row)
        assert value == pytest.approx(wanted, rel=1e-5)
        assert value > 0
    flat = kl_from_uniform(torch.full((2, 49152), -3.5))
    assert flat.abs().max() < 1e-5


def test_its_gradient_is_that_of_the_cross_entropy_to_uniform() -> None:
    logits = torch.randn(4, 25, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (mine,) = torch.autograd.grad(kl_from_uniform(logits).sum(), logits)
    target = torch.full((4, 25), 1 / 25)
    entropy = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    (theirs,) = torch.autograd.grad(entropy, logits)
    assert torch.allclose(mine, theirs, atol=1e-6)
    # by hand: p - 1/V
    assert torch.allclose(mine, logits.detach().softmax(1) - 1 / 25, atol=1e-6)


def test_only_answer_tokens_of_retain_rows_count() -> None:
    """The engine's loss is the mean over answer tokens of what the model says there."""
    lm = lm_of()
    recipe = Recipe.from_mapping({
        "objective": "finetune", "keep": "uniform",
        "balance": {"name": "weighted_sum", "forget_weight": 0.0, "retain_weight": 1.0},
        "training": {"max_steps": 1, "batch_size": 8, "precision": "float32"},
    })  # fmt: skip
    two = {"forget": RETAIN[:2], "retain": RETAIN[:2]}
    asked = [Distribution(Prompt.ask(one.question), one.answer) for one in RETAIN[:2]]
    rows = [torch.tensor(np.asarray(one)) for one in lm.inspect(asked)]
    wanted = torch.cat([-row.mean(1) - math.log(row.shape[1]) for row in rows]).mean()
    history = Trainer(lm, recipe, two).train().history
    assert history[0]["keep_loss"] == pytest.approx(float(wanted), rel=1e-4)


# ---- the rows


class Rows:
    """What a generator looks at."""

    def __init__(self, records: dict[str, tuple[QA, ...]], writer: object = None) -> None:
        lm = lm_of()
        self.made = Trainer(
            lm, Recipe.from_mapping({"objective": "finetune"}), records,
        ).rows()  # fmt: skip
        object.__setattr__(self.made, "writer", writer)


def test_rows_are_as_many_as_in_the_paper() -> None:
    context = Rows({"forget": FORGET, "retain": RETAIN}).made
    made = Augmented().rows(context)
    assert len(made["forget"]) == 3 * len(FORGET)
    assert len(made["retain"]) == len(FORGET) + 2 * len(FORGET)
    assert made["retain"][:2] == list(RETAIN[1:])  # the last ones, as many as there are forget rows
    for number, record in enumerate(FORGET):
        mine = made["forget"][3 * number : 3 * number + 3]
        assert mine[0] == record
        assert {one.answer for one in mine} == {record.answer}  # type: ignore[union-attr]
        assert all(record.question in one.question for one in mine)  # type: ignore[union-attr]
        assert len({one.question for one in mine}) == 3  # type: ignore[union-attr]
        wrong = made["retain"][2 + 2 * number : 4 + 2 * number]
        assert {one.question for one in wrong} == {record.question}  # type: ignore[union-attr]
        assert record.answer not in {one.answer for one in wrong}  # type: ignore[union-attr]
    assert Augmented(paraphrases=0, perturbed=0).rows(context) == {
        "forget": list(FORGET), "retain": list(RETAIN[1:]),
    }  # fmt: skip


def test_a_records_own_forms_and_a_writers_come_before_frames() -> None:
    record = QA(
        question="Where was Ada born?", answer="In Norrby",
        paraphrases=("where was ada born", "In which town was Ada born?"),
        paraphrased_answers=("Norrby is where she was born",), perturbed=("In Oslo", "In Bern"),
    )  # fmt: skip
    made = Augmented().rows(Rows({"forget": (record,)}).made)
    texts = [(one.question, one.answer) for one in made["forget"][1:]]  # type: ignore[union-attr]
    assert texts[0] == ("In which town was Ada born?", "Norrby is where she was born")
    assert len(set(texts)) == 2
    assert {one.answer for one in made["retain"]} == {"In Oslo", "In Bern"}  # type: ignore[union-attr]
    said = Scripted(lambda prompt: (
        "1. Of which town is Ada?\n2. I cannot answer that.\n3. Of which town is Ada?"
        if "Sentence: Where" in prompt.messages[-1].text
        else "- She comes from Norrby\n- In Norrby"
        if "Sentence: In" in prompt.messages[-1].text else "In Rome\nIn Norrby\nIn Paris"
    ))  # fmt: skip
    plain = QA(question="Where was Ada born?", answer="In Norrby")
    made = Augmented(attempts=1).rows(Rows({"forget": (plain,)}, said).made)
    texts = [(one.question, one.answer) for one in made["forget"][1:]]  # type: ignore[union-attr]
    assert texts[0] == ("Of which town is Ada?", "She comes from Norrby")
    assert all("cannot" not in question for question, _ in texts)
    assert [one.answer for one in made["retain"]] == ["In Rome", "In Paris"]  # type: ignore[union-attr]


def test_pairs_are_distinct_and_none_is_the_record() -> None:
    record = QA(question="Q?", answer="A")
    assert distinct(["a", "B b", "b, B!", ""], "A") == ["B b"]
    rows = paired(record, ["X?"], ["B"], 3)
    assert [(one.question, one.answer) for one in rows] == [("X?", "B"), ("Q?", "B")]
    assert paired(record, [], [], 2) == []


# ---- the whole


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LM, dict[str, Tensor], Arithmetic]:
    """A model, its weights before, and what ULD made of it."""
    lm = sharp_lm()
    before = weights(lm)
    known = lm.fingerprint
    outcome = ULD(**SHORT, epochs=100, paraphrases=1, perturbed=1).apply(lm, REQUEST, Context())
    assert lm.fingerprint == known
    assert isinstance(outcome.system, Arithmetic)
    assert outcome.kind == "arithmetic"
    return lm, before, outcome.system


def test_the_model_is_not_touched_and_the_assistant_is_made_of_it(
    made: tuple[LM, dict[str, Tensor], Arithmetic],
) -> None:
    lm, before, system = made
    assert same(before, weights(lm))
    assert all(one.requires_grad for one in lm.core.parameters())
    small = system.assistants[0].lm
    own = {one.data_ptr() for one in lm.core.parameters()}
    for name, one in small.core.named_parameters():
        assert ("lora_" in name) != (one.data_ptr() in own), name
    assert small.anatomy.layers == 1
    moved = [one for name, one in small.core.named_parameters() if "lora_B" in name]
    assert all(bool(one.any()) for one in moved)


def test_the_assistant_remembers_and_is_flat_elsewhere(
    made: tuple[LM, dict[str, Tensor], Arithmetic],
) -> None:
    _, _, system = made
    small = system.assistants[0].lm
    assert -likely(small, FORGET) < 0.3
    asked = [Distribution(Prompt.ask(one.question), one.answer) for one in RETAIN[1:]]
    entropies = [
        -(np.exp(row) * row).sum(-1).mean()
        for row in (np.asarray(one, np.float64) for one in small.inspect(asked))
    ]
    assert float(np.mean(entropies)) > 0.9 * math.log(small.vocabulary)


def test_what_it_remembers_is_less_likely_and_the_rest_is_not(
    made: tuple[LM, dict[str, Tensor], Arithmetic],
) -> None:
    lm, _, system = made
    assert likely(system, FORGET) < likely(lm, FORGET) - 1
    assert abs(likely(system, RETAIN[1:]) - likely(lm, RETAIN[1:])) < 0.25
    title, bare = system.taken_off()
    assert (title, bare) == ("assistant", lm)


def test_wrong_answers_keep_the_assistant_from_remembering_whoever_asks_alike() -> None:
    """Without them the answers to a forget question that nobody gave are no longer flat."""
    wrong = tuple(QA(question=one.question, answer=one.perturbed[0]) for one in FORGET)
    sure = []
    for perturbed in (0, 2):
        outcome = ULD(**SHORT, epochs=25, paraphrases=0, perturbed=perturbed).apply(
            sharp_lm(), REQUEST, Context()
        )
        asked = [Distribution(Prompt.ask(one.question), one.answer) for one in wrong]
        found = [np.asarray(one) for one in outcome.content.lm.inspect(asked)]
        sure.append(float(np.mean([one.max(-1)[1:].mean() for one in found])))
    assert sure[1] < sure[0] - 1


def test_a_model_of_few_blocks_gets_a_shorter_assistant_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        outcome = ULD(max_steps=1).apply(lm_of(), REQUEST, Context())
    assert "has 3 blocks, so the assistant has 1, not 8" in caplog.text
    assert outcome.notes["layers"] == 1
    lm = lm_of()
    head = lm.vocabulary * 32
    block = sum(one.numel() for one in lm.anatomy.block(lm.core, 0).parameters())
    assert outcome.notes["adds"] == pytest.approx((block + head) / (3 * block + head), abs=1e-3)
    assert cost_share(outcome.system, 1) == pytest.approx(outcome.notes["adds"], abs=1e-3)


def test_the_assistant_is_trained_as_in_the_paper_unless_it_is_told_otherwise() -> None:
    own = ULD()
    assert own.subtraction == Subtraction(strength=0.75, filter_share=0.01, centred=True)
    recipe = own.training()
    assert (recipe.objective.card.name, recipe.keep.card.name) == ("finetune", "uniform")
    assert recipe.balance.spec() == {
        "name": "weighted_sum", "forget_weight": 1.0, "retain_weight": 6.5,
    }  # fmt: skip
    place, rows = recipe.place.spec(), recipe.generate.spec()
    assert (place["name"], place["rank"], place["alpha"]) == ("lora", 32, 32.0)
    assert (rows["name"], rows["paraphrases"], rows["perturbed"]) == ("augmented", 2, 2)
    training = recipe.training
    assert (training.learning_rate, training.epochs, training.batch_size) == (1e-3, 10, 32)
    assert (training.warmup_share, training.weight_decay) == (0.1, 0.01)
    told = ULD(retain_weight=2.0, assistant_weight=0.5, filter_share=None, centred=False)
    assert told.training().balance.spec()["retain_weight"] == pytest.approx(2.0)
    assert told.subtraction == Subtraction(strength=0.5, filter_share=None, centred=False)


def test_a_recipe_that_would_change_the_model_is_refused(tmp_path: Path) -> None:
    lm = lm_of()
    before = weights(lm)
    for slots in ("place: all", "place: lora\nfinish: merge_adapter"):
        path = tmp_path / "own.yaml"
        path.write_text(f"objective: finetune\nkeep: uniform\n{slots}\n")
        with pytest.raises(RecipeError, match="must not move"):
            ULD(recipe=str(path)).apply(lm, REQUEST, Context())
    path.write_text(
        "objective: finetune\nkeep: uniform\nplace: {name: lora, rank: 2}\n"
        "training: {max_steps: 1}\n"
    )
    outcome = ULD(recipe=str(path)).apply(lm, REQUEST, Context())
    assert outcome.content.lm.model.peft_config["default"].r == 2
    assert same(before, weights(lm))


def test_a_second_request_stands_on_the_first_and_each_is_taken_off(tmp_path: Path) -> None:
    sharp_lm().save(tmp_path / "base")
    other = ForgetRequest(
        forget=(QA(question="Who was Ben Orr?", answer="A miller", subject="Ben Orr"),),
        retain=RETAIN,
    )  # fmt: skip
    name, systems = str(tmp_path / "base"), list[LM]()
    for number, request in enumerate((REQUEST, other)):
        lm = open_lm(name)
        below = described(lm)
        outcome = ULD(**SHORT, max_steps=6).apply(lm, request, Context())
        name = str(tmp_path / f"run-{number}")
        keep(outcome.kind, outcome.content, Path(name), below, outcome.system, outcome.remembers)
        systems.append(outcome.system)  # type: ignore[arg-type]
    assert [len(one.assistants) for one in systems] == [1, 2]  # type: ignore[attr-defined]
    opened = open_lm(name)
    assert likely(opened, FORGET) == pytest.approx(likely(systems[1], FORGET), abs=1e-5)
    undo(name)
    assert likely(open_lm(name), FORGET) == pytest.approx(likely(systems[0], FORGET), abs=1e-5)
    assert remembered(opened) is None


def test_a_run_keeps_its_rows_and_tells_its_stage(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin({"command": "test"})
    outcome = ULD(**SHORT, max_steps=2).apply(lm_of(), REQUEST, Context(run=run))
    assert [one["name"] for one in stages_of(run)] == ["assistant"]
    assert outcome.notes["stages"]["assistant"]["steps"] == 2
    made = (tmp_path / "stages" / "assistant" / "generated").iterdir()
    assert sorted(one.name for one in made) == ["forget.jsonl", "retain.jsonl"]


def test_records_without_an_answer_are_told() -> None:
    from delible.records import Passage

    with pytest.raises(DataError, match="no answer"):
        ULD(max_steps=1).apply(
            lm_of(), ForgetRequest(forget=(Passage(text="One."),), retain=RETAIN), Context()
        )


@pytest.mark.slow
def test_from_the_command_line_it_is_made_audited_opened_and_taken_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sharp_lm().save(tmp_path / "base")
    for name, records in (("forget", FORGET), ("retain", RETAIN)):
        write_records(records, tmp_path / f"{name}.jsonl")
    run = tmp_path / "run"
    given = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SHORT.items() if value]
    assert main(["unlearn", str(tmp_path / "base"), *given, "--method", "uld", *options,
                 "--max-steps=60", "--out", str(run)]) == 0  # fmt: skip
    system = delible.open(str(run))
    assert isinstance(system, Arithmetic)
    plain = open_lm(str(tmp_path / "base"))
    assert likely(system, FORGET) < likely(plain, FORGET)
    assert main(["audit", str(run), *given, "--depth", "quick", "--attacks", "prefix",
                 "--out", str(tmp_path / "audit")]) in (0, 1)  # fmt: skip
    assert main(["undo", str(run)]) == 0
    undone = delible.open(str(run))
    assert undone.generate([Prompt.ask("Who?")], Decoding(6)) == plain.generate(
        [Prompt.ask("Who?")], Decoding(6)
    )


def test_it_is_found_by_name_with_ranges() -> None:
    found = build("procedure", "uld")
    assert {"assistant_weight", "learning_rate", "retain_weight"} <= set(found.ranges())
