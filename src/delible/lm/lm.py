"""The language model as the ideas see it: model + tokenizer + anatomy, and what it answers."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from delible.errors import ModelError, RunError
from delible.lm.adapters import check_name, wearing
from delible.lm.anatomy import Anatomy
from delible.lm.body import AfterHead, Budget, Road
from delible.lm.budget import measure_budget, until_it_fits
from delible.lm.checks import check
from delible.lm.decode import continue_rows
from delible.lm.derive import derive
from delible.lm.ends import context_tokens, declared_ends
from delible.lm.held import check_packing
from delible.lm.identity import Identity, settings_of
from delible.lm.inspection import inspect
from delible.lm.load import ModelInfo, load_model
from delible.lm.parts import has_other_parts, kind_of
from delible.lm.pictures import Pictures
from delible.lm.pretrained import processor_of
from delible.lm.scoring import NOT_FINITE, score
from delible.lm.seeing import check as cannot_see
from delible.lm.seeing import seeing
from delible.lm.sharded import asked_for
from delible.lm.template import Encoded, Template
from delible.lm.worn import Removable, Worn
from delible.precision import BasePrecision, Precision, Resolved
from delible.system.asks import (
    Array,
    Decoding,
    Inspection,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.system.base import System

logger = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")


class LM(Worn):
    """A Hugging Face causal language model, white-box.

    Args:
        model: The model; fp32 weights unless the caller wants otherwise.
        tokenizer: Its tokenizer.
        name: For people and manifests.
        precision: Of the computation, see :mod:`delible.precision`.
        origin: Where these weights can be loaded again; None: nowhere.
        outline: The model has no numbers (:mod:`delible.lm.outline`): nothing is tried.
        processor: What reads pictures for it; without one it is given texts only.

    Raises:
        ModelError: The architecture's parts cannot be derived, or the parts do not
            reproduce the model's own logits.
    """

    capabilities = frozenset({"generate", "score", "distribution", "hidden", "weights", "adapters"})
    #: Called with so many answers' worth of work whenever it is done, if somebody wants to know.
    on_answers: Callable[[int], None] | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        precision: Precision = "auto",
        origin: ModelInfo | None = None,
        outline: bool = False,
        processor: Any = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.origin = model, tokenizer, name, origin
        #: Files of other parts (an image processor), which a saved model needs too.
        self.companions = dict(origin.companions) if origin else {}
        #: What was added to the weights and can be taken off again, the last one first.
        self.patches: list[Removable] = []
        self.anatomy: Anatomy = self._understood(derive)
        self.template = Template(
            tokenizer,
            max_length=min(2048, context_tokens(self.core.config) or 2048),
            declared_ends=self._declared_ends(),
        )
        self.capabilities = self.capabilities | self.template.capabilities
        self.precision: Resolved = self.resolved(precision)
        self._identity = Identity(self.model)
        self.shares_prefix = self.grows_trees = False
        self.after_head = AfterHead()
        self.road: Road = "plain"
        if outline:
            self.shares_prefix = True
            return
        with self.evaluating():
            self._understood(lambda core: check(self))
        if processor is not None:
            self._opens_its_eyes(processor)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        precision: Precision = "auto",
        device: str | None = None,
        base_precision: BasePrecision = "float32",
    ) -> Self:
        """Loads ``"default"``, a hub id, a folder, a run directory or a ``.gguf`` file.

        Args:
            precision: Of the computation.
            device: None: an accelerator, if there is one (main memory where the environment
                spreads models over processes).
            base_precision: Of the weights. Shorter than fp32 is for what stays frozen: below an
                adapter, or where a model is only asked or edited.

        Raises:
            ModelError: See :func:`delible.lm.load.load_model`; or nothing here packs weights.
        """
        check_packing(base_precision)
        dtype = torch.float32 if base_precision == "float32" else torch.bfloat16
        model, tokenizer, info = load_model(name, dtype=dtype)
        # what is spread over processes is too large for one accelerator
        on_device = torch.cuda.is_available() and not asked_for()
        device = device or ("cuda" if on_device else "cpu")
        lm = cls(
            model.to(device), tokenizer, name=name, precision=precision, origin=info,
            processor=processor_of(model, tokenizer, info.place, info.revision),
        )  # fmt: skip
        lm.hold(base_precision)
        if lm.road == "plain":
            logger.warning(
                f"{type(lm.core).__name__} does not answer in batches as it answers alone: "
                "it answers one question after the other, which is slow."
            )
        return lm

    # ---- parts

    @property
    def other_parts(self) -> frozenset[int]:
        """Identities of the parameters that no text passes through (of a tower for images)."""
        if not has_other_parts(self.core.config):
            return frozenset()
        language = (self.anatomy.backbone, self.anatomy.head, self.anatomy.embedding)
        own = {id(one) for path in language for one in self.core.get_submodule(path).parameters()}
        return frozenset(id(one) for one in self.core.parameters()) - own

    def _opens_its_eyes(self, processor: Any) -> None:
        """Takes pictures from here on, if the engine gives what the model itself does."""
        try:
            self.pictures = self.template.pictures = Pictures(processor)
            with self.evaluating():
                trouble = cannot_see(self)
        except ModelError as error:
            trouble = error.problem
        if trouble:
            self.pictures = self.template.pictures = None
            logger.warning(
                f"{type(self.core).__name__} is given texts only, no pictures: {trouble}"
            )
        else:
            self.capabilities = self.capabilities | {"images"}

    def seeing(self) -> AbstractContextManager[None]:
        """Context of a call of the backbone, in which tokens of pictures are taken."""
        return nullcontext() if self.pictures is None else seeing(self)

    # ---- identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that an answer depends on: weights, template, precision, adapters,
        hooks, replaced modules (see ``identity.py``).

        Weights that were changed in a way that PyTorch does not count (``.data``, outside of its
        own operations) have to be told with :meth:`touch`.
        """
        parts = [self._identity.of(self.model), self.template.fingerprint, self.precision]
        joined = "/".join([*parts, settings_of(self.core.config)])
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def identity(self) -> str:
        """SHA-256 over weights and template: the same in every precision."""
        joined = f"{self._identity.of(self.model)}/{self.template.fingerprint}"
        return hashlib.sha256(joined.encode()).hexdigest()

    def copy(self, name: str | None = None) -> LM:
        """An independent copy with its own weights.

        Raises:
            ModelError: They are spread over processes.
        """
        self._check_whole("copied")
        twin = copy.copy(self)
        twin.patches = list(self.patches)
        twin.model = copy.deepcopy(self.model)
        twin.template = copy.copy(self.template)
        twin._identity = self._identity.moved(self.model, twin.model)
        twin.name = name or self.name
        return twin

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer as ordinary safetensors, atomically.

        Of a model that wears an adapter only the adapter is written, which names its base.

        Raises:
            RunError: The model below the adapter lies nowhere, so that it would be lost; or its
                weights are packed.
            ModelError: They are spread over processes.
        """
        from delible.files import atomic_folder

        self._check_whole("saved")
        if self.wears_adapter:
            if self.origin is None:
                raise RunError(
                    "the model below the adapter is saved nowhere, and the adapter alone would be "
                    "put on another one.",
                    where=str(folder),
                    hint="Merge it first: finish 'merge_adapter', or lm.merge_adapter().",
                )
            for settings in self.model.peft_config.values():
                settings.base_model_name_or_path = self.origin.place
                settings.revision = self.origin.revision
        elif self.base_precision in ("int8", "int4"):
            raise RunError(
                f"weights that are packed in {self.base_precision} are not written as a model.",
                where=str(folder),
                hint="Load it with base_precision='float32', or keep only what stands on it.",
            )
        with atomic_folder(folder) as target:
            self.model.save_pretrained(target, safe_serialization=True)
            if self.pictures is not None:
                self.pictures.processor.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
            for name, content in self.companions.items():
                (target / name).write_bytes(content)

    # ---- answers

    @cached_property
    def budget(self) -> Budget:
        """How many tokens go through the model at once, measured when first asked for."""
        return measure_budget(self)

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        """Teacher-forced log-probabilities and argmax hits at the answers' tokens.

        Where questions have several answers each (perturbed, paraphrased), a question is
        computed once for all of them; otherwise rows of like length share a batch.
        """
        return self._fitting(requests, lambda mine: self._answered(mine, self._scored))

    def inspect(self, requests: Sequence[Inspection]) -> list[Array | NoAnswer]:
        """Distributions, hidden states or gradient norms; requests of one kind."""
        return self._fitting(requests, lambda mine: self._answered(mine, self._inspect))

    def _fitting(self, requests: Sequence[R], answer: Callable[[Sequence[R]], list[T]]) -> list[T]:
        """Answers by adapter, in batches that fit the memory."""
        return self.by_adapter(requests, lambda mine: until_it_fits(self, lambda: answer(mine)))

    def by_adapter(
        self, requests: Sequence[R], answer: Callable[[Sequence[R]], list[T]]
    ) -> list[T]:
        """Answers to requests, or prompts, each by the adapter that it names."""
        asked: Sequence[Any] = requests
        named = [getattr(one, "prompt", one).adapter for one in asked]
        if all(name is None for name in named):
            return answer(requests)
        found: dict[int, T] = {}
        for name in dict.fromkeys(named):
            if name is not None:
                check_name(self, name)
            places = [place for place, one in enumerate(named) if one == name]
            with wearing(self, name):
                answers = answer([requests[place] for place in places])
            found.update(zip(places, answers, strict=True))
        return [found[place] for place in range(len(requests))]

    def _answered(
        self,
        requests: Sequence[Any],
        answer: Callable[[Sequence[Any], Sequence[Encoded]], list[T]],
    ) -> list[T | NoAnswer]:
        """Answers, but for requests whose prompt and answer are longer than the context."""
        rows = [self.template.encode(request.prompt, request.answer) for request in requests]
        whole = [index for index, row in enumerate(rows) if not row.cut]
        results: list[T | NoAnswer] = [
            NoAnswer(f"prompt and answer are longer than {self.template.max_length} tokens")
        ] * len(requests)
        if whole:
            with self.evaluating(), self.computing():
                found = answer([requests[index] for index in whole], [rows[i] for i in whole])
            for index, one in zip(whole, found, strict=True):
                results[index] = one
        return results

    def _scored(
        self, requests: Sequence[Score], rows: Sequence[Encoded]
    ) -> list[TokenScores | NoAnswer]:
        return score(self, requests, rows, self._tell)

    def _inspect(
        self, requests: Sequence[Inspection], rows: Sequence[Encoded]
    ) -> list[Array | NoAnswer]:
        return [
            found if np.isfinite(found).all() else NoAnswer(NOT_FINITE)
            for found in inspect(self, requests, rows)
        ]

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers up to the end of the turn, a stop text or the length limit."""
        return self._fitting(prompts, lambda mine: self._generate(mine, decoding))

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        ids = [self.template.prompt_ids(prompt) for prompt in prompts]
        room = self.template.max_length - 1
        answers: list[str | NoAnswer] = [
            NoAnswer(f"the prompt is longer than {room} tokens")
        ] * len(prompts)
        order = sorted(
            (index for index, row in enumerate(ids) if len(row) <= room),
            key=lambda index: len(ids[index]),
            reverse=True,
        )
        lengths = [len(row) + decoding.max_new_tokens for row in ids]
        limits = (self.budget.cached_tokens, self.budget.rows)
        with self.evaluating(), self.computing():
            for indices in self.batches(order, lengths, *limits):
                rows = [ids[index] for index in indices]
                seeds = [f"{decoding.seed}/{self.template.render(prompts[i])}" for i in indices]
                texts = continue_rows(self, rows, decoding, seeds, self._tell)
                for index, text in zip(indices, texts, strict=True):
                    answers[index] = NoAnswer(NOT_FINITE) if text is None else text
        return answers

    # ---- inside

    def _tell(self, answers: int) -> None:
        if self.on_answers is not None:
            self.on_answers(answers)

    def _understood(self, find: Callable[[Any], T]) -> T:
        """What is found out about the model; of a vision-language model that is said with it."""
        try:
            return find(self.core)
        except ModelError as error:
            if not has_other_parts(self.core.config):
                raise
            raise ModelError(
                f"the language model inside this {kind_of(self.core.config)} cannot be worked on: "
                f"{error.problem}",
                where=error.where,
                hint="Use its language model alone, saved as a causal language model.",
            ) from error

    def _declared_ends(self) -> frozenset[int]:
        """Ends that the model's settings name, without those that it cannot say."""
        ends = declared_ends(getattr(self.core, "generation_config", None), self.core.config)
        return frozenset(token for token in ends if 0 <= token < self.vocabulary)


def language_model(system: System, who: str) -> LM:
    """The language model that a system is, for what works on weights.

    Args:
        who: What needs it, for the message.

    Raises:
        ModelError: It is none: a guarded system, a server.
    """
    if isinstance(system, LM):
        return system
    raise ModelError(
        f"it needs the weights of a model, and '{system.name}' gives none.",
        where=who,
        hint="Give the model itself: its folder, its hub name, or the base of the artefact.",
    )
