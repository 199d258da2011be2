"""The table of commands. Nothing is imported for it."""

from __future__ import annotations

from pathlib import Path

#: The pages of --help, and their width.
PAGES = Path(__file__).parent / "help"
PAGE_WIDTH = 80

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
