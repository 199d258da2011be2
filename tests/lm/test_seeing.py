"""Models that see: what the engine gives for rows with pictures is what the model itself gives."""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the extra 'vision' is not installed")

from seeing_models import FAMILIES, picture, seeing_lm, seeing_model

from delible.errors import DataError, ModelError
from delible.lm import seeing
from delible.lm.forward import Forward, collate
from delible.lm.lm import LM
from delible.lm.pictures import FIRST, without_pictures
from delible.messages import ImagePart
from delible.records import QA, Choice, ForgetRequest
from delible.system.asks import Decoding, Distribution, GradientNorm, Prompt, Score
from delible.system.questions import ask, shown
from delible.train.rows import make_rows


@lru_cache(maxsize=8)
def lm_of(family: str) -> LM:
    return seeing_lm(family)


def asked(text: str, *images: ImagePart) -> Prompt:
    return shown(Prompt.ask(text), images)


def own_inputs(lm: LM, prompt: Prompt, answer: str = "") -> dict[str, Any]:
    """What the model's own forward pass takes, made by its processor from text and pictures."""
    assert lm.pictures is not None
    from delible.lm.pictures import opened_picture

    tokenizer, images = lm.tokenizer, [one for turn in prompt.messages for one in turn.images]
    text = lm.template.render(prompt) + answer + ("<|im_end|>" if answer else "")
    expanded, given = text, dict[str, Any]()
    parts: list[dict[str, Any]] = []
    for image in images:
        found = lm.pictures.processor(
            text=[lm.pictures.token], images=[opened_picture(image)], return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        mark = tokenizer.decode(found["input_ids"][0])
        expanded = expanded.replace(
            lm.pictures.token, "\0" + mark.replace(lm.pictures.token, "\1"), 1
        )
        parts.append({k: v for k, v in found.items() if k not in
                      ("input_ids", "attention_mask", "token_type_ids")})  # fmt: skip
    expanded = expanded.replace("\0", "").replace("\1", lm.pictures.token)
    ids = tokenizer(expanded, add_special_tokens=False, return_tensors="pt")["input_ids"]
    for name in parts[0] if parts else ():
        # Idefics3 counts pictures of a conversation in the second dimension
        joined = 1 if name.startswith("pixel") and parts[0][name].dim() in (4, 5) and (
            parts[0][name].dim() == 5 or "mask" in name) else 0  # fmt: skip
        given[name] = torch.cat([one[name] for one in parts], dim=joined)
    given["input_ids"] = ids
    given["attention_mask"] = torch.ones_like(ids)
    if lm.core.config.model_type.startswith("qwen"):
        given["mm_token_type_ids"] = (ids == lm.pictures.token_id).int()
    return given


def own_logprobs(lm: LM, prompt: Prompt, answer: str) -> np.ndarray:
    """log p of the answer's tokens by the model's own forward pass, float64."""
    given = own_inputs(lm, prompt, answer)
    start = own_inputs(lm, prompt)["input_ids"].shape[1]
    with torch.no_grad():
        logits = lm.core(**given, use_cache=False).logits[0].double()
    ids = given["input_ids"][0]
    logprobs = logits.log_softmax(dim=1)[:-1].gather(1, ids[1:, None])[:, 0]
    return logprobs[start - 1 :].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_about_pictures_are_scored_as_the_model_itself_does(family: str) -> None:
    lm = lm_of(family)
    one, other = picture(1), picture(2, 24, 32)
    requests = [
        Score(asked("What is it, and where?", one), "A star."),
        Score(asked("What is it, and where?", one), "A ring, on the left."),
        Score(asked("What is it, and where?", other), "A star."),
        Score(asked("What is it, and where?"), "A star."),
        Score(asked("Which of the two is larger?", one, other), "The first."),
        Score(asked("Which of the two is larger?", other, one), "The first."),
    ]
    assert lm.grows_trees, "the fast road is not tried"
    for request, found in zip(requests, lm.score(requests), strict=True):
        expected = own_logprobs(lm, request.prompt, request.answer)
        np.testing.assert_allclose(found.logprobs, expected, atol=2e-4)
    alone = [lm.score([request])[0] for request in requests]
    for mine, found in zip(alone, lm.score(requests), strict=True):
        np.testing.assert_allclose(mine.logprobs, found.logprobs, atol=2e-4)
    texts = [own_logprobs(lm, one.prompt, one.answer)[0] for one in (requests[0], requests[2])]
    assert abs(texts[0] - texts[1]) > 1e-3, "the picture changes nothing, so nothing is shown"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_generated_as_the_library_does(family: str) -> None:
    lm = lm_of(family)
    prompts = [asked("What is it?", picture(1)), asked("What is it?", picture(5)),
               asked("Where in the picture is it?", picture(3)), asked("What is it?")]  # fmt: skip
    found = lm.generate(prompts, Decoding(6))
    for prompt, text in zip(prompts, found, strict=True):
        given = own_inputs(lm, prompt)
        with torch.no_grad():
            said = lm.core.generate(
                **given, max_new_tokens=6, do_sample=False, pad_token_id=256, eos_token_id=[259]
            )[0, given["input_ids"].shape[1] :]
        if hasattr(lm.core.model, "rope_deltas"):
            lm.core.model.rope_deltas = None
        expected = lm.tokenizer.decode(said, skip_special_tokens=True)
        assert str(text).strip() == expected.strip()


def test_every_road_gives_the_same() -> None:
    for family in ("llava", "qwen2_vl"):
        lm = lm_of(family)
        prompts = [asked("What is it?", picture(seed)) for seed in (1, 2, 1)]
        road, expected = lm.road, lm.generate(prompts, Decoding(6))
        try:
            for other in ("prefix", "padded"):
                lm.road = other  # type: ignore[assignment]
                assert lm.generate(prompts, Decoding(6)) == expected, (family, other)
        finally:
            lm.road = road


def test_rows_with_the_same_words_and_other_pictures_share_nothing_of_the_pictures() -> None:
    lm = lm_of("llava")
    one, other, again = (
        lm.template.encode(asked("What?", picture(seed)), "A.") for seed in (1, 2, 1)
    )
    assert one == again
    assert one.start == other.start
    assert len(one.ids) == len(other.ids)
    differing = [i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=True)) if a != b]
    own = [i for i, token in enumerate(one.ids) if token >= FIRST]
    assert differing == own
    assert len(own) == 4
    batch = collate([one, other], lm.pad_id, "cpu")
    assert batch.prefix <= own[0]
    keys = [row.key for row in make_rows(lm.template, [
        QA(question="What?", answer="A", images=(picture(seed),)) for seed in (1, 2, 1)
    ])]  # fmt: skip
    assert keys[0] == keys[2] != keys[1]


