"""``delible memory``: what remembers beside weights, and how it forgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from delible.cli import flags, output
from delible.errors import EXIT_DONE, EXIT_THRESHOLD_FAILED, RecipeError

if TYPE_CHECKING:
    from delible.memory import Certificate, Memory

Action = Literal["add", "search", "list", "forget", "certify"]
#: Items that are shown before "and N more", and characters of each.
SHOWN, WIDTH = 20, 60
FOLDER_OF_CERTIFICATES = "certificates"


@flags.flowing
def memory(
    action: Action,
    folder: Path,
    words: list[str] | None = None,
    /,
    *,
    id_: Annotated[list[str] | None, Parameter(name="--id", group=flags.DATA)] = None,
    subject: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    text: Annotated[list[str] | None, Parameter(group=flags.DATA)] = None,
    kind: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    quarantined: Annotated[bool, Parameter(group=flags.DATA, show_default=False)] = False,
    by: Annotated[Literal["meaning", "words"] | None, Parameter(group=flags.ASKED)] = None,
    count: Annotated[int, Parameter(group=flags.ASKED)] = 8,
    descendants: Annotated[
        Literal["delete", "quarantine"], Parameter(group=flags.METHOD)
    ] = "delete",
    dry_run: Annotated[bool, Parameter(group=flags.METHOD, show_default=False)] = False,
    words_only: Annotated[bool, Parameter(group=flags.RUN, show_default=False)] = False,
    encoder: Annotated[Path | None, Parameter(group=flags.RUN)] = None,
    out: flags.Out = None,
    as_json: flags.Json = False,
) -> int:
    """Fill a memory (cases, demonstrations, entries), search it, and make it forget.

    add FOLDER FILE… adds items and makes the memory. A row has a text, and may have an id, a kind
    (case, demonstration, entry, summary …), a key by which it is found, a subject, a source, data,
    and parents: the ids of the items that it was made from. Any records that delible reads are
    added, too. search FOLDER QUERY finds, list FOLDER lists.

    forget FOLDER --subject NAME (or --id, or --text) deletes what is named, items that say the
    same, and what was made from any of them; --dry-run shows all of it first. It writes a
    certificate: what went, what a scan of every file found, and what nobody can know. Nothing that
    matches is an error. What was deleted is not added again. certify FOLDER checks a memory as it
    is, and scans its files for each --text. Exit code 1: remains were found, or nothing is shown.

    Parameters
    ----------
    action
        add, search, list, forget or certify.
    folder
        The folder of the memory.
    words
        For add the files, for search the query.
    id_
        Id of an item. May be repeated.
    subject
        A name: items about it, and (forget) items in which it stands, in any spelling.
    text
        A text: items in which it stands, whatever its case and spaces. May be repeated.
    kind
        For search and list: only items of this kind.
    quarantined
        For list: what is quarantined.
    by
        For search: meaning or words. Default: meaning, if the memory has vectors.
    count
        For search: items at most.
    descendants
        What happens to what was made from it: delete, or quarantine (kept, and found by nobody).
    dry_run
        For forget: show what would go, and change nothing.
    words_only
        For add: make a memory that is searched by words alone. It needs no sentence encoder.
    encoder
        Folder of a sentence encoder; by default all-MiniLM-L6-v2.
    out
        The certificate. Default: FOLDER/certificates/NUMBER.json, with a page beside it.
    as_json
        Print JSON: items for search and list, the certificate for forget and certify.
    """
    given = {"--id": id_, "--subject": subject, "--text": text}
    _check(action, words, {name for name, value in given.items() if value}, dry_run, count)
    with output.Reporter(error=as_json) as reporter:
        from delible.memory import Memory

        if action == "add":
            return _add(reporter, folder, words or [], words_only, encoder)
        opened = Memory(folder, make_new=False)
        if action == "search":
            return _search(
                reporter, opened, " ".join(words or []), kind, by, count, encoder, as_json
            )
        if action == "list":
            found = opened.items(kind, subject, "quarantined" if quarantined else "active")
            found = [one for one in found if not id_ or one.id in id_]
            _show(reporter, [(one, "") for one in found], as_json, "item")
            return EXIT_DONE
        if action == "certify":
            certificate = opened.certify(text or [])
            name = f"memory-{len(opened.deletions())}"
            return _certified(reporter, opened, certificate, out, name, as_json)
        for one in text or []:
            opened.closure(text=one)  # each of them stands somewhere, or nothing is forgotten
        asked = {"ids": id_ or [], "subject": subject, "text": text or None}
        going = opened.closure(**asked)  # type: ignore[arg-type]
        if dry_run or not as_json:
            members = going.members.values()
            shown = [
                (one.item, f"{'goes' if one.root or descendants == 'delete' else 'is quarantined'}"
                 f": {one.why}") for one in members
            ]  # fmt: skip
            _show(reporter, shown, as_json, "item")
        if dry_run:
            reporter.say("Nothing is changed. Without --dry-run all of this is done.")
            return EXIT_DONE
        deletion = opened.forget(descendants=descendants, **asked)  # type: ignore[arg-type]
        certificate = opened.certificate(deletion)
        name = str(len(opened.deletions()))
        return _certified(reporter, opened, certificate, out, name, as_json)


def _check(
    action: Action, words: list[str] | None, named: set[str], dry_run: bool, count: int
) -> None:
    where = f"delible memory {action}"
    if action in ("add", "search") and not words:
        what = "a file" if action == "add" else "a query"
        raise RecipeError(f"{what} is missing.", where=where, hint=f"Write: {where} FOLDER WORD")
    if action not in ("add", "search") and words:
        raise RecipeError(f"'{words[0]}' is one word too many.", where=where)
    if action == "forget" and len(named) != 1:
        raise RecipeError(
            "what to forget is named in one way." if named else "nothing is named.",
            where=where,
            hint="Give one of --subject NAME, --id ID and --text TEXT.",
        )
    if dry_run and action != "forget":
        raise RecipeError("only forget has a --dry-run.", where=where)
    if count < 1:
        raise RecipeError("--count is at least 1.", where=where)


def _add(
    reporter: output.Reporter, folder: Path, files: list[str], words_only: bool,
    encoder: Path | None,
) -> int:  # fmt: skip
    from delible.memory import Memory
    from delible.memory.reading import read_items

    items = [item for file in files for item in read_items(file)]
    known = (folder / "memory.db").exists() and Memory(folder, make_new=False).encoder_identity
    searched_by_words = words_only if not known else known == "none"
    opened = Memory(folder, None if searched_by_words else _encoder(encoder))
    opened.add(items)
    reporter.say(f"{folder}: {output.plural(len(items), 'item')} added, {len(opened):,} in all.")
    return EXIT_DONE


def _encoder(folder: Path | None) -> Any:
    output.quiet_libraries()
    from delible.lm.encoder import sentence_encoder

    return sentence_encoder(folder)


def _search(
    reporter: output.Reporter, opened: Memory, query: str, kind: str | None,
    by: Literal["meaning", "words"] | None, count: int, encoder: Path | None, as_json: bool,
) -> int:  # fmt: skip
    from delible.memory import Memory

    if by == "words" or (by is None and opened.encoder_identity in ("", "none")):
        found = opened.search_words(query, count, kind)
    else:
        found = Memory(opened.folder, _encoder(encoder)).search(query, count, kind)
    _show(reporter, [(one.item, f"{one.score:.3f}") for one in found], as_json, "item")
    return EXIT_DONE


def _show(reporter: output.Reporter, rows: list[Any], as_json: bool, noun: str) -> None:
    """Items as a table, or as lines of JSON."""
    if as_json:
        for item, note in rows:
            told = {**item.model_dump(mode="json"), **({"note": note} if note else {})}
            print(json.dumps(told, ensure_ascii=False))
        return
    if rows:
        shown = [
            (item.id, item.kind, " ".join(item.text.split())[:WIDTH], note)
            for item, note in rows[:SHOWN]
        ]
        reporter.console.print(output.table(("id", "kind", "text", ""), shown))
    more = f" The first {SHOWN} are shown; --json prints all." if len(rows) > SHOWN else ""
    reporter.say(f"{output.plural(len(rows), noun)}.{more}")


def _certified(
    reporter: output.Reporter, opened: Memory, certificate: Certificate, out: Path | None,
    name: str, as_json: bool,
) -> int:  # fmt: skip
    from delible.report.memory_certificate import TITLES, write_certificate

    path = out or opened.folder / FOLDER_OF_CERTIFICATES / f"{name}.json"
    page = write_certificate(path, certificate)
    if as_json:
        print(certificate.model_dump_json())
    removed = sum(certificate.deletion["removed_by_kind"].values())
    if certificate.of == "deletion":
        reporter.say(f"{output.plural(removed, 'item')} removed, {len(opened):,} left.")
    reporter.say(f"{TITLES[certificate.verdict]}. {' '.join(certificate.reasons)}")
    for stale in certificate.stale:
        reporter.say(f"'{stale}' was trained on what went: retrain or drop it.")
    reporter.say(f"The certificate, with what it does not say: {page}")
    return EXIT_DONE if certificate.verdict == "nothing found" else EXIT_THRESHOLD_FAILED
