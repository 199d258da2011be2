"""``delible serve``: an OpenAI-compatible gateway before a model, an artefact or a server."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from delible.cli import flags, output
from delible.cli.data import read_request
from delible.cli.roles import read_roles
from delible.errors import EXIT_DONE, DataError, RecipeError

if TYPE_CHECKING:
    from delible.context import Context
    from delible.system.base import System

SERVED = Group("What is served", sort_key=1)
ANSWERS = Group("Answers", sort_key=2)
WHO = Group("Who may call", sort_key=3)
#: Addresses that only this machine reaches.
_HERE = ("127.0.0.1", "::1", "localhost")


@flags.flowing
def serve(
    target: str = "default",
    /,
    *,
    guard: Annotated[list[str] | None, Parameter(group=SERVED)] = None,
    forget: Annotated[str | None, Parameter(group=SERVED)] = None,
    subjects: Annotated[
        list[str] | None, Parameter(name=("--subjects", "--subject"), group=SERVED)
    ] = None,
    targets: Annotated[Path | None, Parameter(group=SERVED)] = None,
    model: Annotated[str | None, Parameter(group=SERVED)] = None,
    name: Annotated[str | None, Parameter(group=SERVED)] = None,
    retain: Annotated[str | None, Parameter(group=SERVED)] = None,
    role: flags.Roles = None,
    undisclosed: Annotated[bool, Parameter(group=ANSWERS, show_default=False)] = False,
    name_policy: Annotated[bool, Parameter(group=ANSWERS, show_default=False)] = False,
    answer_tokens: Annotated[int | None, Parameter(group=ANSWERS)] = None,
    host: Annotated[str | None, Parameter(group=flags.RUN)] = None,
    port: Annotated[int | None, Parameter(group=flags.RUN)] = None,
    config: Annotated[Path | None, Parameter(group=flags.RUN)] = None,
    keys: Annotated[Path | None, Parameter(group=WHO)] = None,
    new_key: Annotated[str | None, Parameter(group=WHO)] = None,
    requests_per_minute: Annotated[int | None, Parameter(group=WHO)] = None,
    tokens_per_minute: Annotated[int | None, Parameter(group=WHO)] = None,
    calls_at_once: Annotated[int | None, Parameter(group=WHO)] = None,
    allow_origin: Annotated[list[str] | None, Parameter(group=WHO)] = None,
    admin_key_variable: Annotated[str | None, Parameter(group=WHO)] = None,
) -> int:
    """Serve a model, a run or a server's model to OpenAI clients, behind guards.

    Chat completions, completions, responses (texts, without a state), models, and a guard's
    verdict alone at /v1/check. What is not text is refused; paths that are not known are never
    passed on. Needs the extra 'gateway'.

    Parameters
    ----------
    target
        A run directory of 'delible unlearn' or the folder of any artefact, a model by name, folder
        or .gguf file, or the URL of an OpenAI-compatible server (its key is read from
        $DELIBLE_API_KEY or $OPENAI_API_KEY).
    guard
        Put this guard before it ('delible list guards'); with options as
        '{name: target_detector, threshold: 0.75}'. May be repeated: the first one is innermost.
    forget
        Records that guards go by.
    subjects
        Names that guards go by, separated by commas.
    targets
        File of targets that guards go by ('delible targets make'). It is read again when it
        changes; a file that cannot be used changes nothing.
    model
        Name of the model at the URL. Default: the only one that the server lists.
    name
        What clients call it. Default: the name of the server's model, or of the folder.
    retain
        Records to keep, for guards that learn from them.
    role
        Who plays a part that a guard consults by talking: guard=MODEL, judge=https://host/v1#MODEL.
        Default: whom the guard was made with, or the guarded system itself. May be repeated.
    undisclosed
        Refusals of a guard end with the finish reason 'stop' instead of 'content_filter'.
    name_policy
        Name the guard of a refusal in the header x-delible-policy.
    answer_tokens
        Tokens of an answer whose client sets no limit, of models on this machine. Default: 1024.
    host
        Address to listen at. Default: 127.0.0.1, which only this machine reaches.
    port
        Port to listen at; 0 takes any free one. Default: 8000.
    config
        YAML file of options: these, and limits of time and size (docs/gateway.md lists them).
    keys
        File of API keys. Without one anyone who reaches the address may call.
    new_key
        Make an API key of this name, add its hash to --keys, print the key once, and end.
    requests_per_minute
        Of each key that has no limit of its own in the file.
    tokens_per_minute
        Of each key that has no limit of its own in the file.
    calls_at_once
        Of each key that has no limit of its own in the file.
    allow_origin
        Let web pages of this origin call (CORS). May be repeated.
    admin_key_variable
        Environment variable with the key of /admin/targets, by which the names that a guard goes
        by change while it serves. Without it there is no such route.
    """
    if new_key is not None:
        return _make_key(new_key, keys)
    from delible.gateway.settings import read_settings

    settings = read_settings(
        config,
        {
            "undisclosed": undisclosed or None, "name_policy": name_policy or None,
            "answer_tokens": answer_tokens, "host": host, "port": port, "keys": keys,
            "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute,
            "calls_at_once": calls_at_once, "allowed_origins": allow_origin,
            "admin_key_variable": admin_key_variable,
        },
    )  # fmt: skip
    guards = [_guard(given) for given in guard or ()]
    if not guards and (forget or subjects or targets):
        raise RecipeError(
            "nothing goes by --forget, --subjects or --targets without a guard.",
            where="delible serve",
            hint="Add --guard NAME ('delible list guards').",
        )
    with output.Reporter(error=True) as reporter:
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible.gateway.running import needs_extra, run

        needs_extra()
        from delible.gateway.models import ServedModel, name_for
        from delible.measure.starting import started
        from delible.systems.opening import open_system

        context = started(None, roles=read_roles(role))
        opened = open_system(target, model=model, context=context, serving=True)
        served = name or name_for(target, opened)
        system = _guarded(
            reporter, opened, guards, context,
            forget=forget, subjects=subjects, targets=targets, retain=retain,
        )  # fmt: skip
        models = [ServedModel(served, system, settings)]

        def began(address: str) -> None:
            reporter.say(f"'{served}' answers at {address}. Ctrl-C ends it.")
            if settings.keys is None and settings.host not in _HERE:
                reporter.say("Anyone who reaches this address may call it: --keys changes that.")

        _log_calls()
        try:
            run(models, settings, began)
        except KeyboardInterrupt:  # it has finished what was under way
            reporter.say("Ended.")
    return EXIT_DONE


def _make_key(name: str, keys: Path | None) -> int:
    from delible.gateway.keys import new_key

    if keys is None:
        raise RecipeError(
            "where its hash goes is not said.", where="--new-key", hint="Add --keys FILE."
        )
    key = new_key(name, keys)
    output.Reporter(error=True).say(
        f"The key of '{name}'. It is shown this once; {keys} has its hash alone."
    )
    print(key)
    return EXIT_DONE


def _guard(given: str) -> dict[str, Any]:
    """A guard's name and options.

    Raises:
        RecipeError: There is no such guard.
    """
    import yaml

    from delible import registry

    try:
        content = yaml.safe_load(given) if given.lstrip().startswith("{") else {"name": given}
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise RecipeError(f"'{given}' names no guard.", where="--guard")
    registry.card("guard", content["name"])
    return content


def _guarded(
    reporter: output.Reporter,
    system: System,
    guards: list[dict[str, Any]],
    context: Context,
    *,
    forget: str | None,
    subjects: list[str] | None,
    targets: Path | None,
    retain: str | None,
) -> System:
    if not guards:
        return system
    if targets is not None:
        if forget is not None or subjects:
            raise RecipeError(
                "guards go by a file of targets, or by names and records.",
                where="--targets",
                hint="Put them into the file: 'delible targets make' writes one.",
            )
        from delible.loaders import read_records
        from delible.systems.targeted import guard_by_targets

        kept = () if retain is None else read_records(retain)
        for one in guards:
            options = {key: value for key, value in one.items() if key != "name"}
            system = guard_by_targets(
                system, targets, one["name"], context=context, retain=kept, **options
            )
        return system
    if forget is None and not subjects:
        raise DataError(
            "the guard has nothing to go by.",
            where="--guard",
            hint="Add --subjects NAME,… with names, --forget FILE with records, or --targets FILE.",
        )
    from delible.systems.guarded import guard

    request = read_request(
        reporter, forget=forget, subjects=subjects, retain=retain, neighbours=None, holdout=None,
        column=None, drop_overlap=False,
    )  # fmt: skip
    for one in guards:
        options = {key: value for key, value in one.items() if key != "name"}
        system = guard(system, request, one["name"], context=context, **options)
    return system


def _log_calls() -> None:
    """One JSON line per call on stderr, for whoever collects logs."""
    from delible.gateway.telling import access

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers[:] = [handler]
    access.setLevel(logging.INFO)
    access.propagate = False
