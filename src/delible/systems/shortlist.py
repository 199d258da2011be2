"""Which of many subjects a text should be compared with by somebody who reads a list of them.

A short list is told whole. Of a long one, in which a reader would lose the thread, those that the
text names, and those whose names or records it is closest to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from delible.lm.encoder import Encoder
from delible.names import Names
from delible.records import ForgetRequest
from delible.systems.likeness import Likeness
from delible.systems.record_texts import answers_of, questions_of


class Subjects:
    """The subjects of a request: which of them a text should be compared with.

    Args:
        targets: Names of each.
        likeness: Names and records, and whose they are; None where all subjects are listed always.
        most: Subjects that are listed at most, besides those that are named.
    """

    def __init__(
        self,
        targets: Mapping[str, Sequence[str]],
        likeness: tuple[Likeness, Sequence[str]] | None,
        most: int,
    ) -> None:
        self.targets, self.likeness, self.most = targets, likeness, most
        self._owners = {name: subject for subject, names in targets.items() for name in names}
        self.names = Names(self._owners)

    @classmethod
    def of(
        cls,
        request: ForgetRequest,
        targets: Mapping[str, Sequence[str]],
        most: int,
        encoder: Callable[[], Encoder],
    ) -> Self:
        """Those of a request; the encoder is loaded if there are more than ``most``."""
        if len(targets) <= most:
            return cls(targets, None, most)
        rows = [(name, subject) for subject, names in targets.items() for name in names]
        for record in request.forget:
            if record.subject:
                texts = (*questions_of(record), *answers_of(record))
                rows += [(text, record.subject) for text in texts]
        index = Likeness(encoder(), [text for text, _ in rows])
        return cls(targets, (index, [owner for _, owner in rows]), most)

    def identity(self, request: ForgetRequest) -> Any:
        """What decides which subjects are listed, besides the options; as plain data."""
        if self.likeness is None:
            return None
        return [request.id, self.likeness[0].encoder.identity]

    def listed(self, subjects: Sequence[str]) -> str:
        """Subjects in a prompt, other names in brackets."""
        told = [
            name + (f" (also: {', '.join(others)})" if (others := self.targets[name][1:]) else "")
            for name in subjects
        ]
        return "; ".join(told)

    def for_text(self, *texts: str) -> list[str]:
        """Subjects in the order of the request."""
        if self.likeness is None:
            return list(self.targets)
        named = {self._owners[match.name] for text in texts for match in self.names.find(text)}
        likeness, owners = self.likeness
        cosines = likeness.cosines(likeness.encoder.encode([text for text in texts if text]))
        near: dict[str, None] = {}
        for place in (-cosines.max(axis=0)).argsort(kind="stable"):
            if len(near) == self.most:
                break
            near[owners[int(place)]] = None
        return [subject for subject in self.targets if subject in named or subject in near]


__all__ = ["Subjects"]
