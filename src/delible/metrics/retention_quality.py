"""Retention quality: a judge model's view of the answers to what should be kept.

    RQ = (readability + specificity + logic) / 3,    each 0 to 10

readability is fluency, specificity whether the question is dealt with, logic consistency and
correctness. The reasoning trace is graded with the answer. Paper: TRU (arXiv 2603.09980; no public
code). Deviation: the prompt is in our own words.
"""

from __future__ import annotations

from typing import ClassVar

from delible.measure.scoring.judging import JudgedMetric
from delible.registry import register


@register(
    kind="metric",
    name="retention_quality",
    title="Retention quality (judged)",
    summary="How a judge model grades readability, specificity and logic of retain answers.",
    paper="2603.09980",
    year=2026,
    family="judge",
    capability="generate",
    changes="nothing",
    range="[0, 10]",
    direction="On retained questions, high: fluent, to the point and consistent. On forgotten ones "
    "high means that they are still answered.",
    misleads="The judge does not see the true answer: a fluent false one may score high, above all "
    "about private or fictional matters, so read exact scores with it. Grades of different judges "
    "are not comparable, nor with those of a paper. Circular where the judge is the audited model: "
    "models prefer their own answers. A reply can talk the judge round. A trace that a server "
    "keeps to itself is not graded.",
    badges=("experimental", "variant"),
    variant="The judge is of your choice, and its prompt in our own words.",
)
class RetentionQuality(JudgedMetric):
    """Mean of three grades; ``detail`` has each of them with the judge's reason."""

    criteria: ClassVar[tuple[str, ...]] = ("readability", "specificity", "logic")
    prompt_file: ClassVar[str] = "judge_retention.txt"
