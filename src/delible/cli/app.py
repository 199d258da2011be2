"""The commands as a cyclopts app. Only the command that is run is imported."""

from __future__ import annotations

from cyclopts import App, Parameter

from delible.cli.commands import COMMANDS, GROUPS


def _version() -> str:
    import delible

    return delible.__version__


app = App(
    name="delible",
    help="Make a language model forget, keep the rest, and see how deep the forgetting goes.",
    help_epilogue=(
        "Start with 'delible demo'. Every command explains itself with --help; --debug shows the "
        "traceback of an error."
    ),
    help_format="plaintext",
    version=_version,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)
_groups: dict[str, App] = {}
for _order, (_name, (_place, _usage, _help, _example)) in enumerate(COMMANDS.items()):
    _group, _space, _last = _name.rpartition(" ")
    if _group and _group not in _groups:
        _groups[_group] = App(
            name=_group,
            help=GROUPS[_group],
            sort_key=_order,
            help_format="plaintext",
            version_flags=[],
            usage=f"Usage: delible {_group} COMMAND",
            help_epilogue=f"'delible {_group} COMMAND --help' explains each.",
            default_parameter=Parameter(negative=()),
        )
        app.command(_groups[_group])
    (_groups[_group] if _group else app).command(
        _place,
        name=_last,
        help=_help,
        sort_key=_order,
        usage=f"Usage: delible {_name} {_usage}",
        help_epilogue=_example,
    )


def app_of(name: str) -> App:
    """The app of a command, of one in a group (``request add``) too."""
    found = app
    for word in name.split():
        found = found[word]
    return found
