"""Mutations that must turn a test red: `python tests/mutations/run.py [NAME …] [--list]`.

`mutations.yaml` names small changes of the source (a flipped sign, a dropped mask, a constant
instead of a measurement) and the tests that must notice each. Every change is made in a copy of
the source; the tests run against the copy, after they have passed against the source itself. A
mutation that no test notices is a test that cannot fail: exit code 1. Takes some seconds to
minutes per mutation, so it is run weekly or by hand, not on every change.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).parent / "mutations.yaml"
#: A run of tests that takes longer has noticed nothing.
TIMEOUT_SECONDS = 900
#: Pytest's exit code when tests failed, and when there were none.
FAILED, NOTHING_RUN = 1, 5


@dataclass(frozen=True)
class Mutation:
    """One change and who must notice it.

    Attributes:
        file: Path below ``src/delible``.
        find: Text that stands there exactly once; ``replace`` takes its place.
        tests: Arguments of pytest.
    """

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


def read(path: Path = LIST) -> list[Mutation]:
    """All mutations.

    Raises:
        ValueError: One does not fit the source (its text is not there exactly once), or two have
            one name.
    """
    found = []
    text = path.read_text(encoding="utf-8")
    names = [one[:-1] for one in text.splitlines() if one.endswith(":") and not one.startswith(" ")]
    if twice := {name for name in names if names.count(name) > 1}:  # YAML keeps the last, silently
        raise ValueError(f"more than one mutation is named {', '.join(sorted(twice))}")
    for name, given in yaml.safe_load(text).items():
        tests = given["tests"]
        mutation = Mutation(
            name, given["file"], given["find"], given["replace"],
            tuple(shlex.split(tests) if isinstance(tests, str) else tests),
        )  # fmt: skip
        count = (ROOT / "src/delible" / mutation.file).read_text("utf-8").count(mutation.find)
        if count != 1:
            raise ValueError(f"{name}: its text stands {count} times in {mutation.file}, not once")
        found.append(mutation)
    return found


def mutate(source: Path, mutation: Mutation) -> None:
    """Makes the change in a copy of ``src``."""
    path = source / "delible" / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.find, mutation.replace), encoding="utf-8")


def test(source: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit code of the tests against a source, and the first that failed."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, capture_output=True,
            timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 0, f"no end after {TIMEOUT_SECONDS} s"
    failed = (line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    return done.returncode, next(failed, done.stderr[-200:].strip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutations to try; all if none is named")
    parser.add_argument("--list", action="store_true", help="only name them")
    given = parser.parse_args()
    mutations = [one for one in read() if not given.names or one.name in given.names]
    if unknown := set(given.names) - {one.name for one in mutations}:
        print(f"unknown: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(f"{one.name}  ({one.file})" for one in mutations))
        return 0
    survivors, passes = [], set[tuple[str, ...]]()
    for place, mutation in enumerate(mutations, 1):
        began = time.monotonic()
        if mutation.tests not in passes:
            code, line = test(ROOT / "src", mutation.tests)
            if code != 0:
                print(f"{mutation.name}: its tests fail without it. {line}", file=sys.stderr)
                return 2
            passes.add(mutation.tests)
        with tempfile.TemporaryDirectory(prefix="delible-mutation-") as folder:
            source = Path(folder) / "src"
            shutil.copytree(
                ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
            mutate(source, mutation)
            code, line = test(source, mutation.tests)
        caught = code not in (0, NOTHING_RUN)
        if not caught:
            survivors.append(mutation.name)
        print(
            f"{place}/{len(mutations)}  {'caught' if caught else 'SURVIVED'}  {mutation.name}  "
            f"({time.monotonic() - began:.0f} s)  {line}",
            flush=True,
        )
    if survivors:
        print(f"No test notices: {', '.join(survivors)}.")
        return 1
    print(f"Tests notice all {len(mutations)} mutations.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
