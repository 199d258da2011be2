"""``delible request export``, ``import``, ``key``: the ledger elsewhere, and who signs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from delible.cli import flags, output
from delible.cli.request import Place, Show, ledger_at


@flags.flowing
def export(
    file: Path,
    /,
    *,
    key: Annotated[Path | None, Parameter(group=flags.RUN)] = None,
    show: Show = False,
    ledger: Place = None,
) -> int:
    """Write the whole ledger as JSON, signed where there is a key.

    Parameters
    ----------
    file
        The file to write.
    key
        The private key that signs. Default: the one of 'delible request key', if there is one.
    show
        Take along the texts that are to be forgotten, as a backup needs.
    ledger
        The file of the ledger.
    """
    reporter = output.Reporter()
    opened = ledger_at(ledger, reporter)
    from delible.ledger.export import write_export
    from delible.ledger.signing import default_key, private_key

    place = key or default_key(opened.path)
    signer = private_key(place) if key is not None or place.exists() else None
    head = write_export(opened, file, texts=show, key=signer)
    reporter.say(f"{file}: {output.plural(head['size'], 'event')}, root {head['root']}.")
    texts = sum(len(fields) for fields in opened.texts().values())
    if texts and not show:
        reporter.say(
            f"Without {output.plural(texts, 'text')}: from such a file nothing can be carried out "
            "or asked about (--show takes them along)."
        )
    if signer is None:
        reporter.say("Nobody signed it: 'delible request key' makes a key.")
    return 0


@flags.flowing
def import_(file: Path, /, *, ledger: Place = None) -> int:
    """Read an export into a ledger, a new one or one that it goes on from.

    Parameters
    ----------
    file
        The export.
    ledger
        The file of the ledger.
    """
    reporter = output.Reporter()
    from delible.ledger import default_place
    from delible.ledger.export import read_in

    opened, added = read_in(file, ledger or default_place())
    reporter.say(f"{opened.path}: {output.plural(added, 'event')} added.")
    if not opened.key_path.exists():
        reporter.say(
            f"To enter requests here, bring the key of the ledger as well: {opened.key_path}."
        )
    return 0


@flags.flowing
def key(
    *, out: Annotated[Path | None, Parameter(group=flags.RUN)] = None, ledger: Place = None
) -> int:
    """Make the key that signs certificates and exports.

    The private part may be read by you alone, and is never in the ledger. Give the public part to
    whoever is to verify, by another way than the certificates.

    Parameters
    ----------
    out
        The file of the private part; the public one ends in .pub. Default: beside the ledger.
    ledger
        The file of the ledger.
    """
    reporter = output.Reporter()
    from delible.ledger import default_place
    from delible.ledger.signing import default_key, make_key

    place = out or default_key(ledger or default_place())
    public, known = make_key(place)
    reporter.field("private", f"{place} (keep it, and keep it secret)")
    reporter.field("public", str(public))
    reporter.field("id", known)
    return 0
