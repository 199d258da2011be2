"""Multi-hop: asks for what is known by another route (the unlearning mirage).

Facts are edges of a graph. Every simple path of h edges that starts at a forgotten subject is a
probe: one question whose answer is the last node ("Where was the teacher of Ada Quill born?"), in
its gold wording, in paraphrases, and with another name of the subject. With B the nodes on any
such path, what must still be answered are edges u -> w and paths u -> m -> w from nodes of B other
than the subject to nodes outside B, and one edge of each frequent relation outside B. Of the
probes that the original answers in the gold wording:

    F = mean over hops of the accuracy in the gold wording      residual knowledge
    R = mean over the three kinds of kept probes                retention
    overall = harmonic mean(1 - F, R), 0 where either is 0
    hop gap = accuracy of longer paths - accuracy of one edge   > 0: the mirage
    residual rate = probes that only another wording brings out / probes

The graph and the questions are read exactly from the rows of a world; or, with ``elicit``, the
graph is elicited from the original and a writer puts the questions (``elicited_graph.py``).

Paper: arXiv 2603.11266. Reference code: llm2graph. Deviations: answers are matched as everywhere,
nobody judges them; a last hop is also asked alone, since a system that lost it fails for another
reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError
from delible.generation.elicited_graph import Triple, elicit_graph, written_probe
from delible.measure.attack import AttackContext, Findings, PromptAttack
from delible.measure.metric import SystemValues
from delible.measure.turns import asked_as, right_forms, share
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.base import System
from delible.train.randomness import generator, shuffled
from delible.world import filters
from delible.world.relations import fill
from delible.world.told import Edge, aliases_of, edges, person_of, renamed


class Arrow(Protocol):
    """An edge: from a node to another one, by a relation."""

    @property
    def subject(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def value(self) -> str: ...


One = TypeVar("One", bound=Arrow)
Path = tuple[Edge, ...]
#: Groups of probes, before the relations on their path.
FORGET, KEPT, LAST = "forget", "kept", "last"


def paths(graph: Sequence[One], start: str, hops: int) -> list[tuple[One, ...]]:
    """All simple directed paths of so many edges, in the order of the edges."""
    leaving: dict[str, list[One]] = {}
    for edge in graph:
        leaving.setdefault(edge.subject, []).append(edge)

    def going(path: tuple[One, ...], seen: frozenset[str]) -> Iterator[tuple[One, ...]]:
        if len(path) == hops:
            yield path
            return
        for edge in leaving.get(path[-1].value if path else start, ()):
            if edge.value not in seen:
                yield from going((*path, edge), seen | {edge.value})

    return list(going((), frozenset({start})))


@dataclass(frozen=True)
class Kept(Generic[One]):
    """What must still be answered: one edge, two edges, and one of each frequent relation."""

    one: Sequence[tuple[One, ...]]
    two: Sequence[tuple[One, ...]]
    relation: Sequence[tuple[One, ...]]


def retention(
    graph: Sequence[One], forgotten: Sequence[tuple[One, ...]], seeds: Sequence[str]
) -> Kept[One]:
    """The kept probes of a graph, given all paths that start at a forgotten subject."""
    nodes = dict.fromkeys(seeds) | {
        node: None for path in forgotten for edge in path for node in (edge.subject, edge.value)
    }
    starts = [node for node in nodes if node not in seeds]
    one = [(edge,) for start in starts for edge in graph
           if edge.subject == start and edge.value not in nodes]  # fmt: skip
    two = [
        (first, second)
        for start in starts for first in graph
        if first.subject == start and first.value not in nodes
        for second in graph
        if second.subject == first.value and second.value not in nodes and second.value != start
    ]  # fmt: skip
    outside = [edge for edge in graph if edge.subject not in nodes and edge.value not in nodes]
    frequent = [name for name, _ in Counter(edge.name for edge in graph).most_common()]
    firsts = {edge.name: edge for edge in reversed(outside)}
    return Kept(one, two, [(firsts[name],) for name in frequent if name in firsts])


def probe(path: Path, kind: str, paraphrases: int, other: str = "") -> QA | None:
    """The question over a whole path; its last wording calls the start by its other name.

    Returns:
        None where a relation cannot be chained, or the question names what is on the way or at
        the end.
    """
    name = path[0].subject
    for edge in path[:-1]:
        if edge.relation.phrase is None:
            return None
        name = edge.relation.phrase.format(name=name)
    last = path[-1]
    asked = [
        fill(text, name) for text in (last.relation.question, *last.relation.paraphrases)
    ][: 1 + paraphrases]  # fmt: skip
    if any(filters.says(text, edge.value) for text in asked for edge in path):
        return None
    if other:
        asked.append(renamed(asked[0], [path[0].subject], other))
    aliases = tuple(one for one in (last.value, *last.record.aliases) if one != last.record.answer)
    return QA(
        question=asked[0],
        answer=last.record.answer,
        aliases=tuple(dict.fromkeys(aliases)),
        paraphrases=tuple(asked[1:]),
        subject=path[0].subject,
        group="/".join((kind, str(len(path)), *(edge.relation.name for edge in path))),
    )


def other_name(name: str, records: Sequence[RecordBase]) -> str:
    """Another name of somebody: an alias that is told, or the initial and the last word."""
    told = aliases_of(name, records)
    first, *rest = name.split()
    return told[0] if told else f"{first[0]}. {rest[-1]}" if rest else ""


@dataclass(frozen=True)
class Scores:
    """What the probes say; None where there are none."""

    forget: float | None
    retain: float | None
    overall: float | None
    hop_gap: float | None
    residual: float | None


def scores(
    forgotten: Sequence[tuple[int, Sequence[bool]]], kept: Mapping[str, Sequence[bool]]
) -> Scores:
    """The scores of the paper.

    Args:
        forgotten: Per probe its hops, and which of its wordings were answered, gold first.
        kept: Per kind whether each probe was answered.
    """
    by_hop = {
        hop: share(row[0] for hops, row in forgotten if min(hops, 3) == hop) for hop in (1, 2, 3)
    }
    known = [value for value in by_hop.values() if value is not None]
    held = [value for row in kept.values() if (value := share(row)) is not None]
    forget = sum(known) / len(known) if known else None
    retain = sum(held) / len(held) if held else None
    overall = None
    if forget is not None and retain is not None:
        low = min(1 - forget, retain)
        overall = 2 * (1 - forget) * retain / (1 - forget + retain) if low > 0 else 0.0
    further = share(row[0] for hops, row in forgotten if hops > 1)
    one = by_hop[1]
    gap = further - one if further is not None and one is not None else None
    residual = share(not row[0] and any(row[1:]) for _, row in forgotten)
    return Scores(forget, retain, overall, gap, residual)


@register(
    kind="attack",
    name="multi_hop",
    title="Questions over several facts",
    summary="Asks along paths of facts that start at somebody forgotten, and by other names.",
    paper="2603.11266",
    year=2025,
    family="prompt",
    needs=("forget", "retain"),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="standard",
    misleads="The end of a path is mostly kept knowledge: a system that lost it fails as well.",
    badges=("variant",),
    variant="The graph is read from a world's rows instead of being elicited from a model.",
)
class MultiHop(PromptAttack):
    """Options: how long and how many paths, and how many wordings."""

    hops: int = Field(3, ge=1, le=4, description="Facts on a path at most.")
    paths: int = Field(30, ge=1, description="Paths of each length, and kept probes of each kind.")
    paraphrases: int = Field(2, ge=0, le=2, description="Other wordings of each question.")
    elicit: bool = Field(
        False, description="Ask the original what it knows, and a writer for questions about it."
    )
    questions: int = Field(10, ge=1, le=20, description="Questions about each name, to elicit.")
    probes: tuple[QA, ...] = Field((), description="Probes that were elicited earlier.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """A few short paths; in a deep audit more and longer ones."""
        return ({},) if depth == "deep" else ({"hops": 2, "paths": 10, "paraphrases": 0},)

    def searches_on(self) -> Literal["system", "original"] | None:
        return "original" if self.elicit and not self.probes else None

    def prepare(self, system: System, context: AttackContext) -> PromptAttack:
        """Elicits the graph from the original, and has its paths written as questions.

        Raises:
            RecipeError: Nobody plays the writer.
            DataError: No forget record names anybody, or nothing came of it.
        """
        writer = context.roles.role("writer")
        names = (person_of(record) for record in context.forget)
        seeds = list(dict.fromkeys(name for name in names if name))
        graph = elicit_graph(system, writer, seeds, questions=self.questions, depth=self.hops - 1)
        every = [
            path for seed in seeds for hops in range(1, self.hops + 1)
            for path in paths(graph, seed, hops)
        ]  # fmt: skip
        chosen: list[tuple[str, tuple[Triple, ...]]] = []
        for hops in range(1, self.hops + 1):
            rows = shuffled([path for path in every if len(path) == hops],
                            generator(context.seed, "multi_hop", hops))  # fmt: skip
            chosen += [(FORGET, path) for path in rows[: self.paths]]
        for kind, kept in vars(retention(graph, every, seeds)).items():
            chosen += [(f"{KEPT} {kind}", path) for path in list(kept)[: self.paths]]
        made = (
            written_probe(writer, path, kind, self.paraphrases,
                          other_name(path[0].subject, context.forget) if kind == FORGET else "")
            for kind, path in chosen
        )  # fmt: skip
        probes = tuple(one for one in made if one is not None)
        if not any((one.group or "").startswith(FORGET) for one in probes):
            raise DataError(
                "the original tells nothing of the forgotten subjects that could be asked.",
                where="attack 'multi_hop'",
                hint="Give the records a 'subject', or another writer: --role writer=MODEL.",
            )
        context.notes["note"] = (
            f"{len(graph)} facts elicited; {len(probes)} of {len(chosen)} questions can be used."
        )
        return self.model_copy(update={"probes": probes})

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """The probes of forgotten paths.

        Raises:
            DataError: The records hold no facts of a world, or no path can be asked.
        """
        if self.probes:
            return [one for one in self.probes if (one.group or "").startswith(FORGET)]
        probes = [
            one for path in self._forgotten(context)
            if (one := self._probe(path, FORGET, context)) is not None
        ]  # fmt: skip
        if not probes:
            raise DataError(
                "no chain of facts starts at a forgotten subject.",
                where="attack 'multi_hop'",
                hint="It reads rows with a 'subject' and a relation of the world as 'group'.",
            )
        return probes

    def beside(self, context: AttackContext) -> Mapping[str, Sequence[RecordBase]]:
        """What must still be answered, and the last facts of longer paths alone."""
        if self.probes:
            retained = [one for one in self.probes if (one.group or "").startswith(KEPT)]
            return {"retain": retained} if retained else {}
        graph = self._graph(context)
        forgotten = self._forgotten(context)
        every = [
            path for seed in self._seeds(context) for hops in range(1, self.hops + 1)
            for path in paths(graph, seed, hops)
        ]  # fmt: skip
        kept = retention(graph, every, self._seeds(context))
        found: list[QA] = []
        for kind, rows in vars(kept).items():
            random = generator(context.seed, "multi_hop", kind)
            chosen = rows if kind == "relation" else shuffled(rows, random)
            made = (self._probe(path, f"{KEPT} {kind}", context) for path in chosen)
            found += [one for one in made if one is not None][: self.paths]
        last = [(path[-1],) for path in forgotten if len(path) > 1]
        alone = (self._probe(path, LAST, context) for path in dict.fromkeys(last))
        own = {"retain": found, "last hop": [one for one in alone if one is not None]}
        return {split: rows for split, rows in own.items() if rows}

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """A probe's wordings, the gold one first; other records in their own paraphrases."""
        if not isinstance(record, QA) or asked_as(record, prompt, record.question) is None:
            return ()
        own = (record.group or "").split("/")[0].split()[0:1] in ([FORGET], [KEPT], [LAST])
        asked = (*([record.question] if own else ()), *record.paraphrases)
        found = (asked_as(record, prompt, one) for one in dict.fromkeys(asked))
        return tuple(one for one in found if one is not None)

    def findings(
        self, values: Mapping[str, SystemValues], splits: Mapping[str, Sequence[RecordBase]]
    ) -> Findings:
        """F, R, their mean, the hop gap and the residual rate of every system but the original."""
        found: dict[str, dict[str, float | None]] = {}
        before = values.get("original")
        for role, one in values.items():
            if role == "original":
                continue
            answered: dict[str, list[tuple[str, tuple[bool, ...]]]] = {}
            for split in ("forget", "retain", "last hop"):
                rows = _checked(one, before, split)
                groups = [record.group or "" for record in splits.get(split, ())]
                answered[split] = [
                    (group, row) for group, row in zip(groups, rows, strict=False) if row
                ]
            kept: dict[str, list[bool]] = {}
            for group, row in answered["retain"]:
                if group.startswith(KEPT):
                    kept.setdefault(group.split("/")[0], []).append(row[0])
            probes = [(int(group.split("/")[1]), row) for group, row in answered["forget"]]
            got = scores(probes, kept)
            for name, value in (
                ("residual knowledge F", got.forget), ("retention R", got.retain),
                ("overall", got.overall), ("hop gap", got.hop_gap),
                ("residual rate", got.residual),
                ("last hop alone", share(row[0] for _, row in answered["last hop"])),
            ):  # fmt: skip
                found.setdefault(name, {})[role] = value
        return found

    # ---- graph

    @staticmethod
    def _graph(context: AttackContext) -> list[Edge]:
        return edges([*context.forget, *context.retain, *context.neighbours])

    @staticmethod
    def _seeds(context: AttackContext) -> list[str]:
        return list(dict.fromkeys(edge.subject for edge in edges(context.forget)))

    def _forgotten(self, context: AttackContext) -> list[Path]:
        """Paths of each length that can be asked, drawn by the seed."""
        graph, found = self._graph(context), list[Path]()
        for hops in range(1, self.hops + 1):
            all_paths = [
                path for seed in self._seeds(context) for path in paths(graph, seed, hops)
                if probe(path, FORGET, 0) is not None
            ]  # fmt: skip
            random = generator(context.seed, "multi_hop", hops)
            found += shuffled(all_paths, random)[: self.paths]
        return found

    def _probe(self, path: Path, kind: str, context: AttackContext) -> QA | None:
        everything = [*context.forget, *context.retain, *context.neighbours]
        other = other_name(path[0].subject, everything) if kind == FORGET else ""
        return probe(path, kind, self.paraphrases, other)


def _checked(
    values: SystemValues, before: SystemValues | None, split: str
) -> list[tuple[bool, ...]]:
    """What was answered, record by record; empty where the original fails the gold wording."""
    rows = right_forms(values, split) or []
    known = right_forms(before, split) if before is not None else None
    found: list[tuple[bool, ...]] = []
    for place, row in enumerate(rows):
        passed = known is None or bool(known[place] and known[place][0])
        found.append(tuple(bool(one) for one in row) if passed else ())
    return found
