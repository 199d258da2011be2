"""Trace detection: can a classifier tell from outputs that a model is not the original any more?

Original and attacked model get the same prompts, about what was forgotten and about other things.
A classifier learns on half of the prompts whose output it is, and is tested on the other half:

    accuracy = share of the test outputs that are given to the right model       (0.5 = no trace)

Outputs are answers (``text``: character n-grams), the final hidden state at the prompt's last
token (``pre_logit``), or the states of all layers (``activation``), each projected on the first
right singular vector of the difference between the two models on the training prompts.

That a model was *changed* is no trace of *unlearning*: the accuracy for the original after benign
fine-tuning is told beside it. ``kinds`` tells original, benign fine-tuning, reference and
attacked model from each other.

The p-value is exact: if outputs say nothing, the two of a test prompt may be exchanged, so prompts
with both right are as likely as those with both wrong.

Paper: arXiv 2506.14003. Reference code: github.com/OPTML-Group/Unlearn-Trace.
Deviations: n-grams and logistic regression instead of a fine-tuned language model or a network
with a hidden layer; greedy answers of a few dozen tokens without repetition penalty; hundreds of
prompts fewer. One code path asks all models. Outputs that are the same for both are never told.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from scipy.stats import binom

from delible.cards import Depth
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.lm.states import Span
from delible.measure.attack import AttackContext, Budget, InferenceAttack, Seen
from delible.measure.linear_probe import fit_probe
from delible.measure.scoring.separation import area_under_curve
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.system.questions import ask
from delible.train.randomness import generator, shuffled
from delible.train.tuning import FineTuning
from delible.world import benign, general, unrelated

WHERE = "attack 'trace_detection'"
Detector = Literal["text", "pre_logit", "activation"]
TITLES = {"text": "answers", "pre_logit": "final states", "activation": "states of all layers"}
#: Buckets of character n-grams, and the longest n.
BUCKETS, LONGEST = 1024, 3
#: Letters of a prompt without a question mark that tell it from others.
KEY_LETTERS = 100
#: A difference between states that is this share of them, or less, is none.
NOTHING = 1e-6

Rows = Float[np.ndarray, "prompt *feature"]


def text_features(texts: Sequence[str]) -> Float[np.ndarray, "text feature"]:
    """log(1 + count) of hashed character n-grams, and of the length."""
    found = np.zeros((len(texts), BUCKETS + 1))
    for row, text in zip(found, texts, strict=True):
        for size in range(1, LONGEST + 1):
            for at in range(len(text) - size + 1):
                row[zlib.crc32(text[at : at + size].encode()) % BUCKETS] += 1
        row[-1] = len(text)
    return np.log1p(found)


def directions(
    original: Float[np.ndarray, "prompt layer hidden"],
    other: Float[np.ndarray, "prompt layer hidden"],
) -> Float[np.ndarray, "layer hidden"]:
    """By layer the direction along which two models differ most, towards the other; or zeros."""
    found = np.zeros(original.shape[1:])
    for layer, row in enumerate(found):
        difference = (other - original)[:, layer]
        if np.linalg.norm(difference) > NOTHING * np.linalg.norm(original[:, layer]):
            first = np.linalg.svd(difference, full_matrices=False)[2][0]
            row[:] = first if first @ difference.mean(axis=0) >= 0 else -first
    return found


def predictions(
    trained: Sequence[Float[np.ndarray, "row feature"]],
    tested: Sequence[Float[np.ndarray, "prompt feature"]],
    penalty: float,
) -> Int[np.ndarray, "model prompt"]:
    """The model that each test output is given to, by number; the first of equals.

    Args:
        trained: Outputs to learn from, by model; as many of each.
        tested: Outputs to tell, by model; of the same prompts.
        penalty: Of the classifiers' squared weights.
    """
    features = np.concatenate(trained)
    labels = np.repeat(np.arange(len(trained)), [len(rows) for rows in trained])
    odds = []
    for number in range(len(trained)):
        probe = fit_probe(features, labels == number, penalty)
        odds.append([probe(rows) for rows in tested])
    return np.argmax(np.round(np.array(odds), 9), axis=0)


def accuracy(found: Int[np.ndarray, "model prompt"]) -> float:
    """Share of the outputs that are given to the right model, as many of each; in [0, 1]."""
    return float((found == np.arange(len(found))[:, None]).mean())


def chance(found: Int[np.ndarray, "two prompt"]) -> float:
    """Probability of telling so many pairs right, or more, if the outputs say nothing."""
    right: Bool[np.ndarray, "two prompt"] = found == np.array([[0], [1]])
    both, neither = int(right.all(axis=0).sum()), int((~right).all(axis=0).sum())
    return float(binom.sf(both - 1, both + neither, 0.5))


def prompt_key(prompt: Prompt) -> str:
    """What two prompts have in common that ask the same: the text up to the question mark."""
    text = prompt.messages[-1].text if prompt.messages else prompt.text or ""
    head = text.partition("?")[0] if "?" in text else text[:KEY_LETTERS]
    return " ".join(re.findall(r"\w+", head.casefold()))


@register(
    kind="attack",
    name="trace_detection",
    title="Traces of unlearning",
    summary="Learns to tell the model's outputs from the original's, also where nothing is asked "
    "about what was forgotten.",
    paper="2506.14003",
    year=2025,
    family="inference",
    needs=("forget",),
    changes="nothing",
    reversible=True,
    capability="generate",
    depth="standard",
    misleads="A trace tells that a model was changed: compare benign fine-tuning. With few prompts "
    "a weak classifier learns little, and 0.5 is no proof.",
    badges=("variant",),
    variant="N-grams and logistic regression; greedy short answers; benign fine-tuning beside it.",
)
class TraceDetection(InferenceAttack):
    """Options of trace detection."""

    compares = ("original", "reference")

    detector: Detector = Field("pre_logit", description="Which outputs are told apart.")
    prompts: int = Field(60, ge=4, description="Prompts of each source at most.")
    max_new_tokens: int = Field(48, ge=1, description="Tokens of an answer at most (text).")
    penalty: float = Field(1.0, gt=0, description="Penalty of the classifier's squared weights.")
    benign_steps: int = Field(
        40, ge=0, description="Steps of benign fine-tuning of the original (a control); 0: none."
    )
    learning_rate: float = Field(
        2e-5, gt=0, le=1, description="Peak rate of the benign fine-tuning."
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Final states and those of all layers; deep also answers."""
        found: tuple[Mapping[str, object], ...] = (
            {"detector": "pre_logit"}, {"detector": "activation"},
        )  # fmt: skip
        return (*found, {"detector": "text"}) if depth == "deep" else found

    def variant_title(self) -> str:
        """Such as "final states"."""
        return TITLES[self.detector]

    def budget(self, context: AttackContext) -> Budget:
        """Its prompts, and the control's steps."""
        return Budget(queries=2 * self.prompts, steps=self.benign_steps)

    def infer(self, system: System, context: AttackContext) -> Seen:
        """Accuracies by source of the prompts; by layer how far a shift tells the models apart.

        Raises:
            DataError: There are too few prompts.
            ModelError: There is no original, or states are to be read of what has no weights.
        """
        if context.original is None:
            raise ModelError(
                "there is no original whose outputs could be told from these.",
                where=WHERE,
                hint="Add --before MODEL.",
            )
        trial = Trial(self, context)
        outputs = {"original": trial.outputs(context.original), "system": trial.outputs(system)}
        numbers: dict[str, float | None] = {}
        pair = ("original", "system")
        for tested in trial.prompts:
            other = next(source for source in trial.prompts if source != tested)
            own = trial.told(outputs, pair, (tested,), tested)
            numbers[tested] = accuracy(own)
            numbers[f"{tested}_chance"] = chance(own)
            numbers[f"{tested}_from_{other}"] = accuracy(
                trial.told(outputs, pair, (other,), tested)
            )
            numbers[f"{tested}_from_both"] = accuracy(
                trial.told(outputs, pair, tuple(trial.prompts), tested)
            )
        if self.detector == "text":
            numbers["same_answers"] = trial.same(outputs)
        if self.benign_steps:
            outputs["benign"] = trial.tuned(context.original)
            for tested in trial.prompts:
                told = trial.told(outputs, ("original", "benign"), (tested,), tested)
                numbers[f"benign_{tested}"] = accuracy(told)
        if context.reference is not None and context.reference.fingerprint != system.fingerprint:
            outputs["reference"] = trial.outputs(context.reference)
        if len(outputs) > 2:
            every = [
                trial.told(outputs, tuple(outputs), tuple(trial.prompts), tested)
                for tested in trial.prompts
            ]
            found = np.concatenate(every, axis=1)
            numbers["kinds"], numbers["kinds_by_luck"] = accuracy(found), 1 / len(outputs)
            changed = found != 0
            numbers["kinds_changed_or_not"] = float(
                (changed == (np.arange(len(found)) != 0)[:, None]).mean()
            )
        return Seen(None, numbers, trial.shifts(outputs))


