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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from delible.errors import ModelError, RecipeError
from delible.lm.forward import Forward, collate, map_logits
from delible.lm.lm import LM, language_model
from delible.lm.states import Span, read_states
from delible.lm.template import Encoded
from delible.made import Made
from delible.method import Outcome
from delible.ranges import Range, scales
from delible.records import ForgetRequest, RecordBase
from delible.registry import register
from delible.routed.system import Routed, routed
from delible.routed.tokens import ByToken, Routing, TokenRouter, largest
from delible.stages.procedure import Procedure
from delible.stages.work import Stage, Work
from delible.system.base import System
from delible.system.questions import answer_of, ask, has_answer
from delible.train.hinge import inverted_hinge
from delible.train.randomness import shuffled

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
        training = _Training(self, lm, names, started.tensors, forget, retain, owners)
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


class _Training:
    """The two training stages, each of three losses that move each their own tensors."""

    def __init__(
        self, options: Alter, lm: LM, names: Sequence[str], tensors: Mapping[str, Tensor],
        forget: Sequence[Encoded], retain: Sequence[Encoded], owners: Sequence[int],
    ) -> None:  # fmt: skip
        self.options, self.lm, self.names, self.start = options, lm, names, dict(tensors)
        self.retain = list(retain)
        self.domains = [
            [row for row, owner in zip(forget, owners, strict=True) if owner == place]
            for place in range(len(names))
        ]
        self.forget = list(forget)

    def at_work(self) -> Any:
        """Within it the weights below are still."""
        return _still(self.lm)

    def model(self, tensors: Mapping[str, Tensor], order: float) -> tuple[Routed, ByToken]:
        """The model with experts that can move."""
        options = self.options
        split = {name: one for name, one in tensors.items() if not name.endswith(".forget")}
        whole = TokenRouter(self.names, options.routing(order), {**split, **{
            name: one for name, one in tensors.items() if name.endswith(".forget")
        }})  # fmt: skip
        found = Routed(self.lm, whole)
        acting = found.acting
        assert isinstance(acting, ByToken)
        acting.tensors = {
            name: one.clone().requires_grad_(not name.endswith(".mean"))
            for name, one in acting.tensors.items()
        }
        acting.remembered = {}
        return found, acting

    # ---- stages

    def structure(self, stage: Stage) -> Made:
        """A on tokens that are hard to predict, B_r on retain answers."""
        options = self.options
        lm, acting = self.model(self.start, options.structure_order)
        moves = _Moves(acting, options)
        rows = [*self.forget, *self.retain]
        total = options.structure_epochs * -(-len(rows) // options.batch_size)
        for step, batch in enumerate(self._batches(stage, rows, options.structure_epochs)):
            kept = self._part(stage, self.retain, step)
            if kept:
                moves.step("kept", self.keep_loss(lm, acting, kept))
            moves.step("shared", self.shape_loss(lm, acting, batch, None))
            self._told(stage, step, total, batch)
        return Made({}, acting.tensors)

    def experts(self, stage: Stage, tensors: Mapping[str, Tensor]) -> Made:
        """Domain by domain in turn: forget, keep, shape."""
        options = self.options
        lm, acting = self.model(tensors, options.order)
        start = {name: one for name, one in tensors.items() if name.endswith(".A")}
        moves = _Moves(acting, options)
        sizes = [-(-len(rows) // options.batch_size) for rows in self.domains]
        total = options.epochs * sum(sizes)
        step, facts, tokens = 0, 0, 0
        for epoch in range(options.epochs):
            batches = [
                list(self._batches(stage, rows, 1, f"{epoch}/{place}"))
                for place, rows in enumerate(self.domains)
            ]
            turns = [
                (place, batch) for turn in range(max(sizes)) for place, mine in enumerate(batches)
                for batch in mine[turn : turn + 1]
            ]  # fmt: skip
            for place, batch in turns:
                value, easy, every = self.forget_loss(lm, acting, batch)
                facts, tokens = facts + easy, tokens + every
                if value is not None:
                    moves.step("forget", value, place)
                kept = self._part(stage, self.retain, step)
                if kept:
                    moves.step("kept", self.keep_loss(lm, acting, kept))
                moves.step("shared", self.shape_loss(lm, acting, [*batch, *kept], start))
                step += 1
                self._told(stage, step - 1, total, batch)
        told = {"facts_share": round(facts / max(tokens, 1), 4)}
        return Made(told, {name: one.detach() for name, one in acting.tensors.items()})

    # ---- losses

    def forget_loss(
        self, lm: Routed, acting: ByToken, rows: Sequence[Encoded]
    ) -> tuple[Tensor | None, int, int]:
        """beta times the mean hinge over answer tokens that are easy; how many, and of all."""
        values, entropy = self._tokens(lm, acting, rows, inverted_hinge)
        easy = entropy <= self.options.threshold
        if not self.options.by_entropy:
            easy = torch.ones_like(easy)
        if not bool(easy.any()):
            return None, 0, len(easy)
        loss = self.options.forget_weight * values[easy].mean()
        return loss, int(easy.sum()), len(easy)

    def keep_loss(self, lm: Routed, acting: ByToken, rows: Sequence[Encoded]) -> Tensor:
        """gamma times the mean CE over answer tokens."""
        values, _ = self._tokens(lm, acting, rows, _nll)
        return self.options.retain_weight * values.mean()

    def shape_loss(
        self, lm: Routed, acting: ByToken, rows: Sequence[Encoded],
        start: Mapping[str, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """The mean CE over tokens of whole texts that are hard, and A's distance to its start."""
        whole = [Encoded(row.ids, 1, row.has_end) for row in rows if len(row.ids) > 1]
        values, entropy = self._tokens(lm, acting, whole, _nll)
        hard = entropy > self.options.threshold
        loss = (values * hard).sum() / hard.sum().clamp(min=1)
        if start is not None:
            moved = [(acting.tensors[name] - one).square().sum() for name, one in start.items()]
            loss = loss + self.options.structure_weight * torch.stack(moved).sum()
        return loss

    def _tokens(
        self, lm: Routed, acting: ByToken, rows: Sequence[Encoded], function: Any
    ) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
        """A loss of each answer token, and the bare model's entropy before it."""
        batch = collate(list(rows), lm.pad_id, lm.device)
        with lm.evaluating(), lm.computing():
            states, _ = Forward(lm)(batch)
            values = map_logits(lm.head, states, batch.targets, function, lm.vocabulary)
        assert acting.remembered is not None
        entropy = torch.cat([acting.remembered[tuple(row.ids)][row.start :] for row in rows])
        return values, entropy.to(values.device)

    # ---- rows

    def _batches(
        self, stage: Stage, rows: Sequence[Encoded], epochs: int, purpose: str = ""
    ) -> Iterator[list[Encoded]]:
        for epoch in range(epochs):
            order = shuffled(rows, stage.generator("rows", purpose, epoch))
            for start in range(0, len(order), self.options.batch_size):
                yield order[start : start + self.options.batch_size]

    def _part(self, stage: Stage, rows: Sequence[Encoded], step: int) -> list[Encoded]:
        """The retain rows of a step: all in turn, in another order each time."""
        if not rows:
            return []
        size = min(self.options.batch_size, len(rows))
        per = -(-len(rows) // size)
        turn, place = divmod(step, per)
        order = shuffled(rows, stage.generator("retain", turn))
        return order[place * size : (place + 1) * size]

    def _told(self, stage: Stage, step: int, total: int, batch: Sequence[Encoded]) -> None:
        stage.steps += 1
        stage.tokens += sum(len(row.ids) for row in batch)
        stage.progress(step + 1, total)


class _Moves:
    """AdamW over all tensors, each step of which moves only its own."""

    def __init__(self, acting: ByToken, options: Alter) -> None:
        self.acting = acting
        tensors = acting.tensors
        slow = [one for name, one in tensors.items() if name.endswith(".A")]
        fast = [
            one for name, one in tensors.items() if name.endswith((".kept", ".forget", ".gate"))
        ]
        groups = [
            {"params": slow, "lr": options.shared_learning_rate},
            {"params": fast, "lr": options.learning_rate},
        ]
        self.optimizers = {
            part: torch.optim.AdamW(groups, weight_decay=0.0) for part in ("kept", "shared")
        }
        self.groups, self.by_domain = groups, dict[int, torch.optim.Optimizer]()

    def step(self, part: str, loss: Tensor, domain: int | None = None) -> None:
        """One update of B_r (``kept``), A (``shared``), or of a domain's B and the gates."""
        endings = {"kept": (".kept",), "shared": (".A",), "forget": (".forget", ".gate")}[part]
        tensors = self.acting.tensors
        wanted = [name for name in tensors if name.endswith(endings)]
        gradients = torch.autograd.grad(loss, [tensors[name] for name in wanted], allow_unused=True)
        for one in tensors.values():
            one.grad = None
        for name, gradient in zip(wanted, gradients, strict=True):
            tensors[name].grad = gradient
        optimizer: torch.optim.Optimizer | None = self.optimizers.get(part)
        if domain is not None:
            optimizer = self.by_domain.setdefault(
                domain, torch.optim.AdamW(self.groups, weight_decay=0.0)
            )
        assert optimizer is not None
        before = {}
        if domain is not None:
            before = {
                name: tensors[name].detach().clone() for name in wanted if name.endswith(".forget")
            }
        optimizer.step()
        with torch.no_grad():  # strictly one domain's, whatever the gate and the moments say
            for name, value in before.items():
                others = torch.arange(len(value)) != domain
                tensors[name][others] = value[others]


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, reduction="none")


class _still:  # noqa: N801 (reads like a context manager of contextlib)
    """Within it no weight of the model takes a gradient."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def __enter__(self) -> None:
        self.before = [one.requires_grad for one in self.lm.model.parameters()]
        for one in self.lm.model.parameters():
            one.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for one, flag in zip(self.lm.model.parameters(), self.before, strict=True):
            one.requires_grad_(flag)
