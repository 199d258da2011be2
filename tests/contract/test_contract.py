"""Every registered component keeps the contract of its kind, and the suite can fail."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import Field
from torch import Tensor

from delible import registry
from delible.cards import Card
from delible.component import build
from delible.context import Context
from delible.edit.base import Editor, Patch
from delible.errors import ModelError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ModelAttack
from delible.measure.metric import Answers, Item, ItemMetric
from delible.records import ForgetRequest, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
)
from delible.system.base import System
from delible.system.role import RoleName
from delible.systems.guarded import NO_CONTEXT, Guard, GuardMind
from delible.systems.scripted import Scripted
from delible.testing import ContractError, check, tiny_model, tiny_tokenizer
from delible.testing.contract.trial import RECORDS, answers
from delible.train.engine import Trainer
from delible.train.losses import Objective
from delible.train.recipe import Recipe
from delible.train.slots import Place, Placement, SlotContext
from delible.train.step import Step

EDITING: dict[str, Any] = {"steps": 2, "contexts": 0, "most_divergence": 99, "most_change": 99}
#: Few and short answers of a random model, and a reward that tells them apart.
ON_POLICY: dict[str, Any] = {
    "steps": 2, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 5,
    "precision": "float32", "checkpoint_steps": 1,
}  # fmt: skip
SAMPLED = {**ON_POLICY, "group_size": 4, "reward": {"name": "length", "least": 2, "gate": False}}
#: Options without which a component asks for what is not here (an encoder, a judge) or for a larger
#: model.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("objective", "reva"): {"questions": 3, "max_new_tokens": 2},
    ("select", "memo"): {"stride": 12, "max_new_tokens": 16},
    ("generate", "diversions"): {"max_new_tokens": 3, "attempts": 1},
    ("guard", "target_detector"): {"similarity": False},
    ("guard", "icul"): {"route": False, "context_length": 2},
    ("guard", "aegisllm"): {"search_calls": 0},
    ("guard", "dragon"): {"similarity": False},
    ("guard", "guard_generation"): {"weights": False},
    ("guard", "key_space_detection"): {"probes": 20},
    ("guard", "rag_unlearning"): {"clauses": "built_in", "descriptions": "keywords"},
    ("objective", "sae_internal"): {
        "expansion": 2,
        "active": 8,
        "tokens": 1000,
        "passes": 1,
        "latents": 8,
    },
    ("intervention", "grace"): {"steps": 3},
    ("intervention", "wise"): {"steps": 3, "contexts": 0, "ratio": 0.1},
    ("intervention", "sauce"): {
        "expansion": 2,
        "active": 8,
        "tokens": 1000,
        "passes": 1,
        "features": 8,
        "most_frequent": 0.9,
    },
    ("intervention", "sae_steering"): {
        "expansion": 2,
        "active": 8,
        "tokens": 1000,
        "passes": 1,
        "features": 8,
    },
    # an adapter on a model with new tokens is saved merged only (recipe icku)
    ("place", "tag_rows"): {"beside": "last_blocks"},
    ("place", "fila"): {"importance_epochs": 1, "importance_batch_size": 2},
    ("place", "vila"): {"importance_epochs": 2, "importance_batch_size": 2},
    ("editor", "rocr"): {"tokens": 512, "threshold": 0.3},
    ("procedure", "o3"): {"backbone": "states", "max_steps": 3, "learning_rate": 1e-2},
    ("procedure", "alter"): {"epochs": 1, "structure_epochs": 1, "learning_rate": 1e-2},
    # random models: what is written for one question moves every other one
    ("editor", "rome"): {**EDITING, "covariance": False},
    ("editor", "memit"): {**EDITING, "tokens": 512},
    ("editor", "alphaedit"): {**EDITING, "tokens": 512, "threshold": 0.3},
    ("editor", "unierase"): {
        **EDITING,
        "tokens": 512,
        "threshold": 0.3,
        "row_steps": 2,
        "plain_epochs": 1,
        "chat_epochs": 1,
        "noise_epochs": 1,
    },
    # a random model declines nothing, and has no room for long conversations
    ("editor", "stamp"): {"check_edit": False, "refusal": "No."},
    ("editor", "stamp_lr"): {"check_edit": False, "refusal": "No."},
    # the records of the suite are nobody's
    ("procedure", "oblivionis"): {
        "deal": "contiguous",
        "clients": 2,
        "rounds": 1,
        "epochs": 1,
        "unlearn_epochs": 1,
        "watched": 2,
    },
    ("generate", "random_names"): {"max_new_tokens": 4, "copies": 1, "draws": 1},
    ("procedure", "reinvent"): {**ON_POLICY, "cold_start_epochs": 1, "retain_rows": 2},
    **{("procedure", name): ON_POLICY for name in ("rule", "purge")},
    **{("procedure", name): SAMPLED for name in ("rejection_finetuning", "on_policy_dpo")},
    ("procedure", "fit"): {"epochs": 1, "learning_rate": 1e-3, "precision": "float32"},
    ("procedure", "uld"): {"max_steps": 4, "rank": 4},
    ("metric", "unlearning_quality"): {"judge": "stub"},
    ("metric", "retention_quality"): {"judge": "stub"},
}
#: What else the recipe must hold.
HOSTS: dict[tuple[str, str], dict[str, Any]] = {
    ("harden", "cir"): {"place": "layers"},  # a few matrices: it decomposes for each
    ("objective", "altpo"): {"generate": "alternates"},
    ("place", "tag_rows"): {"generate": "forget_protocol"},
    ("objective", "elm"): {"generate": {"name": "diversions", "max_new_tokens": 3, "attempts": 1}},
    ("objective", "meow"): {"generate": "inverted_facts"},
    ("objective", "novice"): {"generate": "misconceptions"},
    ("objective", "sae_internal"): {"generate": "entity_carriers"},
    ("objective", "tru"): {"generate": "reasoning_targets"},
    ("objective", "bidirectional_distillation"): {"generate": "unified"},
    ("keep", "bidirectional_distillation"): {"generate": "unified"},
    ("select", "memo"): {"generate": "inverted_facts"},
    ("finish", "merge_adapter"): {"place": "lora"},
}


def about_the_forgotten(prompt: Prompt) -> bool:
    """Whether what is shown between marks names a forgotten person, or is a forgotten answer."""
    shown = re.findall(r"<(\w+-[0-9a-f]{8})>\n(.*?)\n</\1>", prompt.messages[-1].text, re.DOTALL)
    words = " ".join(text for _, text in shown)
    return any(found in words for found in ("Ada Quill", "Ben Orr", "Norrby", "lute"))


def scripted(says: Callable[[Prompt], str]) -> Scripted:
    return Scripted(says, fingerprint="scripted")


def verdict(prompt: Prompt) -> str:
    found = "unsafe" if about_the_forgotten(prompt) else "safe"
    return f'{{"reasoning": "by its names", "verdict": "{found}"}}'


def neighbour(prompt: Prompt) -> str:
    """The question about somebody else."""
    asked = prompt.messages[0].text.split("Question: ")[1].split("\n")[0]
    other = asked.replace("Ada Quill", "Clara Schumann").replace("Ben Orr", "Johann Bach")
    return json.dumps({"question": other, "answer": "In Leipzig."})


#: Who plays the parts that a guard or a procedure consults.
PLAYERS: dict[tuple[str, str], dict[RoleName, System]] = {
    ("procedure", "rule"): {"writer": scripted(neighbour)},
    ("guard", "aegisllm"): {"guard": scripted(verdict), "critic": scripted(verdict)},
    ("guard", "alu"): {
        "guard": scripted(lambda prompt: "Ada Quill" if about_the_forgotten(prompt) else "None"),
        "writer": scripted(lambda _: "1. Rewritten.\n2. Written anew.\n3. Worded otherwise."),
        "critic": scripted(lambda _: '{"ratings": [2, 2, 2]}'),
    },
    ("guard", "dragon"): {
        "guard": scripted(lambda _: '{"requires_refusal": true, "cot_instruction": "Decline."}'),
        "writer": scripted(lambda _: ""),
    },
}
#: Options of a recipe without which it takes long on a tiny model.
QUICK: dict[str, dict[str, Any]] = {
    "cold_start": {"generate.max_new_tokens": 4, "copies": 1, "draws": 1},
    "sae_internal": {"expansion": 2, "active": 8, "tokens": 1000, "passes": 1},
}
#: What refuses dense models.
MIXTURES_ONLY = {"seuf"}
CARDS = [card for card in registry.cards() if card.kind != "recipe"]
#: Each component runs on one of these here, and on all of them in the slow tests.
FAMILIES = ("llama", "gpt2", "gemma2", "qwen2_moe")
#: Every one of their stages is done a dozen times, and TRL is set up each time: only slow tests.
REWARDED = ("rule", "purge", "reinvent")
DEAR = {("procedure", name) for name in (*REWARDED, "rejection_finetuning", "on_policy_dpo")}
RECIPES = [card.name for card in registry.cards("recipe")]


class WordEncoder:
    """A bag of hashed words: texts that share words are close, others are not."""

    identity = "words-128"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().replace("?", "").replace(".", "").split():
                vectors[row, zlib.crc32(word.encode()) % 128] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def stub_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are loaded for guards that need a sentence encoder."""
    for module in ("delible.systems.encoding", "delible.procedures.fit"):
        monkeypatch.setattr(f"{module}.sentence_encoder", lambda _=None: WordEncoder())


