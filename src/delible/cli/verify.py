"""``delible verify``: certificates, exports and ledgers, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from delible.cli import flags, output


@flags.flowing
def verify(
    file: Path,
    /,
    *,
    key: Annotated[Path | None, Parameter(group=flags.DATA)] = None,
    against: Annotated[Path | None, Parameter(group=flags.DATA)] = None,
    run: Annotated[Path | None, Parameter(group=flags.DATA)] = None,
) -> int:
    """See whether a certificate, an export or a ledger is what it was; needs no model.

    Exit code 2: it is not, and the message says what is wrong.

    Parameters
    ----------
    file
        A certificate (.json), an export, or the file of a ledger.
    key
        The public key (.pub) of whoever signed it; for a ledger, which nobody signs, the export of
        --against. Without it a file can only be seen to be whole in itself.
    against
        An earlier export, with which an export or a ledger must begin; or for a certificate, the
        ledger or an export that must have its events; what came since is told.
    run
        The run directory whose artefact a certificate is about: its files are hashed again.
    """
    reporter = output.Reporter()
    from delible.ledger.verifying import verify as look

    for sentence in look(file, key=key, against=against, run=run):
        reporter.say(sentence)
    return 0
