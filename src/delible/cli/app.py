"""The commands as a cyclopts app. Only the command that is run is imported."""

from __future__ import annotations

from cyclopts import App, Parameter

from delible.cli.commands import COMMANDS


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
for _order, (_name, (_place, _usage, _help, _example)) in enumerate(COMMANDS.items()):
    app.command(
        _place,
        name=_name,
        help=_help,
        sort_key=_order,
        usage=f"Usage: delible {_name} {_usage}",
        help_epilogue=_example,
    )
