"""ALTER: one shared A, one B of what is kept and a B for each domain that is forgotten.

Stage `domains` sorts the forget records and starts the gates; `structure` teaches A on tokens that
are hard to predict (and B_r on retain answers); `experts` unlearns domain by domain:

    forget   beta IHL on a domain's answer tokens that are easy to predict     moves its B_d, W_g
    keep     gamma CE on retain answers                                        moves B_r
    shape    CE on tokens that are hard to predict + lambda |A - A_start|^2    moves A

IHL = 1 + p(y) - max of the others' p. How tokens are routed: ``routed/tokens.py``.

Paper: arXiv 2603.01792 (AAAI 2026). The authors' repository holds no code, so this is no
reproduction: what follows is our completion of public descriptions. The structural term is the
distance to A as stage `structure` left it; W_g [h ; S] is one gate per block, whose rows start as
the domains' mean states; an entropy labels the token that it predicted; B start at 0; B_r is
learned beside A from the first step on; A's tokens are those of whole texts, since memorised
answers hold hardly any that are hard to predict.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from delible.errors import ModelError, RecipeError
from delible.lm.lm import LM, language_model
from delible.lm.states import Span, read_states
from delible.lm.template import Encoded
from delible.made import Made
from delible.method import Outcome
from delible.ranges import Range, scales
from delible.records import ForgetRequest, RecordBase
from delible.registry import register
from delible.routed.system import routed
from delible.routed.tokens import Routing, TokenRouter, largest
from delible.stages.experts import ExpertTraining
from delible.stages.procedure import Procedure
from delible.stages.work import Stage, Work
from delible.system.base import System
from delible.system.questions import answer_of, ask, has_answer

logger = logging.getLogger(__name__)

Points = npt.NDArray[np.float64]


def k_means(
    points: Float[Points, "text hidden"], count: int, generator: torch.Generator, rounds: int = 50
) -> npt.NDArray[np.int64]:
    """The cluster of each point: Lloyd's rounds from far points (k-means++), nearest mean wins."""
    points = np.asarray(points, dtype=np.float64)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < count:
        away = ((points[:, None] - points[chosen][None]) ** 2).sum(2).min(1)
        draw = float(torch.rand((), generator=generator, dtype=torch.float64)) * away.sum()
        chosen.append(int(np.searchsorted(away.cumsum(), draw).clip(0, len(points) - 1)))
    middles = points[chosen]
    found = np.full(len(points), -1)
    for _ in range(rounds):
        now = ((points[:, None] - middles[None]) ** 2).sum(2).argmin(1)
        if (now == found).all():
            break
        found = now
        for place in range(count):
            if (found == place).any():
                middles[place] = points[found == place].mean(0)
    return found


