"""Gradients, letters by layer and linear probes: by hand, with their ends and controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from inside_by_hand import FACTS, RECORDS, _double, states_of, text_of, three

from delible.attacks.fisher import mask
from delible.attacks.logit_lens_choice import as_choice
from delible.component import build
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, InsideAttack, Seen
from delible.measure.linear_probe import fit_probe
from delible.records import QA, Choice, Passage, RecordBase
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.world.templates import false_answers

LAYERS = 3
TOWNS = ("Norrby", "Casta", "Umber", "Tolmin", "Quarrow", "Zelden", "Irmo", "Wyke")


def look(name: str, lm: LM, context: AttackContext, **options: Any) -> Seen:
    attack = build("attack", {"name": name, **options})
    assert isinstance(attack, InsideAttack)
    return attack.look(lm, context.forget, context)


def towns(count: int = 8) -> list[RecordBase]:
    return [
        QA(question=f"Where was no. {place} born?", answer=f"In {town}.", subject=f"no. {place}",
           group="town")
        for place, town in enumerate(TOWNS[:count])
    ]  # fmt: skip


# ---- Fisher


def squares_by_hand(lm: LM) -> list[np.ndarray]:
    """Mean squared gradients by block, float64."""
    core = _double(lm)
    blocks = core.get_submodule(lm.anatomy.blocks)
    found: list[Any] = [0.0] * LAYERS
    for record, fact in zip(RECORDS, FACTS, strict=True):
        ids, first, end = text_of(record, fact)  # type: ignore[arg-type]
        core.zero_grad()
        logits = core(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(1)
        sum(logprobs[place - 1, ids[place]] for place in range(first, end)).div(
            end - first
        ).backward()  # type: ignore[union-attr]
        for layer, block in enumerate(blocks):
            each = [one.grad.flatten() ** 2 for one in block.parameters()]
            found[layer] = found[layer] + torch.cat(each).numpy() / len(RECORDS)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_is_measured_where_the_reference_differs_most(family: str) -> None:
    models = three(family)
    found = look("fisher", models.unlearned, models.context(), tokens=64, share=0.01)
    m, r, u = (
        squares_by_hand(one) for one in (models.original, models.reference, models.unlearned)
    )
    shares, weights = [], []
    for layer in range(LAYERS):
        places = np.argsort(m[layer] - r[layer])[: int(0.01 * len(m[layer]))]
        way = float((r[layer] - m[layer])[places].mean())
        left = float((r[layer] - u[layer])[places].mean())
        shares.append(1 - min(1, max(0, left / way)))
        weights.append(way)
    mean = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
    assert list(found.layers) == pytest.approx([1 - one for one in shares], abs=2e-3)
    assert found.numbers["like_the_reference"] == pytest.approx(mean, abs=2e-3)
    assert 0.02 < mean < 0.98


def test_a_mask_is_where_the_reference_has_more() -> None:
    original, reference = torch.tensor([1.0, 5, 0, 2]), torch.tensor([3.0, 1, 0, 9])
    found = mask(original, reference, 0.5)
    assert found is not None
    assert sorted(found.places.tolist()) == [0, 3]
    assert (found.original, found.reference) == (1.5, 6.0)
    assert [found.gone(value) for value in (1.5, 6.0, 3.75, 0.0, 9.0)] == [0, 1, 0.5, 0, 1]
    assert mask(reference * 2, reference, 0.5) is None
    assert mask(original, reference, 1e-9) is not None  # one weight at least
    with pytest.raises(ModelError, match="other weights"):
        mask(original, reference[:2], 0.5)


def test_fisher_of_an_adapter_is_that_of_the_merged_model() -> None:
    from peft import LoraConfig, get_peft_model

    models = three("llama")
    worn = models.unlearned.copy()
    torch.manual_seed(0)
    worn.wear(get_peft_model(worn.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])))
    with torch.no_grad():
        for name, weight in worn.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    worn.touch()
    before = {name: one.requires_grad for name, one in worn.model.named_parameters()}
    found = look("fisher", worn, models.context())
    assert {name: one.requires_grad for name, one in worn.model.named_parameters()} == before
    merged = look("fisher", worn.merged(), models.context())
    assert list(found.layers) == pytest.approx(list(merged.layers), abs=1e-4)
    plain = look("fisher", models.unlearned, models.context())
    assert list(found.layers) != pytest.approx(list(plain.layers), abs=1e-4)
    for name in ("patching", "cka"):
        worn_layers = look(name, worn, models.context()).layers
        assert list(worn_layers) == pytest.approx(
            list(look(name, worn.merged(), models.context()).layers), abs=2e-3
        )


# ---- letters


@torch.no_grad()
def streams_by_hand(lm: LM, ids: Sequence[int]) -> dict[str, list[Any]]:
    """The four streams of Llama's layers at the last token, float64."""
    core = _double(lm)
    seen: dict[str, list[Any]] = {"block": [], "mlp": [], "attention": [], "middle": []}

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[name].append((output[0] if isinstance(output, tuple) else output)[0, -1])

        return hook

    def before(_: Any, given: Any) -> None:
        seen["middle"].append(given[0][0, -1])

    handles = []
    for block in core.model.layers:
        handles += [
            block.register_forward_hook(keep("block")),
            block.mlp.register_forward_hook(keep("mlp")),
            block.self_attn.register_forward_hook(keep("attention")),
            # what the second norm reads is the stream in the middle
            block.post_attention_layernorm.register_forward_pre_hook(before),
        ]
    core(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def letters_by_hand(lm: LM, records: Sequence[RecordBase]) -> dict[str, np.ndarray]:
    """Right or not by stream, [layer, record], with Llama's norm and head written out."""
    core, tokenizer = _double(lm), tiny_tokenizer()
    letters = tokenizer("ABCD", add_special_tokens=False)["input_ids"]
    found: dict[str, list[Any]] = {}
    for record in records:
        choice = as_choice(record, records, 4, Random(f"0/letters/{record.digest}"))
        assert choice is not None
        lines = [f"{letter}. {text}" for letter, text in zip("ABCD", choice.options, strict=True)]
        asked = "\n".join([choice.question, *lines, "Answer with the letter only."])
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for stream, states in streams_by_hand(lm, ids).items():
            column = []
            for state in states:
                size = (state**2).mean() + core.config.rms_norm_eps
                logits = core.lm_head.weight @ (state / size.sqrt() * core.model.norm.weight)
                values = [float(logits[letter]) for letter in letters]
                column.append(values.index(max(values)) == choice.correct)
            found.setdefault(stream, []).append(column)
    return {stream: np.array(rows, float).T for stream, rows in found.items()}


def test_letters_are_read_from_every_layer_and_stream() -> None:
    lm = LM(tiny_model("llama", seed=5), tiny_tokenizer(), precision="float32")
    right = letters_by_hand(lm, towns())
    found = look("logit_lens_choice", lm, AttackContext(towns(), (), (), None, 0))
    means = {stream: rows.mean(axis=1) for stream, rows in right.items()}
    assert dict(found.numbers) == pytest.approx(
        {f"share_{stream}": one.max() for stream, one in means.items()}
    )
    by_layer = np.max(list(means.values()), axis=0)
    assert list(found.layers) == pytest.approx(by_layer.tolist())
    assert by_layer.min() < by_layer.max()
    assert found.items is not None
    read = [item.value for item in found.items["forget"]]
    best = by_layer.max()
    assert sum(one or 0 for one in read) / len(read) == pytest.approx(best)
    among = [rows[place].tolist() for stream, rows in right.items()
             for place in np.flatnonzero(means[stream] == best)]  # fmt: skip
    assert read in among


def test_a_record_becomes_a_choice_with_one_right_answer() -> None:
    records = towns()
    places = Counter[int]()
    for record in records:
        choice = as_choice(record, records, 4, Random(record.digest))
        assert choice is not None
        assert isinstance(record, QA)
        assert choice.options[choice.correct] == record.answer
        assert len(set(choice.options)) == 4
        places[choice.correct] += 1
    assert len(places) > 1
    own = Choice(question="Which?", options=("a", "b", "c"), correct=2)
    assert as_choice(own, records, 4, Random(0)) is own
    assert as_choice(Passage(text="Bread rises."), records, 4, Random(0)) is None


# ---- probes


def newton(x: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """The same minimum by Newton's steps on scaled features."""
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    a = np.column_stack([x, np.ones(len(x))])
    ridge = np.diag([penalty] * x.shape[1] + [0.0])
    point = np.zeros(a.shape[1])
    for _ in range(60):
        p = 1 / (1 + np.exp(-a @ point))
        gradient = a.T @ (p - labels) + ridge @ point
        point -= np.linalg.solve(a.T @ (a * (p * (1 - p))[:, None]) + ridge, gradient)
    return point[:-1], float(point[-1])


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_the_probe_is_logistic_regression_at_its_minimum(penalty: float) -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(14, 5)) * [1, 10, 0.1, 3, 1] + 4
    labels = x[:, 0] + random.normal(size=14) > 4
    weights, bias = newton(x, labels, penalty)
    probe = fit_probe(x, labels, penalty)
    assert probe.weights == pytest.approx(weights, abs=1e-5)
    assert probe.bias == pytest.approx(bias, abs=1e-5)
    new = random.normal(size=(3, 5)) + 4
    expected = (new - x.mean(axis=0)) / x.std(axis=0) @ weights + bias
    assert probe(new) == pytest.approx(expected, abs=1e-4)
    still = np.column_stack([x, np.full(14, 7.0)])  # a feature that never moves says nothing
    assert fit_probe(still, labels, penalty).weights[-1] == pytest.approx(0)


def probe_by_hand(lm: LM, records: Sequence[RecordBase], first: Sequence[bool]) -> np.ndarray:
    """The share of each record's statements told right, [layer, record]."""
    tokenizer = tiny_tokenizer()
    states = []
    for record in records:
        assert isinstance(record, QA)
        random = Random(f"0/probe/{record.digest}")
        wrong = false_answers(record, records, 1, random, Counter())[0]
        pair = []
        for answer in (record.answer, wrong):
            asked = f"Question: {record.question}\nAnswer: {answer}\nIs this answer true or false?"
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            pair.append(states_of(lm, ids)[:, -1].numpy())
        states.append(pair)
    found = np.zeros((LAYERS, len(records)))
    for layer in range(LAYERS):
        for side in (True, False):
            rows = [one[layer] for pair, own in zip(states, first, strict=True) if own == side
                    for one in pair]  # fmt: skip
            x = np.stack(rows)
            weights, bias = newton(x, np.tile([1.0, 0.0], len(rows) // 2), 1.0)
            for place, (pair, own) in enumerate(zip(states, first, strict=True)):
                if own != side:
                    odds = [
                        float((one[layer] - x.mean(0)) / x.std(0) @ weights + bias) for one in pair
                    ]
                    found[layer, place] = ((odds[0] > 0) + (odds[1] <= 0)) / 2
    return found


def test_the_probe_learns_on_one_half_and_tells_of_the_other() -> None:
    from delible.train.randomness import generator, shuffled

    lm = LM(tiny_model("llama", seed=5), tiny_tokenizer(), precision="float32")
    records = towns()
    half = set(shuffled(list(range(8)), generator(0, "probe.halves"))[:4])
    told = probe_by_hand(lm, records, [place in half for place in range(8)])
    found = look("probe", lm, AttackContext(records, (), (), None, 0))
    shares = told.mean(axis=1)
    assert list(found.layers) == pytest.approx(shares.tolist())
    assert found.numbers["share_told_right"] == pytest.approx(shares.max())
    assert found.numbers["best_layer"] == 1 + shares.argmax()
    assert found.items is not None
    assert [item.value for item in found.items["forget"]] == told[shares.argmax()].tolist()
    assert shares.max() > 0


class Knowing:
    """States in which what is true stands in one feature, or nowhere."""

    def __init__(self, knows: bool) -> None:
        self.knows = knows

    def states(self, lm: Any, spans: Sequence[Any]) -> list[Any]:
        random = np.random.default_rng(0)
        found = []
        for place in range(len(spans)):
            state = random.normal(size=(2, 1, 6))
            state[1, 0, 3] += 6.0 * self.knows * (1 if place % 2 == 0 else -1)
            found.append({"block": torch.tensor(state)})
        return found


def test_what_is_known_is_found_in_its_layer_and_shuffled_labels_find_nothing() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    records = [
        QA(question=f"Where was no. {place} born?", answer=f"In {TOWNS[place % 8]}.",
           subject=f"no. {place}", group="town")
        for place in range(40)
    ]  # fmt: skip

    def share(knows: bool, **options: Any) -> tuple[float, Seen]:
        context = AttackContext(records, (), (), None, 0, states=Knowing(knows))  # type: ignore[arg-type]
        seen = look("probe", lm, context, **options)
        return float(seen.numbers["share_told_right"] or 0), seen

    known, seen = share(True)
    assert known > 0.95
    assert seen.numbers["best_layer"] == 2
    assert seen.layers[0] < 0.7  # type: ignore[operator]
    assert share(False)[0] < 0.7
    assert share(True, shuffled=True)[0] < 0.75
    control = build("attack", {"name": "probe", "shuffled": True})
    assert control.control
    assert not build("attack", "probe").control


def test_records_of_one_fact_are_on_one_side() -> None:
    """A probe that saw a fact in other words would only have to remember it."""
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    twice = [*towns(), *(one.model_copy(update={"question": f"{one.question} Say."})  # type: ignore[attr-defined]
                         for one in towns())]  # fmt: skip
    attack = build("attack", "probe")
    sides = []
    original = type(attack)._one_layer

    def watched(self: Any, states: Any, first: Any, seed: int) -> Any:
        sides.append(first.tolist())
        return original(self, states, first, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(attack), "_one_layer", watched)
        attack.look(lm, twice, AttackContext(twice, (), (), None, 0))
    assert sides[0][:8] == sides[0][8:]
    assert sorted(sides[0][:8]) == [False] * 4 + [True] * 4


# ---- all of them


@pytest.mark.parametrize("name", ["logit_lens_choice", "probe"])
def test_without_a_reference_the_floor_is_what_was_never_seen(name: str) -> None:
    models = three("llama")
    unseen = [
        one.model_copy(update={"question": one.question.replace("no.", "nr.")})  # type: ignore[attr-defined]
        for one in towns()
    ]
    context = AttackContext(towns(), (), (), None, 0, holdout=unseen)
    found = look(name, models.original, context)
    assert found.items is not None
    assert set(found.items) == {"forget", "holdout"}
    assert len(found.items["holdout"]) == len(unseen)
    beside = AttackContext(
        towns(), (), (), None, 0, holdout=unseen, reference=models.reference
    )  # fmt: skip
    with_reference = look(name, models.original, beside)
    assert set(with_reference.items) == {"forget"}  # type: ignore[arg-type]
    assert with_reference.items["forget"] == found.items["forget"]  # type: ignore[index]


def test_what_cannot_be_asked_is_said() -> None:
    lm = three("llama").original
    texts: list[RecordBase] = [Passage(text="Bread rises.")]
    with pytest.raises(DataError, match="no false answers"):
        look("logit_lens_choice", lm, AttackContext(texts, (), (), None, 0))
    with pytest.raises(DataError, match="0 facts"):
        look("probe", lm, AttackContext(texts, (), (), None, 0))
    with pytest.raises(DataError, match="1 facts"):
        look("probe", lm, AttackContext(towns(1), towns(3)[1:], (), None, 0))
    mixed = look("logit_lens_choice", lm, AttackContext([*texts, *towns()], (), (), None, 0))
    items = mixed.items["forget"]  # type: ignore[index]
    assert items[0].value is None
    assert items[0].reason
    assert all(item.value is not None for item in items[1:])


def test_a_stream_that_cannot_be_told_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delible.attacks.logit_lens_choice.middle_part", lambda lm: None)
    context = AttackContext(towns(), (), (), None, 0)
    found = look("logit_lens_choice", three("llama").original, context)
    assert set(found.numbers) == {"share_block", "share_mlp", "share_attention"}
    assert "middle" in str(context.notes["note"])


@pytest.mark.parametrize(
    "name", ["patching", "lens", "cka", "fisher", "logit_lens_choice", "probe"]
)
def test_budgets_count_the_passes(name: str) -> None:
    attack = build("attack", name)
    budget = attack.budget(AttackContext(towns(), (), (), None, 0))
    assert budget.queries == (16 if name == "probe" else 8)
    assert budget.steps == (8 if name == "fisher" else 0)
