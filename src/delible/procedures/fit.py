"""FIT: each request of a long stream is filtered, its loss chosen, and few layers are changed.

    filter      a chunk that is like an earlier one, max cos(e, E) >= tau, and without which the
                request's loss changes by no more than a share epsilon, is left out
    attribute   score_l = |L(without block l) - L|; the K blocks with the highest move
    weigh       IMP = || d L / d embeddings ||_2; low: random labels, middle: NPO, high: NPO and KL
    update      attention and MLP matrices of those blocks

E are the vectors of all chunks forgotten so far; they, the cut-offs and the model before the first
request are left for the next request. Where everything was filtered nothing is trained.

Paper: FIT (arXiv 2601.21682). Reference code: XiaoyuXU1/FIT. Deviations: chunks are of whole words
and about 64 tokens (8 characters there, which mean nothing); a question is one chunk. epsilon is a
share of the loss, which grows over many requests; a chunk without which nothing is left is judged
by likeness alone. A block is skipped by a hook instead of being set to 0. The cut-offs are
quantiles of IMP on records to be kept (6 and 12 there, of one model); IMP is the mean over a
request's records. KL is that from the reference (there: the cross-entropy the other way, which
sharpens). AdamW's second moments decay by 0.999, the cosine ends at 0; blocks of text are batches
of records. At most half of the blocks move. Optimiser state begins anew with each request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from delible.errors import DataError, RunError
from delible.lm.encoder import Encoder, sentence_encoder
from delible.lm.lm import LM
from delible.made import Made
from delible.method import Outcome
from delible.records import Passage, Record
from delible.registry import register
from delible.stages.procedure import Procedure
from delible.stages.work import Stage, Work
from delible.system.base import identity_of
from delible.system.questions import answer_of, ask
from delible.systems.opening import described, open_lm, opens_again
from delible.train.attribution import embedding_gradient, mean_loss, skipping_scores
from delible.train.needs import check_needs
from delible.train.recipe import Recipe
from delible.world import general

Tier = Literal["low", "middle", "high"]
#: In the names of tensors that are left: the start model's, where nothing opens it again.
START = "start/"
#: Records at most whose importance says where the cut-offs are.
CALIBRATING = 24
_WORDS = re.compile(r"\s*\S+")


def pieces(text: str, size: int, length: Callable[[str], int]) -> list[str]:
    """A text cut between words into pieces of about so many tokens; joined they are the text.

    Args:
        length: Tokens of a text.
    """
    found, count = [""], 0
    for word in _WORDS.findall(text):
        tokens = length(word)
        if found[-1] and count + tokens > size:
            found.append("")
            count = 0
        found[-1] += word
        count += tokens
    return found


def most_alike(
    vectors: npt.NDArray[np.float32], earlier: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The highest cosine of each unit vector [chunk, width] with earlier ones; -1 without any."""
    if not len(earlier):
        return np.full(len(vectors), -1.0, np.float32)
    return (vectors @ earlier.T).max(axis=1)


def redundant(
    alike: float, with_it: float, without: float | None, tau: float, epsilon: float
) -> bool:
    """Whether a chunk is left out: like an earlier one, and its absence changes the loss little.

    Args:
        with_it, without: Mean loss of the whole request with and without it; None: nothing is
            left without it.
    """
    if alike < tau:
        return False
    return without is None or abs(with_it - without) <= epsilon * abs(with_it)


def tier(importance: float, low: float, high: float) -> Tier:
    """Below the first cut-off low, from the second on high."""
    return "low" if importance < low else "middle" if importance < high else "high"


