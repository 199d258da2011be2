"""Logit arithmetic: the difference by hand, two models in one loop, kept, opened and taken off."""

from __future__ import annotations

import asyncio
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from delible.api import unlearn
from delible.component import build
from delible.context import Context
from delible.edit.base import Patch
from delible.errors import ModelError, RecipeError, RunError
from delible.intervene.system import intervened
from delible.lm.beams import beam_search
from delible.lm.lm import LM
from delible.lm.shortened import shortened
from delible.lm.tail import lens_logits
from delible.records import QA, ForgetRequest
from delible.system.artefact import Artefact, read, write
from delible.system.asks import Decoding, Distribution, Hidden, Prompt, Score, TokenScores
from delible.systems.arithmetic import (
    Arithmetic,
    Assistant,
    Subtraction,
    kept_tokens,
    most_certain,
    subtracted,
    together,
)
from delible.systems.opening import described, keep, merge, open_lm, undo
from delible.systems.serving import responder
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.tuning import FineTuning

PROMPTS = [
    Prompt.ask("Where was Ada Norrby born?"),
    Prompt.ask("Who?"),
    Prompt.ask("Which prize did the painter win, and in which year was it given to her?"),
    Prompt.ask("Name a river.", prefill="The river"),
    Prompt(text="Once upon a time"),
]
ANSWERS = ("In Rome.", "In Riga, far away.")
HOW = Subtraction(strength=0.75, filter_share=0.05)
ROWS = [QA(question="Where is Norrby?", answer="North"), QA(question="Who?", answer="Ben")]
REQUEST = ForgetRequest(
    forget=(QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill"),),
    subjects=("Ada Quill",),
)


def lm_of(family: str = "llama", **changes: int) -> LM:
    return LM(tiny_model(family, **changes), tiny_tokenizer(), precision="float32")


def assistant_of(lm: LM, how: Subtraction = HOW, layers: int = 2, seed: int = 0) -> Assistant:
    """An assistant whose adapters are random, not zero."""
    from peft import LoraConfig, get_peft_model

    small = shortened(lm, layers, "assistant")
    paths = [
        name for name, module in small.core.named_modules()
        if name.startswith(f"{small.anatomy.blocks}.") and name.endswith(small.anatomy.mlp_in
           or small.anatomy.attention_in)
    ]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        worn = get_peft_model(
            small.core,
            LoraConfig(r=4, target_modules=paths, task_type="CAUSAL_LM",
                       fan_in_fan_out=small.anatomy.transposed),
        )  # fmt: skip
        for name, one in worn.named_parameters():
            if "lora_" in name:
                one.data.normal_(0, 0.3)
    small.wear(worn.eval())
    return Assistant(small, how)


def by_hand(
    logits: np.ndarray, assistant: np.ndarray, alpha: float, share: float | None, centred: bool
) -> np.ndarray:
    """The difference at one position, in float64 with loops and a whole sort."""
    b, a = logits.astype(np.float64), assistant.astype(np.float64)
    size = len(b)
    if centred:
        a = a - sum(a) / size
    log_p = b - math.log(sum(math.exp(x - max(b)) for x in b)) - max(b)
    keep = np.ones(size, bool)
    if share is not None:
        nth = sorted(log_p, reverse=True)[max(1, int(share * size)) - 1]
        keep = log_p >= min(max(log_p) + math.log(share), nth)
    return np.array([b[v] - alpha * a[v] if keep[v] else b[v] for v in range(size)])


def difference(lm: LM, assistant: Assistant, ids: list[int], last: bool = False) -> np.ndarray:
    """The combined logits of a whole text, both models called by themselves, without a cache."""
    with torch.inference_mode():
        row = torch.tensor([ids])
        b, a = (
            one.core(input_ids=row, use_cache=False).logits[0].double().numpy()[-last:]
            for one in (lm, assistant.lm)
        )
    return combined(b, a, assistant.how)


def combined(b: np.ndarray, a: np.ndarray, how: Subtraction) -> np.ndarray:
    """As :func:`by_hand`, for all positions at once."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    a = a - a.mean(-1, keepdims=True) if how.centred else a
    assert how.filter_share is not None
    ordered = np.sort(b, axis=-1)[:, ::-1]
    nth = ordered[:, [max(1, int(how.filter_share * b.shape[1])) - 1]]
    floor = np.minimum(ordered[:, :1] + math.log(how.filter_share), nth)
    return np.where(b >= floor, b - how.strength * a, b)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return np.asarray(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))


def logprobs(lm: LM) -> np.ndarray:
    found = lm.score([Score(prompt, text) for prompt in PROMPTS for text in ANSWERS])
    return np.concatenate([one.logprobs for one in found if isinstance(one, TokenScores)])


def weights(lm: LM) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in lm.core.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the difference


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("share", [None, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("spread", [0.5, 8.0])  # flat: the share decides; steep: the least number
def test_the_difference_is_that_of_a_brute_force(
    spread: float, share: float | None, centred: bool
) -> None:
    draw = np.random.default_rng(3)
    b, a = draw.normal(0, spread, (4, 300)), draw.normal(2, 3, (4, 300))
    how = Subtraction(strength=0.6, filter_share=share, centred=centred)
    found = subtracted(torch.tensor(b), torch.tensor(a), how).numpy()
    wanted = [by_hand(x, y, 0.6, share, centred) for x, y in zip(b, a, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_filter_keeps_likely_tokens_and_a_least_number_of_them() -> None:
    steep = torch.tensor([[9.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]])
    assert kept_tokens(steep, 0.3).sum() == 3  # one is likely, and three tenths are kept
    assert kept_tokens(steep, 0.01).tolist()[0] == [True] + [False] * 9
    flat = torch.tensor([[0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -9.0, -9.0, -9.0, -9.0]])
    assert kept_tokens(flat, 0.3).sum() == 6  # six are at least 0.3 as likely as the first


@pytest.mark.parametrize("share", [None, 0.01])
def test_a_flat_assistant_changes_nothing_once_it_is_centred(share: float | None) -> None:
    b = torch.tensor(np.random.default_rng(0).normal(0, 3, (5, 1000)))
    flat = torch.full_like(b, 7.3)
    found = subtracted(b, flat, Subtraction(filter_share=share))
    assert torch.allclose(found.softmax(-1), b.softmax(-1), atol=1e-12)
    raw = subtracted(b, flat, Subtraction(filter_share=share, centred=False))
    apart = 0.5 * (raw.softmax(-1) - b.softmax(-1)).abs().sum(-1)
    # raw: kept tokens lose 5.475 nats beside filtered ones; of all tokens a constant is nothing
    kept = kept_tokens(b, 0.01)
    mass = (b.softmax(-1) * kept).sum(-1)
    factor = math.exp(-0.75 * 7.3)
    wanted = mass - mass * factor / (mass * factor + 1 - mass)
    assert torch.allclose(apart, wanted if share else torch.zeros_like(apart), atol=1e-9)
    assert not share or float(apart.min()) > 0.3


def test_a_token_that_the_assistant_favours_never_gains() -> None:
    draw = torch.Generator().manual_seed(1)
    b, a = (torch.randn(20, 50, generator=draw, dtype=torch.float64) for _ in range(2))
    gold = a.argmax(-1, keepdim=True)
    shares = [
        subtracted(b, a, Subtraction(strength=alpha, filter_share=None)).softmax(-1).gather(1, gold)
        for alpha in (0.0, 0.2, 0.5, 1.0, 3.0)
    ]
    assert all(bool((later <= earlier + 1e-15).all()) for earlier, later in pairwise(shares))
    assert bool((shares[-1] < 0.5 * shares[0]).all())


def test_nothing_is_written_to_and_gradients_pass_through_both() -> None:
    b = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    before = b.detach().clone(), a.detach().clone()
    how = Subtraction(strength=0.5, filter_share=0.2)
    subtracted(b, a, how).mul(torch.linspace(0, 1, 40, dtype=torch.float64)).sum().backward()
    assert torch.equal(b.detach(), before[0])
    assert torch.equal(a.detach(), before[1])
    weight = torch.linspace(0, 1, 40, dtype=torch.float64).expand(3, 40)
    kept = torch.where(kept_tokens(before[0], 0.2), weight, 0.0)
    assert b.grad is not None
    assert a.grad is not None
    assert torch.allclose(b.grad, weight)
    assert torch.allclose(a.grad, -0.5 * (kept - kept.mean(-1, keepdim=True)))


# ---- two models in one loop


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_both_models_answer_in_one_loop_as_each_by_itself(family: str) -> None:
    lm = lm_of(family)
    assistant = assistant_of(lm)
    joint = together(lm, [assistant])
    found = joint.generate(PROMPTS, Decoding(5))
    assert found != lm.generate(PROMPTS, Decoding(5))
    assert [joint.generate([one], Decoding(5))[0] for one in PROMPTS] == found
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = list(lm.template.prompt_ids(prompt))
        start = len(ids)
        for _ in range(5):
            token = int(difference(lm, assistant, ids, last=True)[-1].argmax())
            if token in lm.ends:
                break
            ids.append(token)
        assert text == lm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    scores = joint.score([Score(prompt, text) for prompt in PROMPTS for text in ANSWERS])
    for place, score in enumerate(scores):
        row = lm.template.encode(PROMPTS[place // 2], ANSWERS[place % 2])
        wanted = log_softmax(difference(lm, assistant, list(row.ids))[row.start - 1 : -1])
        assert isinstance(score, TokenScores)
        picked = wanted[np.arange(len(wanted)), list(row.ids[row.start :])]
        np.testing.assert_allclose(score.logprobs, picked, atol=2e-4)


@pytest.mark.parametrize("shares", [(0.3, 0.3, 0.3), (0.3, 0.1, 0.6)])
def test_of_several_assistants_the_most_certain_one_is_taken_away_at_each_token(
    shares: tuple[float, ...],
) -> None:
    lm = lm_of()
    several = [
        assistant_of(lm, HOW.model_copy(update={"filter_share": share}), seed=seed)
        for seed, share in enumerate(shares)
    ]
    joint = together(together(lm, several[:1]), several[1:])
    picks = []
    for prompt in PROMPTS:
        row = lm.template.encode(prompt, ANSWERS[0])
        ids = list(row.ids)
        each = [difference(lm, one, ids) for one in several]
        with torch.inference_mode():
            alone = [
                log_softmax(one.lm.core(input_ids=torch.tensor([ids]), use_cache=False)
                            .logits[0].double().numpy())
                for one in several
            ]  # fmt: skip
        pick = [max(range(3), key=lambda k: alone[k][place].max()) for place in range(len(ids))]
        picks += pick[row.start - 1 : -1]
        wanted = log_softmax(np.stack([each[k][place] for place, k in enumerate(pick)]))
        (score,) = joint.score([Score(prompt, ANSWERS[0])])
        assert isinstance(score, TokenScores)
        wanted = wanted[row.start - 1 : -1]
        picked = wanted[np.arange(len(wanted)), ids[row.start :]]
        np.testing.assert_allclose(score.logprobs, picked, atol=2e-4)
    assert len(set(picks)) > 1
    _, rest = joint.taken_off()
    assert np.array_equal(logprobs(rest), logprobs(together(lm, several[:2])))


def test_certainty_is_that_of_the_likeliest_token_whatever_the_offset() -> None:
    flat, steep = torch.full((2, 30), 9.0), torch.zeros(2, 30)
    steep[1, 3] = 2.0
    assert most_certain([flat, steep]).tolist() == [0, 1]
    assert most_certain([steep, flat]).tolist() == [0, 0]


def test_of_strength_0_it_is_the_model_to_the_bit() -> None:
    lm = lm_of()
    joint = together(lm, [assistant_of(lm, Subtraction(strength=0))])
    assert np.array_equal(logprobs(joint), logprobs(lm))
    assert joint.generate(PROMPTS, Decoding(12)) == lm.generate(PROMPTS, Decoding(12))


def test_it_is_looked_into_as_a_model_whose_states_are_the_first_ones() -> None:
    lm = lm_of()
    assistant = assistant_of(lm)
    joint = together(lm, [assistant])
    row = lm.template.encode(PROMPTS[0], ANSWERS[0])
    (distribution,) = joint.inspect([Distribution(PROMPTS[0], ANSWERS[0])])
    wanted = log_softmax(difference(lm, assistant, list(row.ids))[row.start - 1 : -1])
    np.testing.assert_allclose(np.asarray(distribution), wanted, atol=2e-4)
    asked = [Hidden(PROMPTS[0], ANSWERS[0], 1)]
    assert np.array_equal(np.asarray(joint.inspect(asked)[0]), np.asarray(lm.inspect(asked)[0]))
    states = torch.randn(7, lm.anatomy.hidden_size, generator=torch.Generator().manual_seed(0))
    mine, theirs = (torch.cat(list(lens_logits(one, states))) for one in (joint, lm))
    assert torch.equal(mine, theirs)


def test_calls_that_come_and_go_get_the_same_answers() -> None:
    lm = lm_of()
    joint = together(lm, [assistant_of(lm)])
    wanted = joint.generate(PROMPTS, Decoding(12))
    served = responder(joint)

    async def every() -> list[str]:
        async def one(place: int) -> str:
            await asyncio.sleep(0.01 * (place % 3))
            return (await served.respond(PROMPTS[place], Decoding(12))).text

        return list(await asyncio.gather(*(one(place) for place in range(len(PROMPTS)))))

    assert asyncio.run(every()) == wanted
    served.close()  # type: ignore[attr-defined]


def test_what_would_be_answered_by_one_model_alone_is_refused() -> None:
    lm = lm_of()
    joint = together(lm, [assistant_of(lm)])
    with pytest.raises(ModelError, match="library's own generation"):
        beam_search(joint, [[5, 6, 7]], lambda *_: [0.0] * 8, beams=2, max_new_tokens=3)
    with pytest.raises(RunError, match="no single model"):
        joint.merged()
    with pytest.raises(RunError, match="saved model would answer"):
        joint.save(Path("nowhere"))


def test_models_of_other_tokens_are_refused() -> None:
    lm, other = lm_of(), lm_of(vocab_size=300)
    with pytest.raises(ModelError, match="300 tokens beside 260"):
        together(lm, [assistant_of(other)])
    renamed = lm_of()
    renamed.tokenizer.add_tokens(["neu"])
    with pytest.raises(ModelError, match=r"tokenizers differ.*'neu'"):
        together(lm, [assistant_of(renamed)])
    alone = lm_of()
    alone.road = "plain"
    with pytest.raises(ModelError, match="in batches"):
        together(alone, [assistant_of(alone)])
    with pytest.raises(ModelError, match="first 9 blocks"):
        shortened(lm, 9, "too long")


def test_the_fingerprint_knows_strength_adapter_and_model() -> None:
    lm = lm_of()
    one = together(lm, [assistant_of(lm)])
    others = [
        together(lm, [assistant_of(lm, Subtraction(strength=0.5, filter_share=0.05))]),
        together(lm, [assistant_of(lm, seed=1)]),
        together(lm, [assistant_of(lm, layers=1)]),
        together(lm_of("qwen2"), [assistant_of(lm_of("qwen2"))]),
        lm,
    ]
    known = [system.fingerprint for system in (one, *others)]
    assert len(set(known)) == len(known)
    assert together(lm, [assistant_of(lm)]).fingerprint == one.fingerprint
    lm.core.get_submodule(lm.anatomy.block_path(0)).register_forward_hook(
        lambda module, given, out: out
    )
    assert one.fingerprint != known[0]


# ---- a model among others: copied, attacked, edited, intervened on


def test_its_weights_are_the_models_own_and_a_copy_has_its_own() -> None:
    lm = lm_of()
    joint = together(lm, [assistant_of(lm)])
    own = {one.data_ptr() for one in lm.core.parameters()}
    added = [one for one in joint.core.parameters() if one.data_ptr() not in own]
    assert {one.shape[0] for one in added if one.shape[1] != 4} == {4}  # adapters alone
    twin = joint.copy()
    assert twin.fingerprint == joint.fingerprint
    assert np.array_equal(logprobs(twin), logprobs(joint))
    assert not {one.data_ptr() for one in twin.core.parameters()} & {
        one.data_ptr() for one in joint.core.parameters()
    }


@pytest.mark.parametrize("rank", [None, 4])
def test_it_is_trained_as_a_whole_on_a_copy(rank: int | None) -> None:
    lm = lm_of()
    joint = together(lm, [assistant_of(lm)])
    before, known = weights(joint), joint.fingerprint
    tuned = FineTuning(12, 1e-2, rank=rank).tuned(joint, ROWS, 0)
    assert isinstance(tuned.lm, Arithmetic)
    assert tuned.losses[1] < 0.5 * tuned.losses[0]
    asked = [Score(Prompt.ask(one.question), one.answer) for one in ROWS]
    after, start = (
        np.mean([one.logprobs.mean() for one in system.score(asked)])  # type: ignore[union-attr]
        for system in (tuned.lm, joint)
    )
    assert after > start
    assert same(before, weights(joint))
    assert joint.fingerprint == known != tuned.lm.fingerprint


def test_interventions_act_below_it_or_above_it() -> None:
    lm = lm_of()
    ablate = build("intervention", "ablate_direction")
    request = ForgetRequest(forget=REQUEST.forget, retain=tuple(ROWS))
    below = ablate.apply(lm, request, Context()).system
    assistant = assistant_of(lm)
    joint = together(below, [assistant])
    with below.evaluating(), torch.inference_mode():
        (mine,) = joint.inspect([Distribution(PROMPTS[0], ANSWERS[0])])
        (theirs,) = below.inspect([Distribution(PROMPTS[0], ANSWERS[0])])
    row = lm.template.encode(PROMPTS[0], ANSWERS[0])
    with torch.inference_mode():
        a = assistant.lm.core(input_ids=torch.tensor([row.ids])).logits[0].numpy()
    wanted = log_softmax(combined(np.asarray(theirs), a[row.start - 1 : -1], HOW))
    np.testing.assert_allclose(np.asarray(mine), wanted, atol=2e-4)
    with pytest.raises(ModelError, match="no more can act above"):
        ablate.apply(joint, request, Context())
    above = intervened(together(lm, [assistant]), below.interventions)  # type: ignore[attr-defined]
    # ablating the model's states alone: the assistant's are its own
    (other,) = above.inspect([Distribution(PROMPTS[0], ANSWERS[0])])
    np.testing.assert_allclose(np.asarray(other), np.asarray(mine), atol=2e-4)


# ---- kept, opened, taken off


@pytest.fixture
def base(tmp_path: Path) -> str:
    lm_of().save(tmp_path / "base")
    return str(tmp_path / "base")


def kept(base: str, folder: Path, **options: int) -> Arithmetic:
    lm = precise(base)
    below_it = described(lm)
    while isinstance(lm, Arithmetic):
        plain = lm.bare
        break
    else:
        plain = lm
    made = together(lm, [assistant_of(plain, **options)])
    keep("arithmetic", made.assistants[-1], folder, below_it, made)
    return made


def precise(name: str) -> LM:
    lm = open_lm(name)
    lm.precision = "float32"
    getattr(lm, "bare", lm).precision = "float32"
    return lm


def test_it_is_opened_as_it_was_and_taken_off_to_the_bit(base: str, tmp_path: Path) -> None:
    made = kept(base, tmp_path / "run")
    opened = precise(str(tmp_path / "run"))
    assert np.array_equal(logprobs(opened), logprobs(made))
    assert opened.identity == made.identity == read(tmp_path / "run").identity
    assert sorted(one.name for one in (tmp_path / "run").iterdir()) == [
        "artefact.yaml",
        "assistant",
    ]
    size = sum(one.stat().st_size for one in (tmp_path / "run").rglob("*.safetensors"))
    assert size < 0.25 * (Path(base) / "model.safetensors").stat().st_size
    undo(tmp_path / "run")
    undone = precise(str(tmp_path / "run"))
    assert np.array_equal(logprobs(undone), logprobs(precise(base)))
    undo(tmp_path / "run", back=True)
    assert np.array_equal(logprobs(precise(str(tmp_path / "run"))), logprobs(made))
    with pytest.raises(RunError, match="no single model"):
        merge(str(tmp_path / "run"), tmp_path / "merged")


def test_it_stands_on_a_patch_and_on_another_of_its_kind(base: str, tmp_path: Path) -> None:
    lm = precise(base)
    below_it = described(lm)
    name = lm.anatomy.mlp_out_parameters(1)[0]
    left, right = torch.full((32, 1), 0.1), torch.ones(1, 48)
    patch = Patch({name: (left, right)}, {})
    patch.apply(lm)
    keep("patch", patch, tmp_path / "patched", below_it, lm)
    first = kept(str(tmp_path / "patched"), tmp_path / "one")
    second = kept(str(tmp_path / "one"), tmp_path / "two", seed=5)
    assert [len(one.assistants) for one in (first, second)] == [1, 2]
    opened = precise(str(tmp_path / "two"))
    assert np.array_equal(logprobs(opened), logprobs(second))
    title, left_over = opened.taken_off() or ("", lm)
    assert title == "assistant"
    assert np.array_equal(logprobs(left_over), logprobs(first))
    undo(tmp_path / "one")  # what is below changed: the second stands on another system now
    with pytest.raises(RunError, match="its base is another one"):
        open_lm(str(tmp_path / "two"))


def test_it_stands_on_an_adapter(base: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lm = precise(base)
    below_it = described(lm)
    paths = [f"{lm.anatomy.block_path(2)}.{one}" for one in lm.anatomy.attention_in]
    lm.wear(get_peft_model(lm.core, LoraConfig(r=2, target_modules=paths, task_type="CAUSAL_LM")))
    for name, one in lm.model.named_parameters():
        if "lora_B" in name:
            one.data.fill_(0.2)
    lm.touch()
    lm.origin = precise(base).origin
    keep("adapter", lm, tmp_path / "worn", below_it, lm)
    made = kept(str(tmp_path / "worn"), tmp_path / "run")
    opened = precise(str(tmp_path / "run"))
    assert np.array_equal(logprobs(opened), logprobs(made))
    assert not np.array_equal(logprobs(opened), logprobs(precise(base)))
    undo(tmp_path / "run")
    assert np.array_equal(
        logprobs(precise(str(tmp_path / "run"))), logprobs(precise(str(tmp_path / "worn")))
    )


def test_what_does_not_say_how_it_subtracts_is_told(base: str, tmp_path: Path) -> None:
    kept(base, tmp_path / "run")
    artefact = read(tmp_path / "run")
    for options in ({"layers": 2}, {**artefact.options, "subtraction": {"strength": -1}}):
        write(artefact.model_copy(update={"options": options}), tmp_path / "run")
        with pytest.raises(RunError, match="logits are taken away"):
            open_lm(str(tmp_path / "run"))
    lacking = Artefact(**{**artefact.model_dump(), "options": {**artefact.options, "layers": 1}})
    write(lacking, tmp_path / "run")
    with pytest.raises(ModelError, match="tensors have no place in its first 1 blocks"):
        open_lm(str(tmp_path / "run"))


def test_a_strength_below_nothing_is_no_option() -> None:
    with pytest.raises(RecipeError, match="strength"):
        Subtraction.build("test", strength=-0.1)


@pytest.mark.parametrize("method", ["npo", "fit"])
def test_training_that_could_not_be_kept_is_refused_before_any_work(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lm_of()
    both = together(lm, [assistant_of(lm)])
    begun: list[str] = []
    monkeypatch.setattr("delible.finishing.answers", lambda *given: begun.append("answers"))
    monkeypatch.setattr("delible.preparing.automatic_retain", lambda *given: begun.append("rows"))
    with pytest.raises(RecipeError, match="not in the weights") as caught:
        unlearn(both, REQUEST, method=method, out=tmp_path / "run")
    assert "undo" in str(caught.value)
    assert begun == []
    assert not (tmp_path / "run").exists()


def test_several_assistants_answer_in_batches_and_without_numbers() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    lm = lm_of()
    joint = together(lm, [assistant_of(lm), assistant_of(lm, seed=1)])
    each = [joint.generate([one], Decoding(5))[0] for one in PROMPTS]
    assert joint.generate(PROMPTS, Decoding(5)) == each
    with FakeTensorMode():  # as the estimate of a run goes through it
        found = joint._combined(torch.empty(7, 40), [torch.empty(7, 40), torch.empty(7, 40)])
    assert found.shape == (7, 40)
