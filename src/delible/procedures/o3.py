"""O3: one request after the other, each an adapter that is loaded for questions like its own.

Stage `adapter` trains a low-rank adapter on the request's forget records alone, orthogonal to those
of all earlier requests; stage `detector` learns from the same records what questions about them
look like. Of each prompt the detectors say, once, how much of which adapter it gets (0: the answer
is the model's own, bit by bit). The records may be deleted then.

Paper: arXiv 2407.10223 (ICLR 2025). Reference code: github.com/GCYZSL/O3-LLM-UNLEARNING. The parts:
place `orthogonal_lora`, ``routed/glocal.py`` (scores and weights), ``routed/tuning.py`` (how an
encoder is tuned), ``routed/requests.py`` (adapters side by side). Deviations:

- Each request has an adapter of its own, opened by its own detector, so that a request can be taken
  back alone and exactly. ``adapters="cumulative"`` is as published: one adapter, trained on from
  request to request, loaded with the largest weight that any detector gives.
- The encoder is used as it is unless ``encoder_epochs`` says otherwise; ``detector.py`` says what
  else differs. Of a conversation every turn is judged, too.
- The released step functions of the weight were tuned on the test tasks; here a floor closes the
  gate and nothing else changes the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch.nn.functional import normalize

from delible.errors import DataError, ModelError
from delible.lm.lm import LM, language_model
from delible.made import Made
from delible.method import Outcome
from delible.ranges import Range, scales
from delible.records import ForgetRequest, Passage, RecordBase
from delible.registry import register
from delible.routed.detector import Detector, DetectorOptions
from delible.routed.features import EncoderFeatures, Features, StateFeatures
from delible.routed.low_rank import LowRank, worn
from delible.routed.requests import Loads, Member, RequestRouter
from delible.routed.system import Routed, routed
from delible.stages.procedure import Procedure
from delible.stages.work import Stage, Work
from delible.system.base import System
from delible.system.questions import ask
from delible.systems.opening import described
from delible.train.recipe import Recipe

logger = logging.getLogger(__name__)


#: The learning rate where none is given, and the hidden size that it is for.
RATE, WIDTH = 5e-4, 576


@register(
    kind="procedure",
    name="o3",
    title="O3 (orthogonal adapters behind detectors)",
    summary="An adapter and a detector for each request; only questions like its own load it.",
    paper="2407.10223",
    year=2025,
    family="adapters and gates",
    intention="suppression",
    mechanism="adapter",
    needs=("forget", "refusals", "encoder", "weights"),
    changes="Nothing in the weights: adapters beside them, for questions that a detector knows.",
    reversible=True,
    retrain_goal=False,
    weakest="questions in other words or turns, which the detector may not know; the adapter's "
    "removal",
    advice="a smaller --floor opens the gate for more wordings; records with paraphrases show the "
    "detector more of them",
    badges=("parity", "variant"),
    variant="Own adapters per request (exact undo) unless adapters='cumulative'; the encoder is "
    "used as it is by default; masked means, shrunk covariances, consistent signs.",
)
class O3(DetectorOptions, Procedure):
    """Options of O3: of the adapter, of its training, and of the detector."""

    stages: ClassVar = {
        "adapter": "training of the request's adapter",
        "detector": "what questions about the request look like",
    }

    objective: str = Field(
        "idk", description="What is taught: refusals, or any objective that needs no retain rows."
    )
    adapters: Loads = Field(
        "own", description="own: each request has its own adapter, opened by its own detector; "
        "cumulative: as published, one adapter that any of the detectors opens.",
    )  # fmt: skip
    rank: int = Field(8, ge=1, description="Inner width of the adapter's products.")
    alpha: float = Field(16.0, gt=0, description="They are scaled by alpha / rank.")
    orthogonality: float = Field(0.1, ge=0, description="Weight of the penalty on shared inputs.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Of the adapter (paper: 3e-4); none: 5e-4 at the default "
        "model's width, and more where a model is narrower.",
    )  # fmt: skip
    epochs: int = Field(15, ge=1, description="Passes over the forget records.")
    least_steps: int | None = Field(40, ge=1, description="More passes, if these are fewer steps.")
    batch_size: int = Field(16, ge=1, description="Records per step (paper: 128).")
    max_steps: int | None = Field(None, ge=1, description="Steps of training, at most.")

    def check(self, system: System, request: ForgetRequest) -> None:
        lm = language_model(system, "procedure 'o3'")
        if not isinstance(lm, Routed) and lm.interveners is not None:
            raise ModelError(
                "interventions are on the model, and a router cannot stand on them.",
                where="procedure 'o3'",
                hint="Take them off first ('delible undo'), or give the model without them.",
            )
        if isinstance(lm, Routed):
            router = lm.router
            if not isinstance(router, RequestRouter) or router.loads != self.adapters:
                raise ModelError(
                    "the model has a router of another kind, which this one cannot continue.",
                    where="procedure 'o3'",
                    hint="Give the same options as for the requests before "
                    "(adapters='own' or 'cumulative'), or the model without the router.",
                )
        if len(set(texts_of(request.forget))) < 2:
            raise DataError(
                "a detector needs at least two different questions of a request.",
                where="procedure 'o3'",
                hint="Add questions about it, or other wordings of them (paraphrases).",
            )

    def ranges(self) -> dict[str, Range]:
        searched = ("epochs", "orthogonality", "zeta", "floor")
        found = {name: one for name, one in scales(self).items() if name in searched}
        return {"learning_rate": Range(low=5e-5, high=5e-3, log=True), **found}

    def run(self, work: Work) -> Outcome:
        given = work.lm
        bare = given.bare if isinstance(given, Routed) else given
        router = RequestRouter((), self.adapters, bare.identity)
        if isinstance(given, Routed):
            router = cast(RequestRouter, given.router)
        known: dict[str, list[str]] = {}
        if work.earlier is not None:
            known = {
                name: one for name, one in work.earlier["covered"].items() if name in router.members
            }
        on = described(bare) if isinstance(given, Routed) else None
        request, new = work.request, [one.digest for one in work.request.forget]
        if request.id in router.members or set(new) <= {
            one for done in known.values() for one in done
        }:
            logger.warning("o3: the earlier requests cover this one already; nothing is trained.")
            notes = {"covered": True, "requests": list(router.members)}
            return Outcome(given, "router", given, notes, remembers=Made({"covered": known}), on=on)
        adapter = self._adapter(work, bare, [one.adapter for one in router.parts])
        detector = self._detector(work, bare)
        notes = _compared(adapter, router.parts)
        found = routed(bare, router.extended(Member(request.id, adapter, detector)))
        notes |= {"covered": False, "requests": list(found.router.members)}
        return Outcome(
            found, "router", found, notes, on=on,
            remembers=Made({"covered": {**known, request.id: new}}),
        )  # fmt: skip

    # ---- stages

    def recipe(self) -> Recipe:
        """What the adapter is trained by."""
        own = {"rank": self.rank, "alpha": self.alpha, "orthogonality": self.orthogonality}
        start = "fresh" if self.adapters == "own" else "last"
        return Recipe.from_mapping({
            "name": "o3",
            "objective": self.objective,
            "place": {"name": "orthogonal_lora", **own, "start": start},
            "training": {
                "learning_rate": self.learning_rate or RATE,
                "learning_rate_width": WIDTH if self.learning_rate is None else None,
                "epochs": self.epochs, "least_steps": self.least_steps,
                "batch_size": self.batch_size, "max_steps": self.max_steps,
            },
        })  # fmt: skip

    def _adapter(self, work: Work, bare: LM, earlier: Sequence[LowRank]) -> LowRank:
        origin, patches, precision = bare.origin, bare.patches, bare.precision
        bare.earlier_adapters = tuple(earlier)
        try:
            work.train(
                "adapter", self.recipe(), lm=bare, records={"forget": work.request.forget},
                inputs={"earlier": [one.identity for one in earlier]},
            )  # fmt: skip
            found = worn(bare)
        finally:
            bare.earlier_adapters = ()
            if bare.wears_adapter:
                bare.wear(bare.model.unload())
            bare.origin, bare.patches, bare.precision = origin, patches, precision
        return found

    def _detector(self, work: Work, bare: LM) -> Detector:
        own = {name: getattr(self, name) for name in DetectorOptions.model_fields}
        options = DetectorOptions.build("procedure 'o3'", **own)

        def fitted(stage: Stage) -> Made:
            source: Features = (
                EncoderFeatures.of(options.encoder_folder)
                if options.backbone == "encoder"
                else StateFeatures(bare)
            )
            texts = texts_of(work.request.forget)
            found = Detector.fit(texts, source, options, stage.generator("detector"))
            return Made({"features_of": found.features_of}, found.tensors)

        made = work.stage("detector", fitted)
        return Detector(options, made.tensors, made["features_of"])


def texts_of(records: Sequence[RecordBase]) -> list[str]:
    """What is asked by records, in all their wordings; of a passage its text."""
    found: list[str] = []
    for record in records:
        if isinstance(record, Passage):
            found.append(record.text)
        elif (prompt := ask(record)) is not None:
            turns = [turn.text for turn in prompt.messages if turn.role == "user"]
            found += [*turns[-1:], *getattr(record, "paraphrases", ())]
    return [text for text in found if text.strip()]


def _compared(adapter: LowRank, parts: Sequence[Member]) -> dict[str, Any]:
    """How much the new adapter reads what earlier ones read: mean |cos| between rows of A."""
    if not parts:
        return {}
    found = {}
    for one in parts:
        values = [
            (normalize(pair[0], dim=1) @ normalize(other[0], dim=1).T).abs().mean()
            for path, pair in adapter.pairs.items()
            if (other := one.adapter.pairs.get(path)) is not None
        ]
        found[one.request] = round(float(torch.stack(values).mean()), 4) if values else None
    return {"shared_inputs": found}