@register(
    kind="procedure",
    name="fit",
    title="FIT",
    summary="Filters each request, chooses its loss by importance, and changes a few layers.",
    paper="2601.21682",
    year=2026,
    family="continual",
    intention="removal",
    mechanism="PO-out",
    needs=("forget", "retain", "reference", "encoder", "weights"),
    changes="Attention and MLP weights of a few layers.",
    reversible=False,
    retrain_goal=True,
    weakest="relearning; vectors of what was forgotten stay with the artefact",
    advice="made for many requests, it moves little for one: --least-steps 90 or a higher "
    "--learning-rate forgets more of a short request, and keeps less",
    badges=("variant",),
    variant="Chunks of words, a relative epsilon and cut-offs by quantiles; proper KL.",
)
class Fit(Procedure):
    """Options of FIT."""

    stages: ClassVar[Mapping[str, str]] = {
        "filter": "which chunks say something that was not forgotten before",
        "attribute": "which layers matter most for the request",
        "weigh": "how strongly the model holds it, and so which loss",
        "update": "training of those layers by that loss",
    }
    trains_the_model: ClassVar[bool] = True

    layers: int = Field(8, ge=1, description="Layers that move, at most half of the model's.")
    tau: float = Field(0.9, ge=-1, le=1, description="Cosine from which a chunk is like another.")
    epsilon: float = Field(
        0.2, ge=0, description="A chunk like an earlier one stays if the loss changes by a larger "
        "share without it.",
    )  # fmt: skip
    chunk_tokens: int = Field(64, ge=1, description="Tokens of a chunk of running text.")
    attribution_tokens: int = Field(128, ge=1, description="Tokens that layers are judged by.")
    cutoffs: tuple[float, float] | None = Field(
        None, description="Importance below which it is low, and from which it is high; none: "
        "quantiles.",
    )  # fmt: skip
    quantiles: tuple[float, float] = Field(
        (0.33, 0.66), description="Of the importance of records to be kept: where the cut-offs are."
    )
    low: dict[str, Any] = Field(
        {"objective": "random_label"}, description="Slots where the importance is low."
    )
    middle: dict[str, Any] = Field(
        {"objective": {"name": "npo", "beta": 0.1}}, description="Slots where it is in between."
    )
    high: dict[str, Any] = Field(
        {"objective": {"name": "npo", "beta": 0.1}, "keep": "kl"},
        description="Slots where it is high.",
    )
    learning_rate: float = Field(3e-5, gt=0, le=1, description="Peak learning rate of AdamW.")
    epochs: int = Field(3, ge=1, description="Passes over what is left of a request.")
    least_steps: int | None = Field(
        None, ge=1, description="More passes, if these are fewer steps."
    )
    batch_size: int = Field(4, ge=1, description="Forget rows per optimiser step.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of AdamW.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the computation."
    )
    encoder_folder: str | None = Field(
        None, description="Folder of a sentence encoder; by default all-MiniLM-L6-v2."
    )

    @model_validator(mode="after")
    def _ascending(self) -> Fit:
        for pair in (self.cutoffs, self.quantiles):
            if pair is not None and pair[0] > pair[1]:
                raise ValueError("the first cut-off is not above the second one")
        if not 0 <= self.quantiles[0] <= self.quantiles[1] <= 1:
            raise ValueError("quantiles lie in 0…1")
        return self

    def recipe(self, which: Tier, layers: Sequence[int]) -> Recipe:
        """The recipe of an importance, on some layers.

        Raises:
            RecipeError: An unknown slot or component.
        """
        place = {"name": "layers", "layers": list(layers), "role": "matrices"}
        training = {
            "learning_rate": self.learning_rate, "epochs": self.epochs,
            "least_steps": self.least_steps, "batch_size": self.batch_size,
            "weight_decay": self.weight_decay, "schedule": "cosine", "warmup_share": 0.1,
            "precision": self.precision,
        }  # fmt: skip
        content = {"name": f"fit, {which}", "place": place, "training": training}
        return Recipe.from_mapping(content | getattr(self, which), f"procedure 'fit': {which}")

    # ---- the stages

    def run(self, work: Work) -> Outcome:
        lm, encoder = work.lm, sentence_encoder(self.encoder_folder)
        start = self._begun_from(work)
        told = {"encoder": encoder.identity}
        if work.earlier is not None and work.earlier["encoder"] != encoder.identity:
            raise RunError(
                "the earlier requests were compared by another sentence encoder.",
                where=lm.name,
                hint="Give the same --encoder-folder.",
            )
        filtered = work.stage(
            "filter", lambda stage: self._filter(stage, work, encoder), inputs=told
        )
        kept = self._kept(work, filtered)
        notes: dict[str, Any] = {
            "chunks": sum(len(one) for one in filtered["kept"]),
            "chunks_kept": len(filtered.tensors["vectors"]),
        }
        if not kept:
            notes["skipped"] = (
                "everything in it is like what was forgotten before: nothing is trained."
            )
            return Outcome(lm, "model", lm, notes, remembers=self._left(work, start, filtered))
        ranked = work.stage(
            "attribute", lambda stage: Made({"scores": skipping_scores(
                lm, kept, self.attribution_tokens)}),
        )  # fmt: skip
        chosen = self._chosen(ranked["scores"])
        weighed = work.stage("weigh", lambda stage: self._weigh(work, kept))
        which = tier(weighed["importance"], *weighed["cutoffs"])
        recipe = self.recipe(which, chosen)
        rows = {"forget": kept, "retain": (*work.request.retain, *work.request.neighbours)}
        check_needs(recipe, rows, None)
        before = {} if start is not None else _values(lm, chosen)
        work.train("update", recipe, records=rows, reference=self._start(work))
        notes |= {
            "layers": chosen, "importance": weighed["importance"], "tier": which,
            "cutoffs": weighed["cutoffs"],
        }  # fmt: skip
        left = self._left(work, start, filtered, weighed["cutoffs"], before)
        return Outcome(work.lm, "model", work.lm, notes, remembers=left)

    def _filter(self, stage: Stage, work: Work, encoder: Encoder) -> Made:
        lm, records = work.lm, work.request.forget
        if not records:
            raise DataError("there is nothing to filter: no forget records.")
        chunks = [self._chunks(lm, one) for one in records]
        flat = [text for texts in chunks for text in texts]
        vectors = np.asarray(encoder.encode(flat), dtype=np.float32)
        earlier = np.zeros((0, vectors.shape[1]), np.float32)
        if work.earlier is not None:
            earlier = work.earlier.tensors["vectors"].numpy()
        alike = most_alike(vectors, earlier)
        sums, counts = mean_loss(lm, records)
        whole = sum(sums) / max(1, sum(counts))
        judged: dict[str, bool] = {}
        for place, text in enumerate(flat):
            stage.progress(place, len(flat))
            if text not in judged and alike[place] >= self.tau:
                without = self._without(lm, records, chunks, text)
                judged[text] = redundant(
                    float(alike[place]), whole, without, self.tau, self.epsilon
                )
        kept = [[not judged.get(text, False) for text in texts] for texts in chunks]
        mask = np.array([one for ones in kept for one in ones])
        return Made(
            {"kept": kept, "alike": [round(float(one), 6) for one in alike], "loss": whole},
            {"vectors": torch.from_numpy(vectors[mask])},
        )

    def _chunks(self, lm: LM, record: Record) -> list[str]:
        if not isinstance(record, Passage):
            prompt = ask(record)
            turns = [] if prompt is None else [turn.text for turn in prompt.messages]
            return [" ".join([*turns, answer_of(record)])]
        return pieces(
            record.text, self.chunk_tokens,
            lambda text: len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]),
        )  # fmt: skip

    def _without(
        self, lm: LM, records: Sequence[Record], chunks: Sequence[Sequence[str]], text: str
    ) -> float | None:
        """The request's mean loss without all chunks of a text; None: nothing is left."""
        kept = [[one != text for one in texts] for texts in chunks]
        sums, counts = mean_loss(lm, _left_of(records, chunks, kept))
        return sum(sums) / sum(counts) if sum(counts) else None

    def _kept(self, work: Work, filtered: Made) -> list[Record]:
        chunks = [self._chunks(work.lm, one) for one in work.request.forget]
        return _left_of(work.request.forget, chunks, filtered["kept"])

    def _chosen(self, scores: Sequence[float]) -> list[int]:
        """The layers with the highest scores, ascending; at most half of them."""
        count = min(self.layers, max(1, len(scores) // 2))
        best = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))[:count]
        return sorted(best)

    def _weigh(self, work: Work, kept: Sequence[Record]) -> Made:
        lm = work.lm
        found = float(np.mean([embedding_gradient(lm, one) for one in kept]))
        cutoffs = self.cutoffs
        if cutoffs is None and work.earlier is not None:
            cutoffs = work.earlier["cutoffs"]
        if cutoffs is None:
            known = [*work.request.retain, *work.request.neighbours] or list(general())
            chosen = known[:: max(1, len(known) // CALIBRATING)][:CALIBRATING]
            values = [embedding_gradient(lm, one) for one in chosen if ask(one) is not None]
            low, high = np.quantile(values, self.quantiles)
            cutoffs = (float(low), float(high))
        return Made({"importance": found, "cutoffs": list(cutoffs)})

    # ---- what is left for the next request

    def _begun_from(self, work: Work) -> dict[str, Any] | None:
        """What opens the model before the first request; None: nothing, it is only in memory."""
        if work.earlier is not None:
            found: dict[str, Any] | None = work.earlier["start"]
            return found
        if not opens_again(work.system):
            return None
        return {"name": described(work.system).name, "identity": work.start}

    def _start(self, work: Work) -> LM | None:
        """The model before the first request; None: it is this one.

        Raises:
            RunError: It is another one now.
        """
        if work.earlier is None:
            return None
        start = work.earlier["start"]
        if start is None:
            lm = work.lm.copy()
            with torch.no_grad():
                for name, value in work.earlier.tensors.items():
                    if name.startswith(START):
                        lm.core.get_parameter(name.removeprefix(START)).copy_(value)
            lm.touch()
            return lm
        lm = open_lm(start["name"])
        if identity_of(lm) != start["identity"]:
            raise RunError(
                "the model before the first request is another one now.",
                where=start["name"],
                hint="Put it back: the later requests are measured against it.",
            )
        return lm

    def _left(
        self, work: Work, start: dict[str, Any] | None, filtered: Made,
        cutoffs: Sequence[float] | None = None, before: Mapping[str, Tensor] | None = None,
    ) -> Made:  # fmt: skip
        vectors = filtered.tensors["vectors"]
        old: Mapping[str, Tensor] = {}
        if work.earlier is not None:
            old = work.earlier.tensors
            vectors = torch.cat([old["vectors"], vectors])
            cutoffs = cutoffs or work.earlier["cutoffs"]
        kept = {name: one for name, one in old.items() if name.startswith(START)}
        moved = {f"{START}{name}": value for name, value in (before or {}).items()}
        data = {
            "encoder": sentence_encoder(self.encoder_folder).identity, "cutoffs": cutoffs,
            "start": start,
            "requests": 1 + (0 if work.earlier is None else work.earlier["requests"]),
        }  # fmt: skip
        return Made(data, {**moved, **kept, "vectors": vectors})


def _left_of(
    records: Sequence[Record], chunks: Sequence[Sequence[str]], kept: Sequence[Sequence[bool]]
) -> list[Record]:
    """Records of the chunks that are kept: passages are joined anew, others are whole or gone."""
    found: list[Record] = []
    for record, texts, mask in zip(records, chunks, kept, strict=True):
        if all(mask):
            found.append(record)
        elif any(mask) and isinstance(record, Passage):
            text = "".join(text for text, one in zip(texts, mask, strict=True) if one).strip()
            found.append(record.model_copy(update={"text": text}))
    return found


def _values(lm: LM, layers: Sequence[int]) -> dict[str, Tensor]:
    """Copies of what may move in some layers."""
    names = [
        name
        for layer in layers
        for role in ("attention", "mlp")
        for name in lm.anatomy.parameter_names(layer, role)  # type: ignore[arg-type]
    ]
    return {name: lm.core.get_parameter(name).detach().clone() for name in names}


__all__ = [
    "Fit", "most_alike", "pieces", "redundant", "tier",
]  # fmt: skip
