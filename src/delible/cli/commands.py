"""The table of commands. Nothing is imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: The pages of --help, and their width.
PAGES = Path(__file__).parent / "help"
PAGE_WIDTH = 80

#: Groups of commands -> what they are about.
GROUPS = {"request": "Keep the ledger of requests to forget: enter, carry out, certify them."}

#: Command -> where it lives, what it takes, what it does, and examples. A test compares the
#: sentences with the docstrings.
COMMANDS = {
    "demo": (
        "delible.cli.demo:demo",
        "[OPTIONS]",
        "Teach a small model a made-up world, make it forget two people, and attack the result.",
        "Example: delible demo --people 10",
    ),
    "unlearn": (
        "delible.cli.unlearn:unlearn",
        "MODEL --forget FILE [OPTIONS]",
        "Make a model forget, and keep the rest.",
        "Examples:\n"
        "  delible unlearn default --forget forget.jsonl --retain retain.jsonl --beta 0.2\n"
        "  delible unlearn default --forget forget.jsonl --strength gentle --dry-run",
    ),
    "tune": (
        "delible.cli.tune:tune",
        "MODEL --forget FILE [OPTIONS]",
        "Search a method's options for the least leak that keeps the utility.",
        "Example:\n  delible tune default --forget forget.jsonl --retain retain.jsonl --method npo",
    ),
    "audit": (
        "delible.cli.audit:audit",
        "TARGET [OPTIONS]",
        "See how deep the forgetting goes.",
        "Example:\n  delible audit runs/mine --reference RETRAINED --attacks relearn,quantize",
    ),
    "bench": (
        "delible.cli.bench:bench",
        "SUITE [OPTIONS]",
        "Run methods through a benchmark of the field and write the leaderboard.",
        "Examples:\n"
        "  delible bench world --model tiny --methods npo,rmu --seeds 3\n"
        "  delible bench tofu --split forget01 --authors 20 --methods npo --data tofu/",
    ),
    "serve": (
        "delible.cli.serve:serve",
        "[TARGET] [OPTIONS]",
        "Serve a model, a run or a server's model to OpenAI clients, behind guards.",
        "Examples:\n"
        "  delible serve runs/mine --port 8000\n"
        "  delible serve https://host/v1 --guard target_detector --subjects 'Ada Brook'",
    ),
    "chat": (
        "delible.cli.chat:chat",
        "[TARGET] [OPTIONS]",
        "Talk to a model, a run or a server's model.",
        "Example: delible chat runs/mine",
    ),
    "report": (
        "delible.cli.report:report",
        "DIR… [OPTIONS]",
        "Write the report of a run, or compare several runs on one page.",
        "Example: delible report runs/a runs/b",
    ),
    "merge": (
        "delible.cli.artefact:merge",
        "DIR --out FOLDER [OPTIONS]",
        "Write one plain model of a run and all that it stands on.",
        "Example: delible merge runs/mine --out models/mine",
    ),
    "undo": (
        "delible.cli.artefact:undo",
        "DIR [OPTIONS]",
        "Take off what a run made: it answers as the model before, bit by bit.",
        "Example: delible undo runs/mine",
    ),
    "cache": (
        "delible.cli.cache:cache",
        "[list | size | clear] [OPTIONS]",
        "See what is kept between runs, how large it is, and clear it.",
        "Example: delible cache clear --collection answers --older-than 30",
    ),
    "memory": (
        "delible.cli.memory:memory",
        "ACTION FOLDER [WORDS…] [OPTIONS]",
        "Fill a memory (cases, demonstrations, entries), search it, and make it forget.",
        "Examples:\n"
        "  delible memory add notes items.jsonl\n"
        "  delible memory forget notes --subject 'Ada Brook' --dry-run",
    ),
    "targets": (
        "delible.cli.targets:targets",
        "ACTION [FILE] [OPTIONS]",
        "Make the file of targets that guards go by, or check one.",
        "Examples:\n"
        "  delible targets make --forget forget.jsonl --out targets.yaml\n"
        "  delible targets check targets.yaml",
    ),
    "request add": (
        "delible.cli.request:add",
        "[FILE] [OPTIONS]",
        "Enter requests to forget: from a file, from flags, or one in a dialogue.",
        "Examples:\n"
        "  delible request add requests.csv --model default\n"
        "  delible request add --model default --subjects 'Ada Brook' --basis erasure",
    ),
    "request list": (
        "delible.cli.request:list_",
        "[OPTIONS]",
        "List the requests by deadline, with how far each is.",
        "Example: delible request list --model default",
    ),
    "request show": (
        "delible.cli.request:show",
        "ID [OPTIONS]",
        "Show a request and its history; what is to be forgotten only with --show.",
        "Example: delible request show r-0001",
    ),
    "request apply": (
        "delible.cli.request_work:apply",
        "MODEL [OPTIONS]",
        "Carry out the open requests of a model, by a policy, one on the result of the other.",
        "Example: delible request apply default --policy policy.yaml",
    ),
    "request check": (
        "delible.cli.request_work:check",
        "MODEL --system SYSTEM [OPTIONS]",
        "Ask a system what was forgotten: after a new base, a merge, a quantization.",
        "Example: delible request check default --system models/merged-4bit.gguf --depth quick",
    ),
    "request certify": (
        "delible.cli.request_work:certify",
        "ID [OPTIONS]",
        "Write what was asked, done, tested and not tested: a page, and a signed statement.",
        "Example: delible request certify r-0001 --out certificates",
    ),
    "request withdraw": (
        "delible.cli.request:withdraw",
        "ID [OPTIONS]",
        "Take a request back and erase its texts; the hashes stay.",
        "Example: delible request withdraw r-0001",
    ),
    "request export": (
        "delible.cli.request_file:export",
        "FILE [OPTIONS]",
        "Write the whole ledger as JSON, signed where there is a key.",
        "Example: delible request export ledger.json",
    ),
    "request import": (
        "delible.cli.request_file:import_",
        "FILE [OPTIONS]",
        "Read an export into a ledger, a new one or one that it goes on from.",
        "Example: delible request import ledger.json --ledger copy.sqlite",
    ),
    "request key": (
        "delible.cli.request_file:key",
        "[OPTIONS]",
        "Make the key that signs certificates and exports.",
        "Example: delible request key",
    ),
    "verify": (
        "delible.cli.verify:verify",
        "FILE [OPTIONS]",
        "See whether a certificate, an export or a ledger is what it was; needs no model.",
        "Examples:\n"
        "  delible verify r-0001.json --key owner.pub\n"
        "  delible verify ledger.json --key owner.pub --against earlier.json",
    ),
    "list": (
        "delible.cli.listing:list_",
        "[KIND] [OPTIONS]",
        "List methods, guards, attacks, metrics and components.",
        "Example: delible list methods",
    ),
    "show": (
        "delible.cli.listing:show",
        "NAME [OPTIONS]",
        "Show what a component is, how far to trust it, and its options.",
        "Example: delible show npo",
    ),
}


def command_of(words: Sequence[str]) -> str:
    """The command, or the group of commands, that a command line names."""
    first = words[0] if words else ""
    both = " ".join(words[:2])
    return both if first in GROUPS and both in COMMANDS else first


def page_of(name: str) -> Path:
    """Where the page of --help lies."""
    return PAGES / f"{name.replace(' ', '-')}.txt"