@register(
    kind="procedure",
    name="alter",
    title="ALTER (experts chosen by token entropy)",
    summary="A shared A and a B for each domain; how sure the model is of a token routes it.",
    paper="2603.01792",
    year=2026,
    family="adapters and gates",
    intention="suppression",
    mechanism="adapter",
    needs=("forget", "retain", "weights"),
    changes="Nothing in the weights: experts beside them, chosen token by token.",
    reversible=True,
    retrain_goal=False,
    weakest="relearning; the experts' removal",
    advice="more --epochs or a higher --learning-rate forgets more; --domains says how many groups "
    "there are where records name no subject",
    badges=("parity", "variant", "experimental"),
    variant="There is no code of the authors: gates, structural term and entropies are completed "
    "from public descriptions.",
)
class Alter(Procedure):
    """Options of ALTER."""

    stages: ClassVar = {
        "domains": "domains of the forget records, and their gates",
        "structure": "A on tokens that are hard to predict",
        "experts": "an expert for each domain",
    }

    domains: int | None = Field(
        None, ge=1, description="Groups of forget records, found by their states; none: the "
        "records' own groups or subjects.",
    )  # fmt: skip
    rank: int = Field(8, ge=1, description="Inner width of the products.")
    alpha: float = Field(16.0, gt=0, description="They are scaled by alpha / rank.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Of all B and of the gates.")
    shared_learning_rate: float = Field(1e-5, gt=0, le=1, description="Of A.")
    forget_weight: float = Field(1.0, ge=0, description="beta, of the inverted hinge.")
    retain_weight: float = Field(1.0, ge=0, description="gamma, of what is kept.")
    structure_weight: float = Field(0.01, ge=0, description="lambda, of A's distance to its start.")
    batch_size: int = Field(4, ge=1, description="Records per pass.")
    structure_epochs: int = Field(1, ge=0, description="Passes of the first training stage.")
    epochs: int = Field(3, ge=1, description="Passes of the second, over the forget records.")
    threshold: float = Field(
        1.2, gt=0, description="Entropy above which a token is structure, not fact."
    )
    structure_order: float = Field(0.9, gt=0, description="q of the entropy that A goes by.")
    order: float = Field(1.1, gt=0, description="q of the entropy of facts and of the routing.")
    hot: float = Field(0.8, gt=0, description="Temperature of the gate at structure.")
    cold: float = Field(0.01, gt=0, description="And at facts: one expert wins.")
    top: int = Field(3, ge=1, description="Forget experts that act on structure, at most.")
    gate_input: str = Field(
        "hidden_entropy", pattern="^(entropy|hidden_entropy)$",
        description="What a gate sees: entropy (as written in the paper, which tells no domains "
        "apart), or hidden_entropy.",
    )  # fmt: skip
    by_entropy: bool = Field(
        True, description="Forget only tokens that are easy to predict; false: all answer tokens."
    )

    @model_validator(mode="after")
    def _reachable(self) -> Alter:
        for order in (self.structure_order, self.order):
            if order > 1 and self.threshold >= 1 / (order - 1):
                raise ValueError(
                    f"no entropy of order {order:g} is above {1 / (order - 1):g}: a threshold of "
                    f"{self.threshold:g} is never reached"
                )
        return self

    def check(self, system: System, request: ForgetRequest) -> None:
        lm = language_model(system, "procedure 'alter'")
        if lm.interveners is not None:
            raise ModelError(
                "a router or interventions are on the model already.",
                where="procedure 'alter'",
                hint="Give it all domains in one request, on the model without them.",
            )
        if self.domains is not None and self.domains > len(request.forget):
            raise RecipeError(
                f"there are {len(request.forget)} forget records for {self.domains} domains.",
                where="procedure 'alter'",
            )
        for order in (self.structure_order, self.order):
            if self.threshold >= largest(order, lm.vocabulary):
                raise RecipeError(
                    f"no entropy of order {order:g} of this model's vocabulary reaches the "
                    f"threshold {self.threshold:g}.",
                    where="procedure 'alter'",
                    hint="Lower --threshold.",
                )

    def ranges(self) -> dict[str, Range]:
        searched = ("learning_rate", "forget_weight", "retain_weight", "threshold")
        found = {name: one for name, one in scales(self).items() if name in searched}
        rate = self.learning_rate
        return {"learning_rate": Range(low=rate / 10, high=min(1.0, 10 * rate), log=True), **found}

    def run(self, work: Work) -> Outcome:
        lm, request = work.lm, work.request
        forget = encoded(lm, request.forget)
        retain = encoded(lm, (*request.retain, *request.neighbours))
        started = work.stage("domains", lambda stage: self._start(stage, lm, request, forget))
        names, owners = started["names"], started["owners"]
        training = ExpertTraining(self, lm, names, started.tensors, forget, retain, owners)
        with training.at_work():
            first = work.stage("structure", training.structure)
            last = work.stage("experts", lambda stage: training.experts(stage, first.tensors))
        router = TokenRouter(names, self.routing(), last.tensors, lm.identity)
        found = routed(lm, router)
        counts = {name: owners.count(place) for place, name in enumerate(names)}
        return Outcome(found, "router", found, {"domains": counts, **dict(last.data)})

    def routing(self, order: float | None = None) -> Routing:
        """How tokens are routed."""
        return Routing(
            order=self.order if order is None else order, threshold=self.threshold, hot=self.hot,
            cold=self.cold, top=self.top, hidden=self.gate_input != "entropy",
            scale=self.alpha / self.rank,
        )  # fmt: skip

    def _start(self, stage: Stage, lm: LM, request: ForgetRequest, rows: Sequence[Encoded]) -> Made:
        """Domains, gates from their mean states, A at random and all B at 0."""
        spans = [Span(row, 0, len(row.ids)) for row in rows]
        means: list[Any] = [None] * len(rows)
        for place, states in read_states(lm, spans):
            means[place] = states["block"].double().mean(dim=1)
        every = torch.stack(means)  # [row, layer, hidden]
        names, owners = domains_of(request.forget)
        if self.domains is not None or not names:
            count = self.domains or min(4, len(rows))
            middle = every[:, (lm.anatomy.layers - 1) // 2].numpy()
            owners = k_means(middle, count, stage.generator("k_means")).tolist()
            names = [f"domain-{place + 1}" for place in range(count)]
        tensors = dict[str, Tensor]()
        draws = stage.generator("A")
        for layer in range(lm.anatomy.layers):
            before = every[:, max(0, layer - 1)]  # what block `layer` receives; of the first: gives
            middle_ = before.mean(dim=0)
            owned = torch.tensor(owners)
            rows_of = [
                normalize(before[owned == place].mean(dim=0) - middle_, dim=0)
                if bool((owned == place).any()) else torch.zeros_like(middle_)
                for place in range(len(names))
            ]  # fmt: skip
            gate = torch.stack(rows_of).float()
            block = lm.anatomy.block_path(layer)
            tensors[f"{block}.gate"] = torch.cat([gate, gate.new_zeros(len(names), 1)], dim=1)
            tensors[f"{block}.mean"] = middle_.float()
        for path, (inner, outer) in matrices(lm).items():
            drawn = torch.rand(self.rank, inner, generator=draws)
            tensors[f"{path}.A"] = (2 * drawn - 1) * inner**-0.5
            tensors[f"{path}.kept"] = torch.zeros(outer, self.rank)
            tensors[f"{path}.forget"] = torch.zeros(len(names), outer, self.rank)
        return Made({"names": names, "owners": owners}, tensors)


def domains_of(records: Sequence[RecordBase]) -> tuple[list[str], list[int]]:
    """Names of the records' own groups (or subjects) and which each record is of; none: no names.

    Records of which not all have one have none.
    """
    for field in ("group", "subject"):
        found = [getattr(one, field, None) for one in records]
        if all(found):
            names = list(dict.fromkeys(str(one) for one in found))
            return names, [names.index(str(one)) for one in found]
    return [], []


def encoded(lm: LM, records: Sequence[RecordBase]) -> list[Encoded]:
    """Records as texts; those that are too long are cut."""
    rows = []
    for record in records:
        if (prompt := ask(record)) is not None:
            rows.append(lm.template.encode(prompt, answer_of(record) if has_answer(record) else ""))
    return rows


def matrices(lm: LM) -> dict[str, tuple[int, int]]:
    """Width of what every linear layer of the blocks reads and gives, by its path."""
    found = {}
    for path, module in lm.core.named_modules():
        if not path.startswith(f"{lm.anatomy.blocks}."):
            continue
        if isinstance(module, torch.nn.Linear):
            found[path] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":  # transposed
            found[path] = (int(module.weight.shape[0]), int(module.weight.shape[1]))  # type: ignore[union-attr, operator]
    if not found:
        raise ModelError("its blocks have no linear layers.", where=type(lm.core).__name__)
    return found