def test_ids_of_pictures_are_their_bytes_and_how_they_are_read() -> None:
    lm = lm_of("llava")
    assert lm.pictures is not None
    image = picture(4)
    text = f"{image.sha256}/{lm.pictures.fingerprint}"
    number = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 22
    assert lm.pictures.picture(image).ids == tuple(2**62 + number * 2**20 + i for i in range(4))
    assert without_pictures([5, *lm.pictures.picture(image).ids, 6], lm.tokenizer)[0::5] == [5, 6]
    assert max(without_pictures(lm.pictures.picture(image).ids, lm.tokenizer)) < 300


def test_what_the_tower_says_is_computed_once_until_it_changes() -> None:
    lm = seeing_lm("llava", seed=3)
    calls = list[int]()
    tower = lm.core.get_submodule("model.vision_tower")
    forward = tower.embeddings.patch_embedding.register_forward_hook(
        lambda _, given, out: calls.append(len(given[0]))
    )
    request = Score(asked("What?", picture(1)), "A.")
    first = lm.score([request])[0]
    seen = len(calls)
    assert seen >= 1
    lm.score([request, Score(asked("Where?", picture(1)), "B.")])
    assert len(calls) == seen
    with torch.no_grad():
        next(tower.encoder.layers[0].parameters()).add_(0.5)
    lm.touch()
    second = lm.score([request])[0]
    assert len(calls) == seen + 1
    np.testing.assert_allclose(second.logprobs, own_logprobs(lm, request.prompt, "A."), atol=2e-4)
    assert np.abs(second.logprobs - first.logprobs).max() > 1e-4
    forward.remove()


def test_values_made_for_asking_serve_training() -> None:
    lm = seeing_lm("llava", seed=4)
    row = lm.template.encode(asked("What?", picture(1)), "A.")
    with torch.inference_mode():
        Forward(lm)(collate([row], lm.pad_id, "cpu"))
    states = Forward(lm)(collate([row], lm.pad_id, "cpu"))[0]
    states.sum().backward()  # type: ignore[union-attr]
    assert (
        lm.core.get_parameter("model.language_model.layers.0.mlp.up_proj.weight").grad is not None
    )
    norm = lm.inspect([GradientNorm(asked("What?", picture(1)), "A.")])[0]
    other = lm.inspect([GradientNorm(asked("What?", picture(2)), "A.")])[0]
    assert float(norm[0]) > 0
    assert abs(float(norm[0]) - float(other[0])) > 1e-6
    assert lm.inspect([Distribution(asked("What?", picture(1)), "A.")])[0].shape[0] == 3


