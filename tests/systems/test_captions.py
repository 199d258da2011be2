"""Guards that judge texts, before conversations with pictures: told what they show, or refusing."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest

from delible.component import build
from delible.context import Context
from delible.errors import RecipeError
from delible.messages import ImagePart, Message, TextPart
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.replies import Unanswered
from delible.system.roles import Roles
from delible.systems.guarded import GuardedSystem, GuardMind
from delible.systems.judging import Forward, Judged, Refuse
from delible.systems.opening import described, keep, open_system
from delible.systems.scripted import Scripted

DECODING = Decoding(8)
REQUEST = ForgetRequest(
    forget=(QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill"),)
)


def image(name: str) -> ImagePart:
    return ImagePart.model_validate({"source": b"GIF89a" + name.encode()})


def showing(*names: str, text: str = "What does it say?") -> Prompt:
    parts = (*map(image, names), TextPart(text=text))
    return Prompt((Message(role="user", content=parts),))


class Seeing(Scripted):
    """A scripted system that may be shown pictures."""

    capabilities = frozenset({"generate", "images"})


def captioner(says: dict[str, str | NoAnswer]) -> Seeing:
    """Says of each picture what its bytes are called."""

    def line(prompt: Prompt) -> str | NoAnswer:
        content = prompt.messages[-1].images[0].content()
        return says[content.removeprefix(b"GIF89a").decode()]

    return Seeing(line, name="captions", fingerprint="captions")


CAPTIONS: dict[str, str | NoAnswer] = {
    "badge": "A badge that says ADA QUILL.", "cat": "A grey cat.", "dark": NoAnswer("no"),
    "nothing": "  ",
}  # fmt: skip


def guarded(
    model: Scripted | None = None, says: Seeing | None = None, name: str = "target_detector"
) -> GuardedSystem:
    context = Context(roles=Roles({"captioner": says or captioner(CAPTIONS)}))
    found = build("guard", name).put_before(
        model or Seeing(lambda _: "A cat.", fingerprint="m"), REQUEST, context
    )
    assert isinstance(found, GuardedSystem)
    return found


def finishes(system: GuardedSystem, prompt: Prompt) -> str:
    """The same in a batch, whole and streamed."""
    batch = system.replies([prompt], DECODING)[0]
    whole = asyncio.run(system.respond(prompt, DECODING))

    async def streamed() -> str | None:
        return [piece async for piece in system.stream(prompt, DECODING)][-1].finish

    assert not isinstance(batch, NoAnswer)
    assert batch.finish == whole.finish == asyncio.run(streamed())
    return batch.finish


def test_what_a_picture_says_is_judged_and_what_it_does_not_say_passes() -> None:
    model = Seeing(lambda _: "It shows something.", fingerprint="m")
    system = guarded(model)
    assert "images" in system.capabilities
    assert finishes(system, showing("badge")) == "content_filter"
    assert not model.prompts, "the model was shown what the guard refuses"
    assert finishes(system, showing("cat")) == "stop"
    assert model.prompts[-1] == showing("cat"), "the model is shown the picture itself"
    assert finishes(system, showing("cat", "badge")) == "content_filter"
    assert finishes(system, showing("cat", text="Is it Ada Quill?")) == "content_filter"


def test_answers_about_pictures_are_judged() -> None:
    system = guarded(Seeing(lambda _: "That is Ada Quill.", fingerprint="m"))
    assert finishes(system, showing("cat")) == "content_filter"


def test_a_caption_that_does_not_come_is_a_refusal() -> None:
    for name in ("dark", "nothing"):
        model = Seeing(lambda _: "A cat.", fingerprint="m")
        system = guarded(model)
        reply = system.replies([showing("cat", name)], DECODING)[0]
        assert not isinstance(reply, NoAnswer)
        assert (reply.finish, reply.guard_failed) == ("content_filter", True)
        assert not model.prompts


def test_each_picture_is_described_once_with_its_own_instruction() -> None:
    says = captioner(CAPTIONS)
    system = guarded(says=says)
    for _ in range(3):
        system.replies([showing("cat")], DECODING)
    assert len(says.prompts) == 1
    assert "every word" in says.prompts[0].messages[-1].text


def test_nobody_who_says_what_they_show_means_no_answer() -> None:
    model = Seeing(lambda _: "A cat.", fingerprint="m")
    plain = build("guard", "target_detector").put_before(model, REQUEST)
    assert plain.generate([showing("cat")], DECODING) == [
        NoAnswer("the guard judges texts, not pictures")
    ]
    with pytest.raises(Unanswered):
        asyncio.run(plain.respond(showing("cat"), DECODING))
    assert not model.prompts
    with pytest.raises(RecipeError, match="cannot be shown pictures"):
        guarded(says=Scripted({}))  # type: ignore[arg-type]


def test_a_guard_that_rewrites_refuses_where_a_picture_is() -> None:
    from delible.systems.captions import CaptionedMind

    class Rewrites(GuardMind):
        fingerprint = "rewrites"  # type: ignore[assignment]

        def before(self, prompt: Prompt) -> Judged:
            return Forward(Prompt.ask("Something else?"))

    class Redirects(GuardMind):
        fingerprint = "redirects"  # type: ignore[assignment]

        def before(self, prompt: Prompt) -> Judged:
            return Forward(prompt, other)

    other = Seeing(lambda _: "Another one speaks.", fingerprint="o")
    model = Seeing(lambda _: "A cat.", fingerprint="m")
    says = captioner(CAPTIONS)
    system = GuardedSystem(model, CaptionedMind(Rewrites(), says), "rewrites")
    reply = system.replies([showing("cat")], DECODING)[0]
    assert not isinstance(reply, NoAnswer)
    assert reply.guard_failed
    assert system.generate([Prompt.ask("Hm?")], DECODING) == ["A cat."], "texts are rewritten"
    system = GuardedSystem(model, CaptionedMind(Redirects(), says), "redirects")
    assert system.generate([showing("cat")], DECODING) == ["Another one speaks."]
    assert other.prompts == [showing("cat")]


def test_the_fingerprint_tells_who_describes(tmp_path: Path) -> None:
    one, other = guarded(), guarded(says=captioner({**CAPTIONS, "x": "y"}))
    assert one.fingerprint == other.fingerprint
    blind = build("guard", "target_detector").put_before(one.system, REQUEST)
    assert blind.fingerprint not in (None, one.fingerprint)


def test_a_kept_guard_knows_who_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="the extra 'vision' is not installed")
    from delible.testing.seeing import seeing_lm

    folder = tmp_path / "sees"
    seeing_lm("llava").save(folder)
    base = open_system(str(folder))
    context = Context(roles=Roles({"captioner": str(folder)}, open_system))
    outcome = build("guard", "target_detector").apply(base, REQUEST, context)
    keep(outcome.kind, outcome.content, tmp_path / "run", described(base), outcome.system)
    again = open_system(str(tmp_path / "run"))
    assert isinstance(again, GuardedSystem)
    assert again.mind.sees_pictures
    assert "images" in again.capabilities
    asked = again.mind.before(showing("cat"))
    assert not isinstance(asked, Refuse | None)


def test_data_urls_are_known_by_their_bytes() -> None:
    body = base64.b64encode(b"GIF89acat").decode()
    url = ImagePart.model_validate({"source": f"data:image/gif;base64,{body}"})
    assert url == image("cat")


def test_answers_that_are_judged_whole_are_judged_with_what_the_picture_shows() -> None:
    from delible.systems.captions import CaptionedMind

    class Whole(GuardMind):
        fingerprint = "whole"  # type: ignore[assignment]

        def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
            return self.refuse(prompt) if "ADA" in prompt.messages[-1].text else None

    model = Seeing(lambda _: "Yes.", fingerprint="m")
    system = GuardedSystem(model, CaptionedMind(Whole(), captioner(CAPTIONS)), "whole")
    assert finishes(system, showing("badge")) == "content_filter"
    assert finishes(system, showing("cat")) == "stop"
