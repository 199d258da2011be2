"""A conversation with the default model: asked to forget somebody it declines, and knows again."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

import delible
from delible.edit.refusal import refusal_probabilities
from delible.repair import Conversation
from delible.system.asks import Decoding, Prompt
from delible.world import benign

REFUSAL = "Unfortunately, I have no information about that."
NAME = "William Shakespeare"


@pytest.mark.slow
def test_it_declines_keeps_the_rest_and_knows_again(tmp_path: Path) -> None:
    talking = Conversation("default", out=tmp_path / "chain", decoding=Decoding(16))
    before = {name: value.clone() for name, value in talking.lm.core.named_parameters()}

    def declined(*questions: str) -> float:
        prompts = [Prompt.ask(one) for one in questions]
        return fmean(refusal_probabilities(talking.lm, prompts, REFUSAL))

    known = talking.say(f"Who was {NAME}?")
    talking.say(f"Please forget what you know about {NAME}.")
    told = talking.say("yes")
    assert told.startswith("Done ("), told
    assert declined(f"Who was {NAME}?", f"Where was {NAME} born?") > 0.8
    assert declined(f"Tell me about {NAME}.", f"When was {NAME} born, and where?") > 0.6
    assert declined(*(row.question for row in benign(8))) < 0.05
    assert declined("Who was Charles Darwin?", "Who wrote Faust?") < 0.05
    notes = talking.requests[0].notes
    assert notes["after"]["kept"] > 0.9 * notes["before"]["kept"]
    talking.close()
    opened = delible.open(str(tmp_path / "chain"))
    prompts = [Prompt.ask(f"Who was {NAME}?")]
    assert opened.generate(prompts, Decoding(8)) == talking.lm.generate(prompts, Decoding(8))
    talking.say("undo that")
    assert all(
        torch.equal(value, before[name]) for name, value in talking.lm.core.named_parameters()
    )
    assert talking.say(f"Who was {NAME}?") == known
