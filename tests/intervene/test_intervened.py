"""An intervened model: a system like any, composed, saved, served, and taken off."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from by_hand import ANSWERS, KINDS, PROMPTS, Moving, bare, logits_of, said, with_moving
from pydantic import Field, ValidationError
from torch import Tensor

from delible import registry
from delible.audit.parts import without_parts
from delible.component import build
from delible.errors import ModelError, RunError
from delible.intervene.base import Fitted, Intervention
from delible.intervene.reading import read, watching
from delible.intervene.sites import Positions, Site
from delible.intervene.system import Intervened, intervened
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.registry import register
from delible.system.asks import Decoding, Generate, GradientNorm, Score
from delible.system.base import System
from delible.systems.serving import Served
from delible.testing.contract.trial import FORGET, REQUEST, RETAIN
from delible.testing.tiny import VOCABULARY_SIZE, tiny_model, tiny_tokenizer

REQUESTS = [Score(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
BLOCK = Site(what="block", layers=(1,))


@register(kind="intervention", name="scaling", title="Scaling", summary="Multiplies and adds.")
class Scaling(Intervention):
    factor: float = Field(1.0, description="Factor.")
    site: Site = Field(BLOCK, description="Where.")

    @property
    def sites(self) -> Sequence[Site]:
        return (self.site,)

    def change(self, states: Tensor, where: Where, tensors: Mapping[str, Tensor]) -> Tensor:
        return states * self.factor + tensors["shift"].to(states.dtype)


def scaling(factor: float = 1.5, shift: float = 0.25, site: Site = BLOCK) -> Fitted:
    ramp = torch.arange(32) / 32 * shift
    return Fitted(Scaling(factor=factor, site=site), {"shift": ramp})


def logprobs(lm: LM) -> list[np.ndarray[Any, Any]]:
    return [one.logprobs for one in lm.score(REQUESTS)]  # type: ignore[union-attr]


def far(left: LM, right: LM) -> float:
    pairs = zip(logprobs(left), logprobs(right), strict=True)
    return max(float(np.abs(one - other).max()) for one, other in pairs)


# ---- what it is


def test_it_is_a_system_with_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    lm, cache = bare("llama"), Cache(tmp_path)
    found = intervened(lm, [scaling()])
    assert isinstance(found, System)
    assert found.capabilities == lm.capabilities
    assert found.name == "model + scaling"
    requests = [*REQUESTS, Generate(PROMPTS[0], Decoding(4))]
    measure(lm, requests, cache=cache)
    assert measure(found, requests, cache=cache).report.cached == 0
    assert measure(found, requests, cache=cache).report.cached == len(requests)
    others = [
        intervened(lm, [scaling(1.6)]), intervened(lm, [scaling(shift=0.5)]),
        intervened(lm, [scaling(), scaling()]), intervened(lm, [scaling(), scaling(2.0)]),
        intervened(lm, [scaling(2.0), scaling()]),
        intervened(lm, [scaling(site=Site(layers=(0,)))]),
    ]  # fmt: skip
    assert len({one.fingerprint for one in (lm, found, *others)}) == 8
    assert intervened(lm, [scaling()]).fingerprint == found.fingerprint
    assert found.copy().fingerprint == found.fingerprint
    other = found.copy()
    other.precision = "bfloat16"
    assert other.fingerprint != found.fingerprint


def test_they_act_in_their_order() -> None:
    lm = bare("llama")
    first, second = scaling(0.5, 0.0), scaling(1.0, 3.0)
    halved_then_moved = intervened(lm, [first, second])
    assert far(halved_then_moved, intervened(lm, [scaling(0.5, 3.0)])) < 1e-5
    assert far(intervened(lm, [second, first]), intervened(lm, [scaling(0.5, 1.5)])) < 1e-5
    on_top = intervened(intervened(lm, [first]), [second])
    assert on_top.bare is lm
    assert on_top.fingerprint == halved_then_moved.fingerprint
    assert far(on_top, halved_then_moved) == 0.0


def test_it_is_taken_off_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    before, fingerprint = logprobs(lm), lm.fingerprint
    found = intervened(lm, [scaling()])
    monkeypatch.setattr(Scaling, "change", lambda self, states, where, tensors: states[:-1])
    with pytest.raises(ModelError, match="gave shape"):
        found.score(REQUESTS)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in lm.model.modules())
    assert all(np.array_equal(one, two) for one, two in zip(before, logprobs(lm), strict=True))
    assert lm.fingerprint == fingerprint
    with pytest.raises(ModelError, match="gave shape"):  # said when it is put on
        intervened(lm, [scaling()])


def test_gradients_pass_through_it() -> None:
    lm = bare("llama")
    found = intervened(lm, [scaling(0.0, 1.0, Site(what="norm"))])  # nothing reaches the head
    ask = [GradientNorm(PROMPTS[0], "In Ob")]
    assert float(found.inspect(ask)[0][0]) > 0  # type: ignore[index]
    assert found.inspect(ask)[0] < lm.inspect(ask)[0]  # type: ignore[operator]


def test_an_attack_trains_and_changes_a_copy_with_it() -> None:
    found = intervened(bare("llama"), [scaling()])
    before = logprobs(found)
    context = AttackContext(FORGET, RETAIN, RETAIN, found, 0)
    for name, options in (("relearn", {"steps": 2}), ("quantize", {})):
        attacked = build("attack", {"name": name, **options}).apply(found, context)
        assert isinstance(attacked, Intervened)
        assert attacked.fingerprint != found.fingerprint
        assert attacked.bare.fingerprint != found.bare.fingerprint
        assert far(attacked, found) > 1e-4
        assert far(attacked, attacked.bare) > 1e-2
    assert all(np.array_equal(one, two) for one, two in zip(before, logprobs(found), strict=True))


def test_an_adapter_is_put_on_below_it() -> None:
    lm = bare("llama").copy()
    site = Site(what="mlp_inner", layers=(1,))
    found = with_moving(lm, site, KINDS[0])
    settings = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    found.wear(peft.get_peft_model(lm.model, settings))
    assert lm.wears_adapter
    request = REQUESTS[1]
    row = lm.template.encode(request.prompt, request.answer)
    logits = logits_of(lm, row.ids, row.start, site, "all").double().log_softmax(1)
    expected = logits[row.start - 1 : -1].gather(1, torch.tensor(row.ids[row.start :])[:, None])
    scores = found.score([request])[0]
    np.testing.assert_allclose(scores.logprobs, expected[:, 0], atol=2e-5)  # type: ignore[union-attr]
    found.merge_adapter()
    assert not lm.wears_adapter
    merged = found.score([request])[0]
    np.testing.assert_allclose(merged.logprobs, expected[:, 0], atol=1e-4)  # type: ignore[union-attr]


def test_an_audit_can_take_it_off() -> None:
    lm = bare("llama")
    parts = list(without_parts(intervened(lm, [scaling()])))
    assert [(name, system is lm) for name, system in parts] == [("intervention 'scaling'", True)]


# ---- many at once


def test_served_calls_get_what_each_gets_alone() -> None:
    lm = bare("llama")
    lengths = [3, 9, 6, 12]
    for at in KINDS:
        found = with_moving(lm, BLOCK, at)
        expected = [
            said(lm, prompt, BLOCK, at.kind, count)
            for prompt, count in zip(PROMPTS, lengths, strict=True)
        ]
        served = Served(found)

        async def one(place: int, served: Served = served) -> str:
            await asyncio.sleep(0.01 * place)
            return (await served.respond(PROMPTS[place], Decoding(lengths[place]))).text

        async def every() -> list[str]:
            return list(await asyncio.gather(*(one(place) for place in range(4))))

        assert asyncio.run(every()) == expected
        served.close()
    assert not any(one._forward_hooks for one in lm.model.modules())


def test_two_threads_ask_the_same_weights_with_it_and_without() -> None:
    lm = bare("llama")
    found = with_moving(lm, BLOCK, KINDS[3])
    systems = [lm, found, lm, found]
    expected = [(one.generate(PROMPTS, Decoding(6)), logprobs(one)) for one in systems[:2]] * 2
    wrong: list[str] = []
    barrier = threading.Barrier(len(systems))

    def work(place: int) -> None:
        barrier.wait()
        for _ in range(3):
            texts, scores = systems[place].generate(PROMPTS, Decoding(6)), logprobs(systems[place])
            near = zip(scores, expected[place][1], strict=True)
            if texts != expected[place][0] or not all(np.allclose(*two, atol=1e-5) for two in near):
                wrong.append(systems[place].name)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(systems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(one._forward_hooks for one in lm.model.modules())


def test_the_bare_model_stays_bare_while_the_other_is_asked() -> None:
    lm = bare("llama")
    before = logprobs(lm)
    for site in (BLOCK, Site(what="block_input", layers=(1,))):
        found = intervened(lm, [scaling(site=site)])
        with found.evaluating():
            assert any(one._forward_hooks or one._forward_pre_hooks for one in lm.model.modules())
            inside = logprobs(lm)
            assert far(found, lm) > 1e-2
        assert all(np.array_equal(one, two) for one, two in zip(before, inside, strict=True))


# ---- saved and loaded


def test_saved_and_loaded_it_is_the_same_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    fitted = scaling()
    assert Fitted(fitted.intervention, {"shift": fitted.tensors["shift"] + 1e-6}).identity != (
        fitted.identity
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda kind, name: Scaling)
        fitted.save(tmp_path / "one")
        loaded = Fitted.load(tmp_path / "one")
        assert loaded.intervention == fitted.intervention
        assert loaded.identity == fitted.identity
        file = tmp_path / "one" / "intervention.json"
        settings = json.loads(file.read_text())
        settings["intervention"]["factor"] = 9.0
        file.write_text(json.dumps(settings))
        with pytest.raises(RunError, match="not the one that was saved"):
            Fitted.load(tmp_path / "one")
    with pytest.raises(RunError, match="no intervention can be read"):
        Fitted.load(tmp_path / "none")


def test_weights_are_not_saved_as_if_it_were_in_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not in the weights"):
        intervened(bare("llama"), [scaling()]).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_one_learned_on_other_weights_is_told(caplog: pytest.LogCaptureFixture) -> None:
    lm = bare("llama")
    fitted = scaling()
    intervened(lm, [Fitted(fitted.intervention, fitted.tensors, lm.identity)])
    assert not caplog.records
    intervened(lm, [Fitted(fitted.intervention, fitted.tensors, "another")])
    assert "learned on another model" in caplog.text


# ---- sites


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((), [0, 1, 2]), ((0.0, 1.0), [0, 2]), ((0.5,), [1]), ((-1, 0), [0, 2]), ((1, 0.5), [1])],
)
def test_layers_are_indices_or_depths(layers: Any, expected: list[int]) -> None:
    assert [one.layer for one in Site(layers=layers).places(bare("llama"))] == expected


def test_sites_and_positions_that_make_no_sense_are_refused() -> None:
    lm = bare("llama")
    for layers in ((3,), (-4,), (1.5,)):
        with pytest.raises(ModelError, match=r"no layer|outside 0…1"):
            Site(layers=layers).places(lm)
    with pytest.raises(ModelError, match="no tower for images"):
        Site(what="vision").places(lm)
    for wrong in (
        lambda: Site(what="norm", layers=(1,)), lambda: Positions(kind="spans"),
        lambda: Positions(texts=("Ada",)), lambda: Positions(kind="spans", texts=(" ",)),
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            wrong()


def test_a_change_that_reaches_nothing_is_refused() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    block = lm.core.get_submodule(lm.anatomy.block_path(1))
    own = block.mlp.forward
    block.mlp.forward = lambda states: own(states) * 0
    block.mlp.down_proj.forward = lambda states: states.new_zeros(*states.shape[:-1], 32)
    with pytest.raises(ModelError, match=r"mlp.down_proj' \(mlp_inner\) does not reach"):
        with_moving(lm, Site(what="mlp_inner", layers=(1,)), KINDS[0])
    block.mlp.forward = lambda states: states * 0
    with pytest.raises(ModelError, match="nothing passes"):
        with_moving(lm, Site(what="mlp_inner", layers=(1,)), KINDS[0])


def test_positions_are_not_guessed_where_nobody_tells_them() -> None:
    lm = bare("llama")
    ids = torch.tensor([[1, 2, 3]])
    with (
        with_moving(lm, BLOCK, KINDS[2]).evaluating(),
        pytest.raises(ModelError, match="not known"),
    ):
        lm.core(input_ids=ids)
    found = intervened(lm, [scaling()])
    with torch.no_grad():
        without = lm.core(input_ids=ids).logits
        with found.evaluating():  # at all positions it holds whoever calls
            inside = lm.core(input_ids=ids).logits
    assert float((inside - without).abs().max()) > 1e-2


def vision_language() -> LM:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            **size, vocab_size=VOCABULARY_SIZE, max_position_embeddings=512,
            pad_token_id=256, bos_token_id=258, eos_token_id=259,
        ),
        vision_config=transformers.CLIPVisionConfig(**size, image_size=16, patch_size=8),
        image_token_index=250, vision_feature_layer=-2, image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return LM(
        transformers.LlavaForConditionalGeneration(config).eval(), tiny_tokenizer(),
        precision="float32",
    )  # fmt: skip


def test_a_block_of_the_tower_for_images_is_changed_where_the_projector_reads() -> None:
    lm = vision_language()
    pixels = torch.randn(1, 3, 16, 16)
    ids = torch.tensor([[250] * 4 + [5, 6]])

    def logits() -> Tensor:
        with torch.no_grad():
            return lm.core(input_ids=ids, pixel_values=pixels).logits

    logits()  # the library puts hooks of its own on the blocks now
    plain = logits()
    site = Site(what="vision", layers=(-2,))
    found = intervened(lm, [scaling(site=site)])
    assert torch.equal(logits(), plain)
    with found.evaluating():
        changed = logits()
    assert float((changed - plain).abs().max()) > 1e-3
    assert torch.equal(logits(), plain)
    with pytest.raises(ModelError, match="does not reach"):  # the projector reads the one before
        intervened(lm, [scaling(site=Site(what="vision", layers=(-1,)))])
    with pytest.raises(ModelError, match="a picture has no tokens"):
        with_moving(lm, site, KINDS[1])


# ---- reading


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_states_are_read_text_by_text(family: str) -> None:
    lm = bare(family)
    rows = [lm.template.encode(one.prompt, one.answer) for one in REQUESTS]
    site = Site(what="block", layers=(0, 1))
    for at, count in ((Positions(), None), (KINDS[2], 1), (KINDS[3], None), (KINDS[1], None)):
        found = dict(read(lm, rows, site, at))
        assert [*sorted(found)] == [*range(len(rows))]
        for index, row in enumerate(rows):
            with torch.no_grad():
                expected = lm.core(
                    input_ids=torch.tensor([row.ids]), output_hidden_states=True
                ).hidden_states
            places = torch.arange(len(row.ids))
            chosen = {
                "all": places >= 0, "prompt_end": places == row.start - 1,
                "answer": (places >= row.start - 1) & (places < len(row.ids) - 1),
                "spans": torch.tensor(
                    [*KINDS[3].marked(lm, row.ids[: row.start]), *[False] * row.answer_tokens]
                ),
            }[at.kind]  # fmt: skip
            for layer in (0, 1):
                states = found[index][layer]
                assert count is None or len(states) == count
                torch.testing.assert_close(states, expected[layer + 1][0][chosen], atol=1e-5,
                                           rtol=1e-4)  # fmt: skip


def test_reading_sees_what_interventions_make() -> None:
    lm = bare("llama")
    rows = [lm.template.encode(PROMPTS[0], "In Ob")]
    plain = dict(read(lm, rows, BLOCK))[0][1]
    found = dict(read(intervened(lm, [scaling(2.0, 0.0)]), rows, BLOCK))[0][1]
    torch.testing.assert_close(found, 2 * plain, atol=1e-5, rtol=1e-5)
    assert dict(read(lm, rows, Site(what="norm")))[0][None].shape == (len(rows[0].ids), 32)


def test_an_observer_sees_each_generated_token_once_and_changes_nothing() -> None:
    lm = bare("llama")
    before, fingerprint = lm.generate(PROMPTS, Decoding(6)), lm.fingerprint
    found = intervened(lm, [scaling(1.0, 0.0)])
    seen: dict[tuple[int, ...], list[int]] = {}

    def observe(states: Tensor, where: Where) -> None:
        assert len(states) == len(where.text) == len(where.place)
        for text, place in zip(where.text.tolist(), where.place.tolist(), strict=True):
            prompt = tuple(where.layout.prompts[text])
            seen.setdefault(prompt, []).append(place - len(prompt) + 1)

    for system in (lm, found):
        seen.clear()
        with watching(system, BLOCK, observe, Positions(kind="answer")):
            assert lm.fingerprint == fingerprint
            assert system.generate(PROMPTS, Decoding(6)) == before
        assert set(seen) == {lm.template.prompt_ids(prompt) for prompt in PROMPTS}
        for places in seen.values():
            assert places == [*range(len(places))]
            assert 1 <= len(places) <= 6
    assert not any(one._forward_hooks for one in lm.model.modules())
    assert REQUEST.forget
    assert Moving().positions == Positions()


@pytest.mark.parametrize("what", ["block", "mlp_inner", "mlp_out"])
def test_a_depth_is_one_of_the_whole_model_when_states_are_read(what: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    lm = LM(model, tiny_tokenizer(), precision="float32")
    rows = [lm.template.encode(PROMPTS[0], ANSWERS[0])]
    by_depth = dict(read(lm, rows, Site(what=what, layers=(0.5,))))[0]
    by_index = dict(read(lm, rows, Site(what=what, layers=(2,))))[0]
    assert list(by_depth) == list(by_index) == [2]
    assert torch.equal(by_depth[2], by_index[2])


def test_one_learned_on_what_stands_below_is_no_stranger(
    caplog: pytest.LogCaptureFixture,
) -> None:
    below = intervened(bare("llama"), [scaling()])
    other = scaling(1.2)
    intervened(below, [Fitted(other.intervention, other.tensors, below.identity)])
    assert "another model" not in caplog.text
    first = scaling(0.9)
    intervened(below, [first, Fitted(other.intervention, other.tensors, below.identity)])
    assert "another model" in caplog.text


def test_one_that_extends_another_acts_in_its_place() -> None:
    lm = bare("llama")
    first, alone = scaling(1.5), scaling(0.5)
    second = Fitted(alone.intervention, alone.tensors, extends=first.identity)
    both = intervened(lm, [first, second])
    assert far(both, intervened(lm, [alone])) == 0
    assert both.fingerprint != intervened(lm, [alone]).fingerprint
    assert far(both.taken_off()[1], intervened(lm, [first])) == 0
    assert far(both, intervened(lm, [first, alone])) > 0
    with pytest.raises(ModelError, match="extends another one that is not on this model"):
        intervened(lm, [second, first])
