"""``delible audit``: how deep the forgetting goes, and whether it goes deep enough."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from delible.cards import Depth
from delible.cli import flags, output, tables
from delible.cli.data import read_request
from delible.cli.options import components
from delible.cli.roles import read_roles
from delible.errors import (
    EXIT_DONE,
    EXIT_THRESHOLD_FAILED,
    DataError,
    RecipeError,
    RunError,
    nearest,
)

if TYPE_CHECKING:
    from delible.audit.result import AuditResult, Measurement
    from delible.cards import Kind


SPLITS = ("forget", "retain", "neighbours", "holdout")
VERDICTS = ("incomplete", "destructive", "suppression", "removal-consistent", "undetermined")
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_NUMBER = re.compile(
    r"^(?:(?P<attack>\w+)/)?(?P<split>\w+)\.(?P<metric>\w+)\s*(?P<sign>>=|<=|>|<)\s*(?P<value>\S+)$"
)
_VERDICT = re.compile(r"^verdict\s*=\s*(?P<labels>[\w,\s-]+)$")
VERDICT_WORDS = {
    "incomplete": "The knowledge is still there.",
    "destructive": "Much of what should be kept is lost.",
    "suppression": "The answers are hidden, not gone.",
    "removal-consistent": "What was tried brought little or nothing back; the reasons say how much "
    "may be there unseen.",
    "undetermined": "What was measured does not allow a verdict.",
}


@flags.flowing
def audit(
    target: str,
    /,
    *,
    forget: flags.Data = None,
    subjects: flags.Subjects = None,
    retain: flags.Data = None,
    neighbours: flags.Data = None,
    holdout: flags.Data = None,
    column: flags.Several = None,
    drop_overlap: flags.DropOverlap = False,
    model: Annotated[str | None, Parameter(group=flags.ASKED)] = None,
    before: Annotated[str | None, Parameter(group=flags.ASKED)] = None,
    reference: Annotated[str | None, Parameter(group=flags.ASKED)] = None,
    metrics: Annotated[list[str] | None, Parameter(group=flags.ASKED)] = None,
    attacks: Annotated[list[str] | None, Parameter(group=flags.ASKED)] = None,
    depth: Annotated[Depth, Parameter(group=flags.ASKED)] = "quick",
    guard: Annotated[str | None, Parameter(group=flags.ASKED)] = None,
    max_forget_probability: Annotated[float | None, Parameter(group=flags.THRESHOLDS)] = None,
    min_retain_probability: Annotated[float | None, Parameter(group=flags.THRESHOLDS)] = None,
    fail_if: Annotated[list[str] | None, Parameter(group=flags.THRESHOLDS)] = None,
    out: flags.Out = None,
    seed: flags.Seed = 0,
    role: flags.Roles = None,
    ray: flags.Ray = False,
    cpus: flags.Cpus = None,
) -> int:
    """See how deep the forgetting goes.

    Parameters
    ----------
    target
        The run directory of 'delible unlearn' (its data and its model before are taken from
        there), or a model by name, folder or .gguf file, with 'vllm:' before it on a GPU with
        vLLM, or the URL of an OpenAI-compatible server. The key is read from $DELIBLE_API_KEY or
        $OPENAI_API_KEY.
    forget
        Records that were to be forgotten. Default: those of the run.
    subjects
        Names that were to be forgotten, separated by commas; guards go by them.
    retain
        Records that were to be kept. Default: those of the run.
    neighbours
        Records close to the forgotten ones.
    holdout
        Records of the same kind that the model never saw.
    column
        Your name of a known column, such as question=prompt. May be repeated.
    drop_overlap
        Drop rows from the other files that are also to be forgotten, instead of refusing.
    model
        Name of the model at the URL. Default: the only one that the server lists.
    before
        The model before unlearning. Default: that of the run.
    reference
        The model retrained without the forget records. Without it the verdict says less.
    metrics
        Names of metrics, separated by commas ('delible list metrics'); with options as
        '{name: unlearning_quality, judge: default}'. Default: all that fit.
    attacks
        Names of attacks, separated by commas ('delible list attacks'), or none; with options as
        '{name: quantize, bits: 4}'. Default: those of the depth.
    depth
        How deep to look: quick (minutes; some attacks of each family that a verdict needs),
        standard (more forms, talks and settings) or deep (searches, sweeps, all that there is).
        What one audit found, the next one knows.
    guard
        Put this guard before the model ('delible list guards').
    max_forget_probability
        The same as --fail-if "forget.answer_probability>NUMBER".
    min_retain_probability
        The same as --fail-if "retain.answer_probability<NUMBER".
    fail_if
        A number that must not be: SET.METRIC>NUMBER, or ATTACK/SET.METRIC>NUMBER ('any' is the
        worst attack), or verdict=incomplete,suppression. May be repeated.
    out
        Where metrics.json and report.html go. Default: the run directory, or runs/audit-HASH.
    seed
        Of every random choice.
    ray
        Ask and attack on a Ray cluster (or on this machine, by Ray): each attack on each system is
        a piece of its own, with one GPU where there are GPUs. All its machines must see the models
        and the cache.
    cpus
        CPUs that each piece takes on the cluster. Default: a GPU's share of them, or 4.
    role
        Who plays a part by talking: judge=MODEL, writer=https://host/v1#MODEL (judge, writer,
        attacker, guard, critic, planner, translator), or a YAML file of such lines, which may also
        limit what is spent: 'judge: {system: MODEL, calls: 500, tokens: 200000}'. May be repeated.
    """
    asked_metrics = _components(metrics, "metric")
    asked_attacks = _components(attacks, "attack")
    roles = read_roles(role)
    if "judge" not in roles:
        _need_no_judge(asked_metrics or ())
    thresholds = [
        *_shorthand("forget.answer_probability>", max_forget_probability),
        *_shorthand("retain.answer_probability<", min_retain_probability),
        *(_threshold(text) for text in fail_if or ()),
    ]
    if guard is not None:
        from delible import registry

        registry.card("guard", guard)
    folder = Path(target)
    run = folder if (folder / "manifest.json").is_file() else None
    if run is not None:
        known, before = _of_run(run, before, forget is not None or bool(subjects))
    else:
        known = {}
    with output.Reporter() as reporter:
        request = read_request(
            reporter,
            forget=forget or known.get("forget"),
            subjects=subjects,
            retain=retain or known.get("retain"),
            neighbours=neighbours or known.get("neighbours"),
            holdout=holdout or known.get("holdout"),
            column=column,
            drop_overlap=drop_overlap,
        )
        content = [target, before, reference, request.id, guard, seed]
        named = [*([model] if model else []), *([roles] if roles else [])]
        text = json.dumps([*content, asked_metrics, asked_attacks or depth, *named], sort_keys=True)
        default = run or Path("runs") / f"audit-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        place = out or default
        reporter.field("target", target)
        reporter.field("before", before or "not given (--before MODEL)")
        reporter.field("reference", reference or "not given (--reference MODEL)")
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible.audit import run as audits

        result = audits.audit(
            target, request, model=model, before=before, reference=reference, metrics=asked_metrics,
            attacks=asked_attacks, depth=depth, guard=guard, out=place, seed=seed,
            roles=roles, progress=reporter.stage, ray=ray, cpus=cpus,
        )  # fmt: skip
        reporter.finish_bar()
        show(reporter, result)
        reporter.say(f"The numbers lie in {place / 'metrics.json'}.")
        from delible.report import write_page

        reporter.say(f"The report: {write_page(place)}")
        return _judge(reporter, result, thresholds)


def _need_no_judge(metrics: Sequence[Any]) -> None:
    """Refuses metrics that nobody would judge, before any work."""
    from delible.component import build
    from delible.system.roles import Roles

    for one in metrics:
        build("metric", one).with_roles(Roles())


def _components(given: Sequence[str] | None, kind: Kind) -> list[Any] | None:
    """Components by name or mapping, checked before any work; ``none`` is an empty list."""
    if given is None:
        return None
    from delible.component import build

    found = components(given)
    if found == ["none"]:
        return []
    for one in found:
        build(kind, one)
    return found


def _of_run(run: Path, before: str | None, told: bool) -> tuple[dict[str, str], str | None]:
    """What the run directory knows: its files of records, and the model before.

    ``told``: the command line says what was to be forgotten.
    """
    from delible.rundir import RunDirectory

    manifest = RunDirectory(run).manifest
    if manifest.get("status") != "done":
        raise RunError(
            "this run is not finished.",
            where=str(run),
            hint="Start the same 'delible unlearn' again: it resumes.",
        )
    names = ("forget", "retain", "neighbours", "holdout")
    files = {name: run / "data" / f"{name}.jsonl" for name in names}
    found = {name: str(path) for name, path in files.items() if path.is_file()}
    if not told and "forget" not in found:
        raise DataError(
            "the run keeps no forget records.", where=str(run), hint="Add --forget FILE."
        )
    return found, before or manifest.get("run", {}).get("model")


# ---- what is shown


def show(reporter: output.Reporter, result: AuditResult) -> None:
    """The plain numbers, the attack x leak matrix, and the verdict with its reasons."""
    reporter.heading("What the models say when they are simply asked")
    reporter.console.print(tables.measurements(result))
    if result.leaks:
        reporter.heading("What attacks bring back")
        reporter.console.print(tables.matrix(result))
        for sentence in tables.worst_places(result):
            reporter.say(f"  {sentence}")
        said = tables.recovered(result)
        if said is not None:
            reporter.heading("What attacks got it to say")
            reporter.console.print(said)
    if result.utility is not None and (result.utility.parts or result.utility.broken):
        reporter.heading("What is left of the rest")
        reporter.console.print(tables.utility(result))
        for sentence in result.utility.broken:
            reporter.say(f"  Broken: {sentence}.")
    if result.verdict is not None:
        label = result.verdict.label
        reporter.heading(f"Verdict: {label}. {VERDICT_WORDS[label]}")
        for reason in result.verdict.reasons:
            reporter.say(f"  - {reason}")
        if result.cheapest:
            reporter.say(f"  {result.cheapest}")
    if result.not_tested:
        reporter.heading("Not tested")
        for sentence in result.not_tested:
            reporter.say(f"  - {sentence}")


# ---- thresholds


@dataclass(frozen=True)
class Threshold:
    """A condition under which the command fails."""

    text: str
    labels: tuple[str, ...] = ()
    attack: str = "none"
    split: str = ""
    metric: str = ""
    sign: str = ">"
    value: float = 0.0

    def broken_by(self, result: AuditResult) -> str | None:
        """How the result meets the condition; None if it does not.

        Raises:
            RunError: The audit did not measure it.
        """
        if self.labels:
            if result.verdict is None:
                raise RunError("this audit gave no verdict.", where=f"--fail-if {self.text}")
            met = result.verdict.label in self.labels
            return f"the verdict is {result.verdict.label}" if met else None
        found = [item for item in result.measurements if self._is_about(item)]
        values = [item.value for item in found if item.value is not None]
        if not values:
            reasons = {item.reason for item in found if item.reason}
            raise RunError(
                f"this audit did not measure it{f' ({min(reasons)})' if reasons else ''}.",
                where=f"--fail-if {self.text}",
                hint="Ask for the metric with --metrics, for the attack with --attacks, and give "
                "the records.",
            )
        worst = max(values) if self.sign.startswith(">") else min(values)
        if COMPARISONS[self.sign](worst, self.value):
            return f"{self.split} {self.metric} is {worst:.3f}"
        return None

    def _is_about(self, item: Measurement) -> bool:
        attack = item.attack != "none" if self.attack == "any" else item.attack == self.attack
        here = item.split == self.split and item.metric == self.metric
        return item.system == "unlearned" and here and attack


def _shorthand(condition: str, value: float | None) -> list[Threshold]:
    return [] if value is None else [_threshold(f"{condition}{value:g}")]


def _threshold(text: str) -> Threshold:
    where = f"--fail-if {text}"
    verdict = _VERDICT.match(text.strip())
    if verdict:
        labels = tuple(label.strip() for label in verdict["labels"].split(","))
        for label in labels:
            if label not in VERDICTS:
                raise RecipeError(
                    f"unknown verdict '{label}'.", where=where, hint=nearest(label, VERDICTS)
                )
        return Threshold(text, labels=labels)
    number = _NUMBER.match(text.strip())
    try:
        value = float(number["value"]) if number else None
    except ValueError:
        value = None
    if number is None or value is None:
        raise RecipeError(
            "this is no condition.",
            where=where,
            hint='Write "forget.answer_probability>0.2", "relearn/forget.answer_probability>0.5" '
            "or verdict=incomplete.",
        )
    from delible import registry

    if number["split"] not in SPLITS:
        raise RecipeError(
            f"unknown set '{number['split']}'.", where=where, hint=nearest(number["split"], SPLITS)
        )
    registry.card("metric", number["metric"])
    attack = number["attack"] or "none"
    if attack not in ("none", "any"):
        registry.card("attack", attack)
    return Threshold(
        text, (), attack, number["split"], number["metric"], number["sign"], value
    )  # fmt: skip


def _judge(reporter: output.Reporter, result: AuditResult, thresholds: Sequence[Threshold]) -> int:
    broken = [
        f"{found} (--fail-if {threshold.text})"
        for threshold in thresholds
        if (found := threshold.broken_by(result)) is not None
    ]
    for sentence in broken:
        reporter.console.print(f"Failed: {sentence}.", style="bold red", markup=False)
    if thresholds and not broken:
        kept = output.plural(len(thresholds), "threshold")
        reporter.console.print(f"Passed: {kept}.", style="bold green", markup=False)
    return EXIT_THRESHOLD_FAILED if broken else EXIT_DONE