class Trial:
    """Prompts in two halves, and what models put out on them."""

    def __init__(self, options: TraceDetection, context: AttackContext) -> None:
        self.options, self.context = options, context
        self.prompts = {
            "forget": self._prompts(context.forget, set()),
        }
        known = {prompt_key(prompt) for prompt in self.prompts["forget"]}
        self.prompts["generic"] = self._prompts([*general(), *unrelated()], known)
        for source, found in self.prompts.items():
            if len(found) < 4:
                raise DataError(
                    f"there are {len(found)} different {source} prompts; it learns on half of "
                    "them, two at least, and tests on the others.",
                    where=WHERE,
                    hint="Add questions to --forget.",
                )
        #: By source, which prompts are learned from.
        self.learned: dict[str, Bool[np.ndarray, " prompt"]] = {
            source: np.arange(len(found)) < len(found) // 2
            for source, found in self.prompts.items()
        }

    def _prompts(self, records: Sequence[RecordBase], known: set[str]) -> list[Prompt]:
        """Different prompts of records in an order drawn by the seed."""
        found: dict[str, Prompt] = {}
        for record in records:
            prompt = ask(record)
            if prompt is not None and (key := prompt_key(prompt)) not in known:
                found.setdefault(key, prompt)
        random = generator(self.context.seed, "trace_detection.prompts")
        return shuffled(list(found.values()), random)[: self.options.prompts]

    def outputs(self, system: System) -> dict[str, Rows]:
        """What a system puts out, by source.

        Raises:
            ModelError: States are to be read of what has no weights.
        """
        every = tuple(prompt for found in self.prompts.values() for prompt in found)
        key = ("trace", system.fingerprint, self.options.detector, every,
               self.options.max_new_tokens)  # fmt: skip
        if system.fingerprint is None:
            rows = self._read(system, every)
        else:
            rows = self.context.states.once(key, lambda: self._read(system, every))
        count = len(self.prompts["forget"])
        return {"forget": rows[:count], "generic": rows[count:]}

    def _read(self, system: System, prompts: Sequence[Prompt]) -> Rows:
        if self.options.detector == "text":
            answers = system.generate(prompts, Decoding(self.options.max_new_tokens))
            return text_features([one if isinstance(one, str) else "" for one in answers])
        if not isinstance(system, LM):
            raise ModelError(
                f"'{system.name}' shows no hidden states.",
                where=WHERE,
                hint="Choose the detector 'text'.",
            )
        rows = [system.template.encode(prompt, "") for prompt in prompts]
        spans = [Span(row, row.start - 1, row.start) for row in rows]
        states = torch.stack([
            one["block"][:, 0] for one in self.context.states.states(system, spans)
        ])  # fmt: skip
        if self.options.detector == "pre_logit":
            states = states[:, -1]
            if system.anatomy.norm is not None:
                norm = system.core.get_submodule(system.anatomy.norm)
                weight = next(norm.parameters(), states)
                with torch.no_grad():
                    states = norm(states.to(weight.device, weight.dtype)).float().cpu()
        return np.nan_to_num(states.double().numpy(), nan=0.0, posinf=0.0, neginf=0.0)

    def tuned(self, original: LM) -> dict[str, Rows]:
        """What the original puts out after fine-tuning on harmless tasks."""
        options = self.options
        key = ("trace benign", original.fingerprint, options.detector, self.context.seed,
               options.benign_steps, options.learning_rate, options.max_new_tokens,
               *(tuple(found) for found in self.prompts.values()))  # fmt: skip

        def make() -> dict[str, Rows]:
            tuning = FineTuning(options.benign_steps, options.learning_rate)
            return self.outputs(tuning.tuned(original, benign(), self.context.seed).lm)

        return self.context.states.once(key, make)

    def told(
        self,
        outputs: Mapping[str, Mapping[str, Rows]],
        models: Sequence[str],
        trained: Sequence[str],
        tested: str,
    ) -> Int[np.ndarray, "model prompt"]:
        """The model that each output to a test prompt is given to, by number.

        Args:
            models: Which ones; the first is the original.
            trained: Sources of the prompts that are learned from.
            tested: Source of the test prompts.
        """
        learned = [self._part(outputs[one], trained, True) for one in models]
        held = [self._part(outputs[one], (tested,), False) for one in models]
        if self.options.detector == "activation":
            axes = [directions(learned[0], rows) for rows in learned[1:]]
            learned, held = (
                [np.concatenate([(rows * axis).sum(axis=2) for axis in axes], axis=1)
                 for rows in part]
                for part in (learned, held)
            )  # fmt: skip
        return predictions(learned, held, self.options.penalty)

    def _part(self, rows: Mapping[str, Rows], sources: Sequence[str], learned: bool) -> Rows:
        return np.concatenate([
            rows[source][self.learned[source] == learned] for source in sources
        ])  # fmt: skip

    def same(self, outputs: Mapping[str, Mapping[str, Rows]]) -> float:
        """Share of the prompts to which both say the same."""
        equal = [
            (outputs["original"][source] == outputs["system"][source]).all(axis=1)
            for source in self.prompts
        ]
        return float(np.concatenate(equal).mean())

    def shifts(self, outputs: Mapping[str, Mapping[str, Rows]]) -> list[float | None]:
        """By layer how far the generic test prompts' states are told by the learned direction.

        Probability that the system's state lies further along it than the original's, in [0, 1].
        """
        if self.options.detector != "activation":
            return []
        learned = [self._part(rows, ("generic",), True) for rows in outputs.values()]
        held = [self._part(rows, ("generic",), False) for rows in outputs.values()]
        axis = directions(learned[0], learned[1])
        low, high = ((rows * axis).sum(axis=2) for rows in held[:2])
        return [
            area_under_curve(low[:, layer].tolist(), high[:, layer].tolist())
            for layer in range(low.shape[1])
        ]
