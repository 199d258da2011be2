"""What a request still needs before a method can work on it: retain rows, rows about names."""

from __future__ import annotations

import logging
from functools import partial

from delible import registry
from delible.cards import METHODS
from delible.context import Context
from delible.errors import RecipeError
from delible.generation import elicited
from delible.lm.lm import LM
from delible.measure.engine import measure
from delible.method import Method
from delible.records import QA, ForgetRequest, RecordBase
from delible.system.asks import Decoding, Generate, Prompt
from delible.system.base import System
from delible.watching import Stage, unwatched

logger = logging.getLogger(__name__)

#: Length of an answer of an automatic retain set, in tokens.
ANSWER_TOKENS = 48
#: Rows of an automatic retain set.
AUTOMATIC_RETAIN = 96
#: In the place of forget rows that the model has not been asked for yet.
STANDS_IN = (QA(question="?", answer="?"),)


def retained(request: ForgetRequest) -> tuple[RecordBase, ...]:
    """Records to keep, neighbours included."""
    return (*request.retain, *request.neighbours)


def elicits(method: Method, request: ForgetRequest) -> bool:
    """Whether the forget rows must be asked of the model first: there are only names."""
    return "forget" in method.needs and not request.forget


def prepared(
    system: System, request: ForgetRequest, method: Method, context: Context
) -> ForgetRequest:
    """The request with retain rows where the method needs some; what cannot work is refused.

    Raises:
        DelibleError: The request gives the method nothing to go by, or it cannot work on the
            system.
    """
    if context.run is not None and method.trains_the_model:
        _must_lie_in_weights(system, method)
    if elicits(method, request) and not request.subjects:
        others = ", ".join(card.name for card in registry.cards(*METHODS) if "names" in card.needs)
        raise RecipeError(
            "there are no forget records.",
            where=f"method '{method.name}'",
            hint="Add --forget FILE, or --subjects NAME to ask the model what it knows (or take a "
            f"method that goes by names alone: {others}).",
        )
    if "retain" in method.needs and not retained(request):
        rows = automatic_retain(system, AUTOMATIC_RETAIN, context.stage)
        request = request.model_copy(update={"retain": rows})
    method.check(system, with_stand_in(method, request))
    return request


def _must_lie_in_weights(system: System, method: Method) -> None:
    """Refuses to train what could not be kept afterwards.

    Raises:
        RecipeError: A part of what answers is not in the model's weights.
    """
    if isinstance(system, LM) and not system.in_weights:
        raise RecipeError(
            f"the model is '{system.name}': a part of it is not in the weights that would be "
            "trained, so the result could not be saved.",
            where=f"method '{method.name}'",
            hint="Take that part off first ('delible undo RUN'), or give the model below it; or "
            "keep nothing (no out=…).",
        )


def with_stand_in(method: Method, request: ForgetRequest) -> ForgetRequest:
    """A request that can be checked before its forget rows are there."""
    if not elicits(method, request):
        return request
    return request.model_copy(update={"forget": STANDS_IN})


def check_review(method: Method, request: ForgetRequest, context: Context) -> None:
    """Whether there will be rows to look at before training.

    Raises:
        RecipeError: No rows are asked for, or they have no place.
    """
    if not elicits(method, request):
        raise RecipeError(
            "there is nothing to review: no rows are asked for.",
            where="review",
            hint="It is for names without forget records, and for methods that train.",
        )
    if context.run is None:
        raise RecipeError(
            "rows to review need a place.", where="review", hint="Give a run folder (out=…)."
        )


def with_forget_rows(
    system: System, request: ForgetRequest, context: Context, *, review: bool
) -> ForgetRequest:
    """The request with rows about its names, as the model tells them, or as the run keeps them."""
    request = elicited.with_rows(system, request, context)
    if context.run is not None and not review:
        elicited.start(context.run, request.forget)
    return request


def automatic_retain(
    system: System, count: int, stage: Stage = unwatched
) -> tuple[RecordBase, ...]:
    """A retain set from the model itself: general questions with its own answers.

    Nothing is taught that the model did not say before; what is protected is its behaviour.
    """
    from delible.world import general

    questions = general()[:count]
    logger.warning(
        f"No retain records were given: keeping the model's own answers to {len(questions)} "
        "general questions instead (--retain FILE protects what matters to you better)."
    )
    asked = {
        record.question: Generate(Prompt.ask(record.question), Decoding(ANSWER_TOKENS))
        for record in questions
    }
    answers = measure(system, asked.values(), progress=partial(stage, "automatic retain set"))
    replies = {question: str(answers[request]) for question, request in asked.items()}
    return tuple(
        QA(question=question, answer=reply, group="automatic")
        for question, reply in replies.items()
        if reply.strip()
    )
