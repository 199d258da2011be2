"""What an error tells people to do can be done: no option that the command line does not have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import delible
from delible.cli.commands import PAGES
from delible.train.recipe import Training

SOURCES = Path(delible.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?![\w-])")


def told(source: Path) -> Iterator[str]:
    """Texts inside the calls that make errors, f-strings' fixed parts included."""
    for call in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Error"):
            for part in ast.walk(call):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


#: Options of other programs, which messages name with the program.
OF_OTHERS = {"--node-config"}  # flower-supernode


def test_every_option_that_an_error_names_exists() -> None:
    known = {option for page in PAGES.glob("*.txt") for option in OPTION.findall(page.read_text())}
    known |= {f"--{name.replace('_', '-')}" for name in Training.model_fields}
    assert {"--forget", "--learning-rate", "--out"} <= known
    named, unknown = set(), set()
    for source in SOURCES.rglob("*.py"):
        # an experiment is a folder: its options are those of all its files
        own_files = source.parent.glob("*.py") if "experiments" in source.parts else [source]
        code = "\n".join(file.read_text("utf-8") for file in own_files)
        fields = re.findall(r"^    (\w+): .*= Field\(", code, re.MULTILINE)
        own = {f"--{field.replace('_', '-')}" for field in fields}
        found = {option for text in told(source) for option in OPTION.findall(text)}
        named |= found
        unknown |= {(option, source.name) for option in found - known - own}
    assert len(named) > 20
    assert {one for one in unknown if one[0] not in OF_OTHERS} == set()


def test_what_only_python_can_do_is_told_as_such() -> None:
    """`pass x=True` helps nobody who typed a command."""
    for source in SOURCES.rglob("*.py"):
        for text in told(source):
            assert "Python" in text or not re.search(r"pass \w+=(True|False)", text), text