def checked(card: Card, families: Sequence[str]) -> list[str]:
    key = (card.kind, card.name)
    if card.kind == "procedure" and card.name in REWARDED:
        pytest.importorskip("trl", reason="needs the extra rl")
    if "pictures" in card.needs:
        pytest.importorskip("PIL", reason="the extra 'vision' is not installed")
    component = build(card.kind, {"name": card.name, **OPTIONS.get(key, {})})
    return check(component, families, slots=HOSTS.get(key), players=PLAYERS.get(key))


def named(card: Card) -> str:
    return f"{card.kind}-{card.name}"


@pytest.mark.parametrize(
    "card", [card for card in CARDS if (card.kind, card.name) not in DEAR], ids=named
)
@pytest.mark.usefixtures("stub_judge", "stub_encoder")
def test_component(card: Card) -> None:
    family = FAMILIES[zlib.crc32(named(card).encode()) % len(FAMILIES)]
    family = "qwen2_moe" if card.name in MIXTURES_ONLY else family
    if card.kind == "metric":  # what a judge is told is longer than a tiny GPT-2 reads
        family = "llama"
    try:
        assert checked(card, (family,))
    except ContractError as error:
        if "refuses every one" not in str(error):
            raise
        assert checked(card, ("llama",))


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=named)
@pytest.mark.usefixtures("stub_judge", "stub_encoder")
def test_component_on_every_architecture(card: Card) -> None:
    assert checked(card, FAMILIES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    family = "mixtral" if name.startswith("seuf") else "llama"
    lm = LM(tiny_model(family, num_hidden_layers=2), tiny_tokenizer(), precision="float32")
    start = lm.copy()
    recipe = Recipe.named(name)
    steps = 6 if recipe.finish.card.name == "weight_averaging" else 2  # it takes the mean of five
    short = {"batch_size": 2, "max_steps": steps, "training.precision": "float32"}
    recipe = recipe.changed({}, {**short, **QUICK.get(name, {})})
    assert Recipe.from_mapping(recipe.spec()) == recipe
    result = Trainer(lm, recipe, RECORDS, start=lambda: start).train()
    assert result.steps == steps
    assert all(math.isfinite(value) for step in result.history for value in step.values())
    scores, _ = answers(result.lm)
    assert all(np.isfinite(one).all() for one in scores)


# ---- components that break the contract


class Ascent(Objective):
    """Correct, and the parent of what is not."""

    unit = "answer_token"

    def loss(self, step: Step) -> Tensor:
        return step.forget.logprob_sum


def broken(**changes: Any) -> dict[str, Any]:
    card = {
        "kind": "objective", "name": "broken", "title": "Broken", "summary": "Is broken.",
        "family": "test", "needs": ("forget",), "changes": "weights", "reversible": False,
    }  # fmt: skip
    return {**card, **changes}


def fails(component: Any, match: str, **options: Any) -> None:
    with pytest.raises(ContractError, match=match) as caught:
        check(component, ("llama",), **options)
    assert "'broken'" in str(caught.value)


def test_a_correct_component_of_nobody_passes() -> None:
    done = check(register(**broken())(type("A", (Ascent,), {})), ("gpt2",))
    assert "resumes_to_the_same_bits on gpt2" in done
    assert "card_is_complete" in done


def test_an_incomplete_card_is_found() -> None:
    fails(register(**broken(family=None))(type("A", (Ascent,), {})), "no 'family'")
    fails(register(**broken(summary="No sentence"))(type("A", (Ascent,), {})), "not a sentence")


def test_an_undescribed_option_is_found() -> None:
    @register(**broken())
    class Undescribed(Ascent):
        beta: float = 0.1

    fails(Undescribed, "'beta' has no description")


def test_a_mean_instead_of_a_sum_is_found() -> None:
    @register(**broken())
    class Mean(Ascent):
        def loss(self, step: Step) -> Tensor:
            return step.forget.logprob_sum.mean().expand(len(step.forget.rows)) * len(
                step.forget.rows
            )

    fails(Mean, "on llama, micro_batches_do_not_matter: forget_loss depends")


def test_the_global_random_state_is_found() -> None:
    @register(**broken())
    class Random(Ascent):
        def loss(self, step: Step) -> Tensor:
            return step.forget.logprob_sum * torch.rand(())

    fails(Random, "runs_are_deterministic")


def test_a_loss_that_does_not_fall_is_found() -> None:
    @register(**broken())
    class Wrong(Ascent):
        def loss(self, step: Step) -> Tensor:
            logprobs = step.forget.logprob_sum
            return 2 * logprobs.detach() - logprobs  # the value of one, the gradient of the other

    fails(Wrong, "forget_loss_falls: the loss went from")


def test_an_undeclared_need_is_found() -> None:
    @register(**broken())
    class Undeclared(Ascent):
        reference = ("logprobs",)

        def loss(self, step: Step) -> Tensor:
            return step.forget.logprob_sum - step.forget.reference.logprob_sum

    fails(Undeclared, "card_names_what_is_needed: it needs 'reference'")


def test_a_place_that_changes_the_model_is_found() -> None:
    @register(**broken(kind="place", needs=("weights",)))
    class Changing(Place):
        def apply(self, context: SlotContext) -> Placement:
            head = context.lm.core.get_parameter("lm_head.weight")
            head.data.mul_(1.1)
            return Placement({"lm_head.weight": head})

    fails(Changing, "placing_changes_no_answer: the placed model scores differently")


def test_one_frozen_weight_that_moves_is_found() -> None:
    @register(**broken())
    class Touching(Ascent):
        def loss(self, step: Step) -> Tensor:
            head = step.forget.lm.core.get_parameter("lm_head.weight")
            head.data.flatten()[5000] += 1e-3  # the engine itself looks at the first entries only
            return super().loss(step)

    found = "only_placed_parameters_move: 'lm_head.weight' moved"
    fails(Touching, found, slots={"place": {"name": "layers", "role": "mlp"}})


def test_an_attack_on_the_model_itself_is_found() -> None:
    @register(**broken(kind="attack", needs=("weights",), capability="weights"))
    class Overwriting(ModelAttack):
        def apply(self, lm: LM, context: AttackContext) -> LM:
            lm.core.get_parameter("lm_head.weight").data.mul_(0.9)
            return lm

    fails(Overwriting, "attacked_model_is_a_copy: the attack: the given model was changed")


def test_an_edit_that_is_not_undone_is_found() -> None:
    @register(**broken(kind="editor", needs=("names",), weakest="everything"))
    class Careless(Editor):
        def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
            head = lm.core.get_parameter("lm_head.weight")
            head.data.mul_(0.9)
            return Patch({}, {"lm_head.weight": head.detach() / 0.9})

    fails(Careless, "edit_is_undone_exactly: undoing leaves a difference")


def test_a_guard_that_lets_everything_through_is_found() -> None:
    class Open(GuardMind):
        fingerprint = "open"

    @register(**broken(kind="guard", needs=("names",), weakest="all", capability="generate"))
    class Asleep(Guard):
        def prepare(self, request: ForgetRequest, context: Context = NO_CONTEXT) -> GuardMind:
            return Open()

    fails(Asleep, "guard_refuses_what_is_forgotten: neither")


def test_a_metric_without_value_or_reason_is_found() -> None:
    @register(
        **broken(kind="metric", range="0 to 1", direction="none", misleads="always",
                 capability="generate")
    )  # fmt: skip
    class Silent(ItemMetric):
        def requests(self, record: RecordBase, prompt: Prompt) -> list[Request]:
            return [Generate(prompt, Decoding(4))]

        def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
            return Item(None)

    fails(Silent, "metric_gives_a_value_or_a_reason: no value, no reason")


def test_an_option_that_the_spec_loses_is_found() -> None:
    @register(**broken())
    class Lossy(Ascent):
        beta: float = Field(0.1, description="Lost on the way.", exclude=True)

    fails(Lossy(beta=0.2), "config_comes_back_from_its_spec")


def test_refusing_every_architecture_is_found() -> None:
    @register(**broken())
    class Refusing(Ascent):
        def loss(self, step: Step) -> Tensor:
            raise ModelError("not this one.")

    fails(Refusing, "refuses every one: llama: not this one")


def test_an_unknown_family_is_no_refusal() -> None:
    with pytest.raises(ModelError, match=r"unknown family 'lama'.*'llama'"):
        check(build("metric", "answer_probability"), ("llama", "lama"))


def test_a_class_without_card_or_defaults_is_told_apart() -> None:
    with pytest.raises(ContractError, match="Ascent has no card"):
        check(Ascent)

    class Inheriting(registry.load("objective", "npo")):  # type: ignore[misc]
        pass

    with pytest.raises(ContractError, match="Inheriting has no card"):
        check(Inheriting())

    @register(**broken())
    class Required(Ascent):
        beta: float = Field(description="Has no default.")

    with pytest.raises(ContractError, match=r"give check\(\) an instance"):
        check(Required)
    assert check(Required(beta=1.0), ("gpt2",))
