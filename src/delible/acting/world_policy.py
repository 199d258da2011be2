"""Policies by rule for questions about a made-up world: a planner, and one who searches.

There are three ways to search for an answer, and which one leads to it depends on the question. The
planner does what worked for the likeliest question that it is shown, but not what failed for this
very one; without a case it takes the first way. For trying memories of cases out without a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from delible.acting.world_tasks import Question
from delible.system.asks import Prompt

#: How a task is worded: what is searched for.
WAYS = (
    "Search for the person alone", "Search for the whole question", "Search without the person",
)  # fmt: skip


def planner(prompt: Prompt) -> str:
    """Replies to the prompts of a planner, for use as a script."""
    told = prompt.messages[-1].text
    done = re.findall(r"^Result: (.+)$", told, re.MULTILINE)
    if done:
        return json.dumps({"final_answer": done[-1]})
    question = told.rpartition("Question: ")[2].splitlines()[0]
    good, _, bad = told.partition("Plans that did not work:")
    worked = re.findall("|".join(WAYS), good)
    failed = {way for way in WAYS if f"{question}\n1. {way}" in bad}
    left = [way for way in (*worked, *WAYS) if way not in failed or len(failed) == len(WAYS)]
    return json.dumps({"plan": [{"id": 1, "description": f"{left[0]}: {question}"}]})


class Searcher:
    """Searches as it is told, and says what the passage says that fits the question.

    Args:
        asked: All questions; their true values are what it can tell in a passage.
    """

    def __init__(self, asked: Sequence[Question]) -> None:
        self.by_text = {one.text: one for one in asked}

    def __call__(self, prompt: Prompt) -> str:
        way, _, text = prompt.messages[1].text.partition(": ")
        question = self.by_text[text]
        if len(prompt.messages) == 2:
            queries = (question.subject, text, text.replace(question.subject, ""))
            query = queries[WAYS.index(way)]
            return json.dumps({"tool": "search", "arguments": {"query": query, "count": 1}})
        value = (question.record.aliases or (question.record.answer,))[0]
        return json.dumps({"answer": value if value in prompt.messages[-1].text else "unknown"})


__all__ = ["WAYS", "Searcher", "planner"]
