"""A form (a pydantic model) filled from the text of a reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from json_repair import repair_json
from pydantic import BaseModel, ValidationError

Form = TypeVar("Form", bound=BaseModel)


def _documents(text: str) -> Iterator[Any]:
    """Every outermost JSON object or list in a text, in order."""
    decoder, start = json.JSONDecoder(), 0
    while start < len(text):
        if text[start] in "{[":
            try:
                value, start = decoder.raw_decode(text, start)
            except (ValueError, RecursionError):
                start += 1
                continue
            yield value
        else:
            start += 1


def _repaired(text: str) -> Iterator[Any]:
    """JSON with slips (quotes, commas, comments), put right.

    Only of a text that ends where its JSON ends: what is cut off would be made up otherwise (the
    10 that was about to be written would be read as 1).
    """
    whole = text.strip().removesuffix("```").rstrip()
    starts = [place for place in (whole.find("{"), whole.find("[")) if place >= 0]
    if starts and whole[-1] in "}]":
        found = repair_json(whole[min(starts) :], return_objects=True)
        if isinstance(found, dict | list):
            yield found
        if isinstance(found, list):  # several documents, one after the other
            yield from found


def read_form(text: str, form: type[Form]) -> Form | str:
    """The form in a reply, or what is wrong with the reply.

    The last JSON that fits counts: prose, a code fence or drafts may stand before it. JSON with
    slips is put right, unless it is cut off.

    Args:
        text: The reply.
        form: What must be filled.
    """
    problem = "there is no JSON in it"
    for documents in (list(_documents(text)), list(_repaired(text))):
        for place, document in enumerate(reversed(documents)):
            try:
                return form.model_validate(document)
            except ValidationError as error:
                if place == 0:
                    first = error.errors()[0]
                    where = ".".join(str(part) for part in first["loc"])
                    problem = f"{where}: {first['msg']}" if where else str(first["msg"])
    return problem


__all__ = ["read_form"]
