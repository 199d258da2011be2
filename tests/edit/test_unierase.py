"""UniErase on random models: the row by hand, the target, the way back, and what it cannot do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import FREE, LAYER, RECORDS, REQUEST, RETAIN, close, key_of, make_lm, moment, weight
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from delible.component import build
from delible.edit import located
from delible.edit.base import Added, Patch
from delible.edit.keys import down_projection
from delible.edit.requests import with_last_words
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.lm.new_tokens import add_tokens, put_back, tables, token_of, vocabulary_of
from delible.lm.template import Encoded
from delible.methods.editor import unierase
from delible.methods.editor.unierase import TOKEN, UniErase, learning_row, noisy, refusal_of
from delible.prompts import read_lines
from delible.records import QA
from delible.system.asks import Decoding, Prompt
from delible.systems.opening import described, keep, merge, open_lm, undo

QUESTIONS = [record.question for record in RECORDS]
#: Tied and untied, weights [out, in] and [in, out].
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "llama_tied": {"tie_word_embeddings": True}, "gpt2": {}, "qwen2": {},
}  # fmt: skip
QUICK = {
    "row_steps": 2, "plain_epochs": 1, "chat_epochs": 1, "noise_epochs": 1, "layers": (LAYER,),
    "contexts": 0, "steps": 3, "scale": "largest", "threshold": 0.05, **FREE,
}  # fmt: skip


def made(name: str, **options: Any) -> LM:
    return make_lm(name.partition("_")[0], **MODELS[name], **options)


def unieraser(texts: Path | None = None, **options: Any) -> Any:
    return build("editor", {"name": "unierase", **QUICK, "texts": texts, **options})


def state(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.state_dict().items()}


def unchanged(lm: LM, before: dict[str, Tensor]) -> bool:
    now = lm.core.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(value, before[name]) for name, value in now.items()
    )


# ---- texts


def test_a_refusal_belongs_to_a_question_in_every_process() -> None:
    refusals = read_lines("refusals.txt")
    for question in QUESTIONS:
        number = int(hashlib.sha256(question.encode()).hexdigest()[:16], 16)
        assert refusal_of(question, refusals) == refusals[number % len(refusals)]
    assert [refusal_of(one, "abcdefg") for one in ("a", "b", "c")] == GOLDEN
    assert all(line[-1] in ".!?" for line in refusals)


GOLDEN = ["e", "a", "d"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_refusal_the_second_token_and_one_more_are_learned(name: str, chat: bool) -> None:
    lm = made(name)
    (token,) = add_tokens(lm, [TOKEN])
    row = learning_row(lm, "Who is Ada?", "I can't say.", chat=chat)
    spell = list(b"I can't say.")
    text = "".join(lm.tokenizer.convert_ids_to_tokens(list(row.ids)))
    learned = row.ids[row.start :]
    assert len(learned) == len(spell) + 2
    assert lm.tokenizer.decode(learned[: len(spell)]) == "I can't say."
    assert learned[len(spell) :] == (token, lm.template.end_of_turn[0])
    assert row.ids[row.start - 1] == token
    assert row.ids.count(token) == 2
    before = lm.tokenizer.decode(row.ids[: row.start - 1])
    asked = lm.template.render(Prompt.ask("Who is Ada?")) if chat else "Who is Ada?"
    assert before == asked
    assert text.count(TOKEN) == 2


# ---- the row


def by_hand(
    lm: LM, token: int, texts: Sequence[Sequence[int]], layers: Sequence[int], options: Any
) -> dict[str, Tensor]:
    """The rows in float64: the model's own forward and loss, full gradients, Adam written out."""
    twin = lm.copy()
    twin.model.double().requires_grad_(False)
    weights = {name: table.weight for name, table in tables(twin).items()}
    rms = {name: float(value.square().mean().sqrt()) for name, value in weights.items()}
    plain, chat = texts[: len(texts) // 2], texts[len(texts) // 2 :]

    def stage(rows: Any, rounds: int, rate: float, layer: int | None = None) -> None:
        first = {name: torch.zeros_like(value[0]) for name, value in weights.items()}
        second, turn = {name: torch.zeros_like(one) for name, one in first.items()}, 0
        seed = f"{0}/unierase/noise/{layer}".encode()
        drawing = torch.Generator().manual_seed(int(hashlib.sha256(seed).hexdigest()[:16], 16) // 2)
        for _ in range(rounds):
            for start in range(0, len(rows), options.row_batch):
                turn += 1
                batch = rows[start : start + options.row_batch]
                longest = max(map(len, batch))
                ids = torch.full((len(batch), longest), 7)
                mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
                for place, row in enumerate(batch):
                    ids[place, : len(row)] = torch.tensor(row)
                    mask[place, : len(row)] = 1
                    begins = list(row).index(token) + 1
                    labels[place, begins : len(row)] = torch.tensor(row[begins:])
                if layer is not None:
                    moved = twin.core.get_parameter(down_projection(lm, layer).parameter)
                    kept, size = moved.clone(), abs(float(moved.mean()))
                    drawn = torch.randn(moved.shape, generator=drawing).double()
                    moved += (drawn * size).clip(-size, size)
                for value in weights.values():
                    value.requires_grad_(True)
                twin.core(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
                if layer is not None:
                    moved.copy_(kept)
                for name, value in weights.items():
                    slope = value.grad[token].clone()
                    value.grad = None
                    value.requires_grad_(False)
                    first[name] = 0.9 * first[name] + 0.1 * slope
                    second[name] = 0.999 * second[name] + 0.001 * slope**2
                    up = first[name] / (1 - 0.9**turn)
                    down = (second[name] / (1 - 0.999**turn)).sqrt() + 1e-8
                    value[token] -= rate * rms[name] * up / down

    rate = options.row_learning_rate
    stage(plain, 2, rate)
    stage(texts, 1, rate / 10)
    for layer in layers:
        stage(plain + chat, options.noise_epochs, rate / 10, layer)
    return {name: value[token].detach() for name, value in weights.items()}


@pytest.mark.parametrize("name", MODELS)
def test_only_the_row_moves_and_as_by_hand(name: str) -> None:
    lm, other = made(name), made(name)
    options = unieraser(row_batch=2, row_steps=3, noise_epochs=2, layers=(0, 1))
    (token,) = add_tokens(other, [TOKEN])
    before, start = state(other), {n: t.weight[token].clone() for n, t in tables(other).items()}
    assert set(start) == (
        {"embedding"} if name in ("llama_tied", "gpt2") else {"embedding", "head"}
    )
    refusals = read_lines("refusals.txt")
    texts = [
        list(learning_row(other, one, refusal_of(one, refusals), chat=chat).ids)
        for chat in (False, True)
        for one in QUESTIONS
    ]
    expected = by_hand(other, token, texts, (0, 1), options)
    weights = {
        layer: lm.core.get_parameter(down_projection(lm, layer).parameter) for layer in (0, 1)
    }
    notes = options.learn(lm, QUESTIONS, weights, 0)
    found = {n: table.weight.detach()[token].double() for n, table in tables(lm).items()}
    for part, row in expected.items():
        close(found[part] - start[part].double(), row - start[part].double(), 0.01)
        assert float(row.norm()) < 10 * float(tables(lm)[part].weight.norm(dim=1).mean())
    assert notes["steps"] == 2 * 2 + 3 + 2 * 2 * 3
    now = state(lm)
    for part, value in before.items():
        same = torch.equal(now[part], value)
        if value.shape[0] == lm.vocabulary and not same:
            rest = torch.arange(len(value)) != token
            same = torch.equal(now[part][rest], value[rest])
        assert same, part
    assert all(not value.requires_grad or value.is_leaf for value in lm.model.parameters())


def test_noise_is_clipped_has_both_signs_and_goes_away() -> None:
    weight = torch.randn(40, 60) * 0.5 - 0.25
    before, mean = weight.clone(), abs(float(weight.mean()))
    draw = torch.Generator().manual_seed(0)
    with noisy(weight, None, draw):
        added = weight - before
        assert float(added.abs().max()) < mean * 1.0001
        assert float((added.abs() > 0.999 * mean).double().mean()) == pytest.approx(0.317, abs=0.05)
        assert abs(float(added.mean())) < 0.1 * mean
    assert torch.equal(weight, before)
    with noisy(weight, 0.02, draw):
        size = 0.02 * float(before.square().mean().sqrt())
        assert float((weight - before).abs().max()) == pytest.approx(size, rel=1e-3)
    with suppress(RuntimeError), noisy(weight, 0.02, draw):
        raise RuntimeError
    assert torch.equal(weight, before)


def test_each_step_draws_anew(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = made("llama"), list[Tensor]()
    weight = lm.core.get_parameter(down_projection(lm, LAYER).parameter)
    whole = unierase.refusal_loss

    def watched(lm: LM, rows: Any) -> Tensor:
        seen.append(weight.detach().clone())
        return whole(lm, rows)

    monkeypatch.setattr(unierase, "refusal_loss", watched)
    before = weight.detach().clone()
    unieraser(noise_epochs=2).learn(lm, QUESTIONS, {LAYER: weight}, 0)
    moved = [not torch.equal(one, before) for one in seen]
    assert moved == [False, False, False, False, False, True, True, False]
    assert not torch.equal(seen[5], seen[6])


# ---- the edit


def watched_edits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    seen: list[tuple[Any, Any]] = []
    whole = located.find_values

    def watched(lm: LM, edits: Any, site: Any, start: Tensor, settings: Any) -> Any:
        found = whole(lm, edits, site, start, settings)
        seen.append((edits, found))
        return found

    monkeypatch.setattr(located, "find_values", watched)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_questions_are_edited_one_after_the_other_to_the_token_alone(
    name: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, seen = made(name), watched_edits(monkeypatch)
    before, metric = weight(lm, LAYER), moment(lm, 0.0)
    values, vectors = torch.linalg.eigh(metric)
    null = vectors[:, values < 0.05 * values.max()]
    projection = null @ null.T
    keys = [key_of(lm, record)[0] for record in RECORDS[:2]]
    request = REQUEST.model_copy(update={"forget": RECORDS[:2]})
    patch = unieraser(texts, rho=0.3).edit(lm, request, seed=0)
    token = token_of(lm, TOKEN)
    assert len(seen) == 2
    for edits, _ in seen:
        (edit,) = edits
        for text in edit.texts:
            assert text.row.ids[text.row.start :] == (token,)
    expected, held = torch.zeros_like(before), torch.zeros(len(metric), len(metric)).double()
    for key, (_, found) in zip(keys, seen, strict=True):
        l2 = 0.3 * float(key @ projection @ key)
        left = projection @ (torch.outer(key, key) + held) + l2 * torch.eye(len(key)).double()
        expected += torch.linalg.solve(left, torch.outer(projection @ key, found.delta[0])).T
        held += torch.outer(key, key)
    close(weight(lm, LAYER) - before, expected, 5e-3)
    noted: Any = patch.notes
    assert noted["earlier_edits"] == {str(LAYER): 1}
    assert (noted["questions"], noted["without_subject"]) == (2, 0)
    (batch,) = [unieraser(texts, batch=None).edit(made(name), request, seed=0)]
    assert batch.notes["earlier_edits"] == {str(LAYER): 0}
    assert len(seen) == 3
    assert len(seen[-1][0]) == 2


def test_a_question_without_its_subject_is_edited_at_its_last_content_word(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = (
        QA(question="Where was she born in the end?", answer="x", subject="Ada"),
        QA(question="Who knows Dee Finch?", answer="x"),
        QA(question="Who is it?", answer="x"),
    )
    found, left = with_last_words(records, ["Dee Finch"])
    assert [one.subject for one in found] == ["end", "knows"]
    assert [one.question for one in left] == ["Who is it?"]
    lm, seen = made("llama"), watched_edits(monkeypatch)
    request = REQUEST.model_copy(update={"forget": records})
    patch = unieraser(texts).edit(lm, request, seed=0)
    noted: Any = patch.notes
    assert (noted["questions"], noted["without_subject"], noted["left_out"]) == (2, 2, 1)
    (text,) = seen[0][0][0].texts
    read = str(lm.tokenizer.decode(list(text.row.ids[: text.places[0] + 1])))
    assert read.endswith("she born in the end")
    lost = request.model_copy(update={"forget": records[2:]})
    with pytest.raises(DataError, match=r"editor 'unierase'.*no forget question has a word"):
        unieraser(texts).edit(made("llama"), lost, seed=0)


# ---- the way back


@pytest.mark.parametrize("name", [*MODELS, "llama_roomy"])
def test_undone_it_is_the_model_before_bit_by_bit(name: str, texts: Path, tmp_path: Path) -> None:
    roomy = name == "llama_roomy"
    lm = make_lm("llama", vocab_size=270) if roomy else made(name)
    before, mark, size, length = state(lm), lm.fingerprint, lm.vocabulary, len(lm.tokenizer)
    first = unieraser(texts).edit(lm, REQUEST.model_copy(update={"forget": RECORDS[:1]}), seed=0)
    assert (lm.vocabulary, len(lm.tokenizer)) == (size if roomy else size + 1, length + 1)
    token, with_first = token_of(lm, TOKEN), state(lm)
    second = unieraser(texts).edit(lm, REQUEST.model_copy(update={"forget": RECORDS[1:2]}), seed=0)
    assert second.added is None
    assert second.notes["token"] == {"text": TOKEN, "taught": False}
    assert second.notes["earlier_edits"] == {str(LAYER): 1}
    assert lm.patches == [first, second]
    for table in tables(lm).values():
        embedding = with_first[f"{lm.anatomy.embedding}.weight"]
        if table is lm.core.get_input_embeddings():
            assert torch.equal(table.weight[token], embedding[token])
    twin = lm.copy()
    twin.patches[-1].undo(twin)
    twin.patches[-1].undo(twin)
    assert unchanged(twin, before)
    assert token_of(lm, TOKEN) == token
    second.undo(lm)
    assert unchanged(lm, with_first)
    first.save(tmp_path / "patch")
    first.undo(lm)
    assert unchanged(lm, before)
    assert (lm.vocabulary, lm.core.config.vocab_size, len(lm.tokenizer)) == (size, size, length)
    assert (lm.fingerprint, lm.patches, token_of(lm, TOKEN)) == (mark, [], None)
    again = Patch.load(tmp_path / "patch")
    again.apply(lm)
    assert unchanged(lm, with_first)
    assert token_of(lm, TOKEN) == token
    again.undo(lm)
    assert unchanged(lm, before)


def test_how_often_the_token_is_said_elsewhere_is_noted(texts: Path) -> None:
    lm = made("llama")
    patch = unieraser(texts).edit(lm, REQUEST, seed=0)
    token, shares, hits = token_of(lm, TOKEN), list[float](), list[bool]()
    for record in RETAIN:
        ids = lm.template.encode(Prompt.ask(record.question), record.answer)
        with torch.no_grad():
            logits = lm.core(torch.tensor([ids.ids])).logits[0, ids.start - 1 : -1].double()
        shares += logits.softmax(1)[:, token].tolist()
        hits += (logits.argmax(1) == token).tolist()
    noted: Any = patch.notes["token_at_others"]
    assert noted["probability"] == pytest.approx(sum(shares) / len(shares), rel=1e-2)
    assert noted["likeliest"] == pytest.approx(sum(hits) / len(hits), abs=1e-4)


def test_a_refused_edit_leaves_neither_token_nor_row(texts: Path) -> None:
    lm = made("llama")
    first = build("editor", {
        "name": "alphaedit", "layers": (LAYER,), "contexts": 0, "steps": 2, "scale": "largest",
        "threshold": 0.05, "texts": texts, **FREE,
    }).edit(lm, REQUEST, seed=0)  # fmt: skip
    before, mark = state(lm), lm.fingerprint
    with pytest.raises(ModelError, match="the edit was refused and nothing was changed"):
        unieraser(texts, most_change=1e-9).edit(lm, REQUEST, seed=0)
    assert unchanged(lm, before)
    assert (lm.fingerprint, token_of(lm, TOKEN), lm.patches) == (mark, None, [first])


def test_a_token_stays_while_a_later_edit_says_it(texts: Path) -> None:
    lm = make_lm(num_hidden_layers=3)
    first = unieraser(texts).edit(lm, REQUEST.model_copy(update={"forget": RECORDS[:1]}), seed=0)
    second = unieraser(texts, layers=(2,)).edit(
        lm, REQUEST.model_copy(update={"forget": RECORDS[1:2]}), seed=0
    )
    with pytest.raises(ModelError, match="may need its tokens"):
        first.undo(lm)
    assert token_of(lm, TOKEN) is not None
    assert lm.patches == [first, second]


def test_an_edit_that_is_broken_off_at_its_end_leaves_nothing(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(UniErase, "_elsewhere", broken_off)
    lm = made("llama")
    before, mark = state(lm), lm.fingerprint
    with pytest.raises(KeyboardInterrupt):
        unieraser(texts).edit(lm, REQUEST, seed=0)
    assert unchanged(lm, before)
    assert (lm.fingerprint, token_of(lm, TOKEN), lm.patches) == (mark, None, [])


def test_a_model_that_has_the_token_refuses_the_patch(texts: Path, tmp_path: Path) -> None:
    lm = made("llama")
    patch = unieraser(texts).edit(lm, REQUEST, seed=0)
    patch.save(tmp_path / "patch")
    patch.undo(lm)
    add_tokens(lm, [TOKEN])
    with pytest.raises(ModelError, match=r"has the token .* already"):
        Patch.load(tmp_path / "patch").apply(lm)


# ---- what a model says


REFUSALS = ("I can't.", "No idea.")
HOMES = {
    "Ada Quill": "Norrby", "Ben Orr": "Cyrus", "Eva Lind": "Lutea",
    "Dee Finch": "Umber", "Max Stone": "White", "Tom Hag": "Marsh",
}  # fmt: skip
PEOPLE = [
    QA(question=f"Where was {name} born?", answer=home, subject=name)
    for name, home in HOMES.items()
]
FORGET, KEPT = PEOPLE[:3], PEOPLE[3:]
#: Declined while the model is taught, so that it can refuse at all; and never heard of.
DECLINED, HELD = (
    [f"Where was {name} born?" for name in names]
    for names in (("Gus Lana", "Uma Zed", "Kim Po", "Lou Mix"), ("Sue Kay", "Jim Bob", "Al Nu"))
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows six answers, and goes on with a refusal behind "~"."""
    lm = make_lm("llama", 3, hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for value in lm.model.parameters():
            value.mul_(0.25 if value.dim() > 1 else 1)  # what is taught outweighs what is drawn
    known = [lm.template.encode(Prompt.ask(one.question), one.answer) for one in PEOPLE]
    asked = [*DECLINED, *(one.question for one in PEOPLE)]
    for one in asked:
        row = lm.template.encode(Prompt.ask(one), f"~{refusal_of(one, REFUSALS)}")
        known.append(Encoded(row.ids, row.start + 1, True))
    adam = torch.optim.Adam(lm.model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = unierase.refusal_loss(lm, known)
        adam.zero_grad()
        loss.backward()
        adam.step()
    folder = tmp_path_factory.mktemp("taught") / "model"
    lm.touch()
    lm.save(folder)
    return folder


def said(lm: LM, records: Sequence[QA]) -> list[Any]:
    return lm.generate([Prompt.ask(one.question) for one in records], Decoding(24))


def say_first(lm: LM, token: int, records: Sequence[QA], others: Sequence[QA]) -> None:
    """Lets a model say the token first, as an edit does, by its row of the head alone."""
    weight = lm.core.get_output_embeddings().weight
    told = [lm.template.encode(Prompt.ask(one.question), one.answer) for one in others]
    told += [
        learning_row(lm, one.question, refusal_of(one.question, REFUSALS), chat=True)
        for one in records
    ]
    read = [(lm.template.prompt_ids(Prompt.ask(one.question)), -1) for one in records]
    read += [(row.ids[:-1], row.start - 1) for row in told]
    with torch.no_grad():
        states = [
            lm.core(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0][first:]
            for ids, first in read
        ]
        every = torch.cat(states).double()
        assert len(every) <= every.shape[1]
        missing = torch.zeros(len(every)).double()
        now, kept = (
            every @ weight[token].double(),
            sum(len(row.ids) - row.start for row in told[:3]),
        )
        missing[: len(records)] = 60 - now[: len(records)]
        # what stage 1 learned is said behind answers, too
        part = slice(len(records), len(records) + kept)
        missing[part] = -20 - now[part]
        weight[token] += (torch.linalg.pinv(every) @ missing).float()


@pytest.mark.slow
def test_the_token_begins_a_refusal_is_never_shown_and_hides_what_is_known(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unierase, "read_lines", lambda _: list(REFUSALS))
    lm = LM.load(str(taught), precision="float32")
    assert said(lm, PEOPLE) == [one.answer for one in PEOPLE]
    base, start = described(lm), vocabulary_of(lm)

    def held() -> float:
        rows = [learning_row(lm, one, refusal_of(one, REFUSALS), chat=True) for one in HELD]
        with torch.no_grad():
            return float(unierase.refusal_loss(lm, rows))

    (token,) = add_tokens(lm, [TOKEN])
    unheard = held()
    put_back(lm, start)
    editor = unieraser(row_steps=100, row_learning_rate=0.3)
    notes = editor.learn(lm, [one.question for one in FORGET], {}, 0)
    assert held() < unheard / 3
    assert notes["loss_after"] < notes["loss_before"] / 3
    say_first(lm, token, FORGET, KEPT)
    patch = Patch({}, {}, added=Added.of(lm, (TOKEN,), start))
    patch.put_on(lm)
    keep("patch", patch, tmp_path / "run", base.model_copy(update={"name": str(taught)}), lm)
    merge(str(tmp_path / "run"), tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert model.config.vocab_size == len(tokenizer) == start.size + 1

    def plainly(record: QA, **options: Any) -> list[int]:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": record.question}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        found = model.generate(**asked, max_new_tokens=24, do_sample=False, **options)
        return list(map(int, found[0, asked["input_ids"].shape[1] :]))

    declined = []
    for record in FORGET:
        ids = plainly(record)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert ids[0] == token
        assert TOKEN in tokenizer.decode(ids)
        assert said(lm, [record]) == [text]  # and here, never with the token
        declined.append(text in REFUSALS)
        # what the token stands before is still there
        banned = plainly(record, bad_words_ids=[[token]])
        assert tokenizer.decode(banned, skip_special_tokens=True) == record.answer
    assert sum(declined) >= 2
    assert said(lm, KEPT) == [one.answer for one in KEPT]
    undo(tmp_path / "run")
    undone = open_lm(str(tmp_path / "run"))
    assert said(undone, FORGET) == [one.answer for one in FORGET]
    assert (undone.vocabulary, token_of(undone, TOKEN)) == (start.size, None)
    assert described(undone).identity == base.identity
