"""``delible request apply``, ``check``, ``certify``: what is done, seen and shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from delible.cli import flags, output
from delible.cli.options import components, names_in
from delible.cli.request import Only, Place, Show, ledger_at
from delible.errors import EXIT_DONE, EXIT_THRESHOLD_FAILED, DataError

if TYPE_CHECKING:
    from delible.ledger.requests import Request

Several = Annotated[list[str] | None, Parameter(name="--only", group=flags.DATA)]


@flags.flowing
def apply(
    model: str,
    /,
    *,
    policy: Annotated[Path | None, Parameter(group=flags.METHOD)] = None,
    only: Several = None,
    requests_of: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    out: flags.Out = None,
    seed: flags.Seed = 0,
    verify: Annotated[bool, Parameter(group=flags.RUN)] = True,
    show: Show = False,
    ledger: Place = None,
) -> int:
    """Carry out the open requests of a model, by a policy, one on the result of the other.

    Guards go live first, memories forget, then the weights change, by deadline. A killed command
    goes on when it is started again, and nothing is carried out twice. A request that fails does
    not stop the others. Exit code 1: something is left to do.

    Parameters
    ----------
    model
        The model, as the requests name it. The first run starts from it, each later one from the
        result of the run before.
    policy
        A YAML file: rules (which method for which basis and size), utility (how much may be lost,
        and what then), guard (the file of targets), retain. Default: npo, a tenth may be lost, and
        no guard.
    only
        Ids of the only requests to carry out, separated by commas.
    requests_of
        Another model, such as the base before this one: its requests become requests about MODEL,
        too.
    out
        The folder of the runs. Default: beside the ledger.
    seed
        Of every random choice.
    verify
        Open each saved result in a new process and ask three questions again.
    show
        Messages may tell what is to be forgotten.
    ledger
        The file of the ledger.
    """
    from delible.ledger.policy import read_policy

    rules = read_policy(policy)
    with output.Reporter() as reporter:
        opened = ledger_at(ledger, reporter)
        if requests_of is not None:
            from delible.ledger.requests import extend

            new = extend(opened, requests_of, model)
            reporter.say(f"{output.plural(len(new), 'request')} more about {model}.")
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible import api
        from delible.ledger.applying import Ways
        from delible.ledger.applying import apply as carry_out

        ways = Ways(api.unlearn, _asking(), reporter.say)
        done = carry_out(
            opened, model, rules, ways, only=names_in(only), out=out, show=show, seed=seed,
            verify=verify, progress=reporter.progress(), stage=reporter.stage if show else _quiet,
        )  # fmt: skip
        reporter.finish_bar()
        for one in done:
            reporter.say(f"{one.request}: {one.what}. {one.told[:1].upper()}{one.told[1:]}.")
        if not done:
            reporter.say(f"There is nothing to do at {model}.")
            return EXIT_DONE
        from delible.ledger import requests
        from delible.ledger.results import chain_end

        end = chain_end(opened, requests.requests_of(opened.events()), model)
        reporter.say(f"What answers now: {end}")
        left = list(dict.fromkeys(one.request for one in done if one.what in ("failed", "held")))
        if left:
            reporter.say(f"Left to do: {', '.join(left)}.")
        else:
            reporter.say(f"Next: delible request check {model} --system {end}")
    return EXIT_THRESHOLD_FAILED if left else EXIT_DONE


def _quiet(title: str, done: int, total: int) -> None:
    """Titles of stages may name what is to be forgotten."""


def _asking() -> Callable[[str], bool] | None:
    if not sys.stdin.isatty():
        return None
    return lambda question: input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


@flags.flowing
def check(
    model: str,
    /,
    *,
    system: Annotated[str, Parameter(group=flags.ASKED)],
    name: Annotated[str | None, Parameter(name="--name", group=flags.ASKED)] = None,
    depth: Annotated[
        Literal["quick", "standard", "deep"] | None, Parameter(group=flags.ASKED)
    ] = None,
    attacks: Annotated[list[str] | None, Parameter(group=flags.ASKED)] = None,
    before: Annotated[str | None, Parameter(group=flags.ASKED)] = None,
    only: Several = None,
    seed: flags.Seed = 0,
    show: Show = False,
    ledger: Place = None,
) -> int:
    """Ask a system what was forgotten: after a new base, a merge, a quantization.

    Every request that was carried out at MODEL is asked about, and the answers are compared with
    those of the day when it was; memories that forgot are searched. With --depth or --attacks the
    system is attacked, too. Exit code 1: a request leaks, or was never forgotten well enough.

    Parameters
    ----------
    model
        The model, as the requests name it.
    system
        What is asked: a run, a model, a folder, a .gguf file, or the address of a server.
    name
        Name of the model at that address.
    depth
        Attack it as deep as 'delible audit' does at this depth.
    attacks
        Attacks by name, separated by commas.
    before
        The model before, for the attacks to compare with. Default: MODEL.
    only
        Ids of the only requests to ask about, separated by commas.
    seed
        Of every random choice.
    show
        Messages may tell what was to be forgotten.
    ledger
        The file of the ledger.
    """
    with output.Reporter() as reporter:
        opened = ledger_at(ledger, reporter)
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        import delible
        from delible.ledger.checking import OUTCOMES, promised
        from delible.ledger.checking import check as look

        chosen = names_in(only)
        promised(opened, model, chosen)  # before a model is opened
        audit = None
        if depth is not None or attacks is not None:
            audit = _audit(before or model, depth, components(attacks) if attacks else None, seed)
        looked = look(
            opened, model, delible.open(system, model=name), only=chosen, audit=audit,
            show=show, say=reporter.say,
        )  # fmt: skip
        cells = [(one.request, one.outcome, one.told) for one in looked]
        reporter.console.print(output.table(("request", "outcome", "why"), cells))
        by = {kind: [one.request for one in looked if one.outcome == kind] for kind in OUTCOMES}
        leaking, left, unasked = by["leaks"], by["as before"], by["not asked"]
        if unasked:
            reporter.say(f"Nothing can be said of: {', '.join(unasked)}.")
        if leaking:
            reporter.say(f"{system} leaks: {', '.join(leaking)}.")
        if left:
            reporter.say(f"Never forgotten well enough, and no worse now: {', '.join(left)}.")
        audits = [(one.request, one.audit) for one in looked if one.audit]
        undecided = [name for name, one in audits if one["verdict"] == "undetermined"]
        if undecided:
            reporter.say(f"The audit could not decide about: {', '.join(undecided)}.")
        if by["holds"] and not leaking and not left:
            attacked = "" if audit else ", asked plainly"
            none = "None of the others leaks" if unasked else "Nothing leaks"
            reporter.say(f"{none} from {system}{attacked}.")
    return EXIT_THRESHOLD_FAILED if leaking or left else EXIT_DONE


def _audit(before: str, depth: Any, attacks: Any, seed: int) -> Callable[[Any, Any], Any]:
    """An audit whose questions and answers are kept nowhere."""
    from delible.audit.run import audit

    return lambda system, request: audit(
        system, request, before=before, attacks=attacks, depth=depth or "quick", cache=False,
        seed=seed,
    )  # fmt: skip


@flags.flowing
def certify(
    name: str,
    /,
    *,
    model: Only = None,
    key: Annotated[Path | None, Parameter(group=flags.RUN)] = None,
    out: Annotated[Path, Parameter(group=flags.RUN)] = Path("certificates"),
    show: Show = False,
    ledger: Place = None,
) -> int:
    """Write what was asked, done, tested and not tested: a page, and a signed statement.

    It says what the ledger knows; 'delible request check --depth quick' first makes it say more.
    No model is needed. Nothing that is to be forgotten is in the statement.

    Parameters
    ----------
    name
        The id of the request.
    model
        The model, if the request is about several.
    key
        The private key that signs. Default: the one of 'delible request key'.
    out
        The folder of ID.json and ID.html.
    show
        The page (not the statement) shows the names and questions.
    ledger
        The file of the ledger.
    """
    reporter = output.Reporter()
    opened = ledger_at(ledger, reporter)
    from delible.ledger.certifying import certify as write
    from delible.ledger.requests import named, requests_of, texts_of
    from delible.ledger.signing import default_key, private_key

    request = named(requests_of(opened.events()), name)
    texts = texts_of(opened.texts(name).get(name, {})) if show else None
    signer = private_key(key or default_key(opened.path))
    made = write(opened, name, _model(request, model), signer, out, shown=texts)
    verdict = made.content["predicate"]["verdict"]
    reporter.field("statement", str(made.envelope))
    reporter.field("page", str(made.page))
    reporter.field("key", made.key)
    reporter.say(f"{verdict['label'].capitalize()}. {verdict['words']}")
    untested = made.content["predicate"]["not_tested"]
    first = [one for one in untested if not one.endswith("not run.")]
    for sentence in first:
        reporter.say(f"  {sentence}")
    if len(first) < len(untested):
        reporter.say(f"  {len(untested) - len(first)} attacks were not run: the page names them.")
    reporter.say(f"Elsewhere: delible verify {made.envelope.name} --key KEY.pub")
    return EXIT_DONE


def _model(request: Request, model: str | None) -> str:
    if model is None and len(request.models) > 1:
        raise DataError(
            f"request {request.id} is about several models.",
            hint=f"Say --model: {', '.join(request.models)}.",
        )
    return request.models[0] if model is None else model