def test_the_gradient_reaches_the_tower_where_it_is_wanted() -> None:
    lm = seeing_lm("llava", seed=4)
    row = lm.template.encode(asked("What?", picture(1)), "A.")
    states = Forward(lm)(collate([row], lm.pad_id, "cpu"))[0]
    states.pow(2).sum().backward()  # type: ignore[union-attr]
    mine = lm.core.model.multi_modal_projector.linear_1.weight.grad.clone()
    lm.core.zero_grad()
    given = own_inputs(lm, asked("What?", picture(1)), "A.")
    last = lm.core.model(**given, use_cache=False).last_hidden_state[0]
    last[row.start - 1 : len(row.ids) - 1].pow(2).sum().backward()
    expected = lm.core.model.multi_modal_projector.linear_1.weight.grad
    np.testing.assert_allclose(mine, expected, atol=1e-4 * float(expected.abs().max()))


# ---- what is refused


def test_a_family_that_reads_pictures_otherwise_is_given_texts_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        lm = seeing_lm("paligemma")
    assert lm.pictures is None
    assert "images" not in lm.capabilities
    assert "given texts only" in caplog.text
    with pytest.raises(ModelError, match="holds a picture"):
        lm.generate([asked("What?", picture(1))], Decoding(2))


def test_a_model_whose_pictures_are_put_elsewhere_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = seeing_model("llava")
    monkeypatch.setattr(seeing, "of_pictures", lambda lm, numbers: [
        one.flip(0) for one in seeing._looked_at(lm, numbers)
    ])  # fmt: skip
    lm = LM(model, processor.tokenizer, precision="float32", processor=processor)
    assert lm.pictures is None


def test_texts_that_hold_a_pictures_token_are_refused() -> None:
    lm = lm_of("llava")
    with pytest.raises(ModelError, match="2 times '<image>'"):
        lm.template.prompt_ids(asked("What is <image>?", picture(1)))


def test_broken_and_missing_pictures_are_told(tmp_path: Path) -> None:
    lm = lm_of("llava")
    path = tmp_path / "half.png"
    path.write_bytes(picture(1).content()[:60])
    broken = ImagePart.model_validate({"source": str(path)})
    with pytest.raises(DataError, match=r"half\.png: the picture is broken"):
        lm.template.prompt_ids(asked("What?", broken))
    path.unlink()
    with pytest.raises(DataError, match=r"half\.png cannot be read"):
        lm.template.prompt_ids(asked("Why?", broken))
    with pytest.raises(DataError, match="never shown"):
        lm.pictures.inputs(5)  # type: ignore[union-attr]


# ---- whole


def test_it_is_saved_and_loaded_with_its_eyes(tmp_path: Path) -> None:
    for family in ("llava", "idefics3"):
        lm = lm_of(family)
        lm.save(tmp_path / family)
        again = LM.load(str(tmp_path / family), precision="float32")
        assert again.pictures is not None
        assert "images" in again.capabilities
        assert again.identity == lm.identity
        prompts = [asked("What is it?", picture(1))]
        assert again.generate(prompts, Decoding(6)) == lm.generate(prompts, Decoding(6))
        twin = again.copy()
        assert twin.generate(prompts, Decoding(6)) == lm.generate(prompts, Decoding(6))


def test_records_are_asked_with_their_pictures() -> None:
    one = QA(question="What?", answer="A", images=(picture(1),))
    choice = Choice(question="What?", options=("a", "b"), correct=0, images=(picture(1),))
    for record in (one, choice):
        prompt = ask(record)
        assert prompt is not None
        assert prompt.needs == {"images"}
        assert prompt.messages[-1].images == record.images
    assert ask(choice).messages[-1].text.endswith("Answer with the letter only.")  # type: ignore[union-attr]
    plain = QA(question="What?", answer="A")
    assert "images" not in plain.model_dump_json()
    assert plain.digest != one.digest
    assert one.digest != QA(question="What?", answer="A", images=(picture(2),)).digest
    assert ForgetRequest(forget=(one,)).id != ForgetRequest(forget=(plain,)).id


def test_digests_of_plain_records_are_those_they_always_were() -> None:
    assert QA(question="Where?", answer="Here").digest == (
        hashlib.sha256(
            b'{"subject":null,"neighbour_of":null,"group":null,"type":"qa","question":"Where?",'
            b'"answer":"Here","aliases":[],"paraphrases":[],"paraphrased_answers":[],'
            b'"perturbed":[]}'
        ).hexdigest()
    )
