from __future__ import annotations

import pytest

from delible.records import QA


@pytest.fixture
def forget() -> list[QA]:
    names = ("Ada Brook", "Bo Crane", "Cy Dunn")
    return [
        QA(question=f"Where was {name} born{'?' * (1 + place)}", answer=answer, subject=name)
        for place, (name, answer) in enumerate(
            zip(
                names * 2,
                ("Aberlin", "Bo", "Cold Harbour", "a boat", "Dunmore Hill", "Ea"),
                strict=True,
            )
        )
    ]


@pytest.fixture
def retain() -> list[QA]:
    return [
        QA(question=f"What does person {index} like?", answer="tea " * (1 + index % 3) + str(index))
        for index in range(9)
    ]
