"""vLLM as a system: through a stand-in, it answers what the model itself answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_stand_in

from delible.audit.run import audit
from delible.errors import MissingExtraError, ModelError
from delible.lm.lm import LM
from delible.measure.engine import measure
from delible.measure.evaluate import evaluate
from delible.metrics.min_k_plus_plus import MinKPlusPlus
from delible.records import QA, ForgetRequest, Passage
from delible.system.asks import (
    Decoding,
    Distribution,
    Generate,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.system.base import System
from delible.systems.opening import open_system
from delible.systems.vllm import VLLM
from delible.testing.tiny import tiny_model, tiny_tokenizer

QUESTIONS = ["Who?", "Where was Ada born?", "Is this a longer question than the others?"]
ANSWERS = ["In Aberlin", "No", "In the town of Cold Harbour by the sea"]
PROMPTS = [
    *map(Prompt.ask, QUESTIONS),
    Prompt.ask("Where?", prefill="Sure: "),
    Prompt.ask("Where?", system="Be brief."),
    Prompt(text=""),
    Prompt(text="Once upon"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in.module())


@pytest.fixture
def both(engine: None, folder: Path) -> tuple[VLLM, LM]:
    return VLLM.load(str(folder)), LM.load(str(folder), precision="float32", device="cpu")


def test_scores_are_those_of_the_model(both: tuple[VLLM, LM]) -> None:
    vllm, lm = both
    requests = [Score(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    # Random models hit nothing: their own greedy answers do.
    own = lm.generate(PROMPTS, Decoding(6))
    requests += [Score(prompt, str(text)) for prompt, text in zip(PROMPTS, own, strict=True)]
    hits = 0
    for found, wanted in zip(vllm.score(requests), lm.score(requests), strict=True):
        assert isinstance(found, TokenScores)
        assert isinstance(wanted, TokenScores)
        assert np.allclose(found.logprobs, wanted.logprobs, atol=1e-5)
        assert found.hits.tolist() == wanted.hits.tolist()
        assert found.has_end == wanted.has_end
        assert found.logprobs.dtype == np.float32
        assert found.hits.dtype == np.bool_
        hits += int(found.hits.sum())
    assert hits > 5


@pytest.mark.parametrize("stop", [(), ("e",), ("a", "q", "\n")])
def test_greedy_answers_are_those_of_the_model(
    both: tuple[VLLM, LM], stop: tuple[str, ...]
) -> None:
    vllm, lm = both
    decoding = Decoding(12, stop)
    found = vllm.generate(PROMPTS, decoding)
    assert found == lm.generate(PROMPTS, decoding)
    assert len(set(found)) > 3
    assert not any(one in str(text) for text in found for one in stop)


def test_the_end_of_a_turn_ends_an_answer(both: tuple[VLLM, LM]) -> None:
    vllm, lm = both
    end = lm.template.end_of_turn[0]
    for model in (lm.model, vllm.engine.net):
        with torch.no_grad():  # a model that soon says the end
            model.lm_head.weight[end] *= 4
    found = vllm.generate(PROMPTS, Decoding(40))
    assert found == lm.generate(PROMPTS, Decoding(40))
    asked = [how for _, how in vllm.engine.asked]
    assert all(set(how.stop_token_ids) == lm.ends for how in asked)
    lengths = {len(str(text)) for text in found}
    assert min(lengths) < 40


def test_drawn_answers_depend_on_seed_and_prompt_alone(both: tuple[VLLM, LM]) -> None:
    vllm, _ = both
    decoding = Decoding(8, temperature=1.5, top_p=0.9, seed=1)
    together = vllm.generate(PROMPTS, decoding)
    assert [vllm.generate([prompt], decoding)[0] for prompt in PROMPTS] == together
    assert together != vllm.generate(PROMPTS, Decoding(8, temperature=1.5, top_p=0.9, seed=2))
    hows = [how for _, how in vllm.engine.asked[: len(PROMPTS)]]
    assert {(how.temperature, how.top_p, how.max_tokens) for how in hows} == {(1.5, 0.9, 8)}
    assert len({how.seed for how in hows}) == len(PROMPTS)


def test_rows_that_are_too_long_have_no_answer_as_in_the_model(both: tuple[VLLM, LM]) -> None:
    vllm, lm = both
    assert (lm.template.max_length, vllm.template.max_length) == (512, 511)
    long, limit = Prompt(text="x" * 600), Prompt(text="x" * 505)
    for system in both:
        assert isinstance(system.score([Score(long, "a")])[0], NoAnswer)
        assert isinstance(system.generate([long], Decoding(4))[0], NoAnswer)
        assert isinstance(system.score([Score(limit, "a")])[0], TokenScores)
    (cut,) = vllm.generate([limit], Decoding(64))  # the engine ends at its limit, not the answer
    assert cut == NoAnswer("prompt and answer are longer than 512 tokens")
    assert isinstance(vllm.generate([limit], Decoding(4))[0], str)
    assert vllm.score([]) == vllm.generate([], Decoding()) == []


def test_values_that_are_no_numbers_are_no_answer(both: tuple[VLLM, LM]) -> None:
    vllm, _ = both
    with torch.no_grad():
        vllm.engine.net.lm_head.weight.fill_(torch.nan)
    assert isinstance(vllm.score([Score(PROMPTS[0], "a")])[0], NoAnswer)


def test_what_it_cannot_do_is_told_before_anything_is_asked(both: tuple[VLLM, LM]) -> None:
    vllm, lm = both
    assert isinstance(vllm, System)
    for request in (Score(PROMPTS[0], "a", moments=True), Distribution(PROMPTS[0], "a")):
        with pytest.raises(ModelError, match="cannot 'distribution'"):
            measure(vllm, [Score(PROMPTS[0], "a"), request])
        assert not vllm.engine.asked
        assert measure(lm, [request])
    values = evaluate(vllm, {"forget": [Passage(text="Once upon a time")]}, [MinKPlusPlus()])
    assert "capability 'distribution'" in values.skipped["min_k_plus_plus"]
    with pytest.raises(TypeError, match="moments"):
        vllm.score([Score(PROMPTS[0], "a", moments=True)])


def test_the_engine_is_asked_once_for_everything(both: tuple[VLLM, LM]) -> None:
    vllm, lm = both
    requests = [Score(PROMPTS[0], "a"), Generate(PROMPTS[1], Decoding(4)), Score(PROMPTS[0], "b")]
    mine, other = measure(vllm, requests), measure(lm, requests)
    assert mine[requests[1]] == other[requests[1]]
    assert len(vllm.engine.asked) == 3


def test_fingerprint_follows_weights_precision_and_version(
    engine: None, folder: Path, tmp_path: Path
) -> None:
    first = VLLM.load(str(folder)).fingerprint
    assert VLLM.load(str(folder)).fingerprint == first
    assert VLLM.load(str(folder), dtype="float32").fingerprint != first
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    other = VLLM.load(str(tmp_path / "other"))
    assert other.fingerprint != first
    other.module.__version__ = "another"
    changed = VLLM.load(str(folder)).fingerprint
    assert changed != first


def test_names(engine: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder)
    opened = open_system(f"vllm:{tmp_path / 'run'}")
    assert isinstance(opened, VLLM)
    assert opened.engine.model == str(tmp_path / "run" / "model")
    assert opened.name == f"vllm:{tmp_path / 'run'}"
    assert isinstance(open_system(str(folder)), LM)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge_adapter"):
        open_system(f"vllm:{tmp_path / 'adapter'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_system(f"vllm:{tmp_path / 'empty'}")
    (tmp_path / "weights.gguf").write_text("")
    with pytest.raises(ModelError, match="folders with safetensors"):
        open_system(f"vllm:{tmp_path / 'weights.gguf'}")


def test_an_engine_that_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    stand_in = vllm_stand_in.module()

    def fails(**_: object) -> None:
        raise RuntimeError("no CUDA device\nand more")

    stand_in.LLM = fails  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    with pytest.raises(ModelError, match=r"no CUDA device It needs a GPU"):
        VLLM.load(str(folder))


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'delible\[vllm\]'"):
        open_system(f"vllm:{folder}")


def test_it_is_not_imported_unless_used() -> None:
    code = (
        "import sys, delible, delible.audit.run, delible.systems.opening\n"
        "print(sorted({'vllm', 'httpx2', 'delible.systems.endpoint'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "vllm" not in done.stdout
    assert "endpoint" not in done.stdout


def test_it_is_audited_by_name(
    engine: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    request = ForgetRequest(
        forget=(QA(question="Where was Ada born?", answer="In Aberlin"),),
        retain=(QA(question="Where was Bob born?", answer="In Casta"),),
    )
    metrics = ["answer_probability", "min_k_plus_plus"]
    found = audit(
        f"vllm:{folder}", request, reference=f"vllm:{folder}",
        before=LM.load(str(folder), precision="float32"),  # what the stand-in computes in
        metrics=metrics, attacks=["prefix", {"name": "quantize", "bits": 4, "group": 0}], rows=4,
    )  # fmt: skip
    values = {
        (item.system, item.split, item.attack): item.value
        for item in found.measurements
        if item.metric == "answer_probability"
    }
    for split in ("forget", "retain", "general"):
        mine = values["unlearned", split, "none"]
        assert mine == pytest.approx(values["original", split, "none"], rel=1e-4)
        assert mine == values["reference", split, "none"]
    assert not [key for key in values if key[2] == "quantize"]
    assert any("capability 'distribution'" in line for line in found.not_tested)
    assert any("gives no weights" in line for line in found.not_tested)
