"""What is imported when: the help, the lists and the public names cost nothing heavy."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from delible.cli.app import app_of
from delible.cli.commands import COMMANDS

HEAVY = (
    "torch", "transformers", "numpy", "pyarrow", "vl_convert", "fastapi", "starlette", "uvicorn",
    "prometheus_client", "httpx2", "cryptography",
)  # fmt: skip
LOOK = "import sys, json; print(json.dumps([m for m in sys.argv[1:] if m in sys.modules]))"


@pytest.mark.parametrize(
    ("words", "light"),
    [
        (["--help"], ("pydantic", "yaml")),
        (["unlearn", "--help"], ("pydantic", "yaml")),
        (["audit", "-h"], ("pydantic", "yaml")),
        (["serve", "--help"], ("pydantic", "yaml")),
        (["request", "--help"], ("pydantic", "yaml")),
        (["request", "apply", "--help"], ("pydantic", "yaml")),
        (["list"], ()),
        (["list", "methods", "--json"], ()),
    ],
)
def test_help_and_lists_import_nothing_heavy(process: Any, words: list[str], light: Any) -> None:
    code = (
        "import sys, contextlib, io\n"
        "from delible.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()) as said: code = main({words!r})\n"
        "assert code == 0 and said.getvalue(), code\n"
    )
    done = process(*HEAVY, *light, code=code + LOOK)
    assert done.code == 0, done.err
    assert json.loads(done.out) == []


def test_import_delible_imports_nothing_else(process: Any) -> None:
    done = process("torch", "pydantic", "rich", "cyclopts", code="import delible\n" + LOOK)
    assert json.loads(done.out) == []


def test_public_names() -> None:
    import delible

    assert set(delible.__all__) <= set(dir(delible))
    for name in delible.__all__:
        if name not in ("audit", "__version__"):
            assert getattr(delible, name).__module__.startswith("delible"), name
    assert delible.ForgetRequest(subjects=["A"]).subjects == ("A",)
    assert isinstance(delible.__version__, str)
    with pytest.raises(AttributeError, match="attribute forgetful"):
        delible.forgetful  # noqa: B018


def test_audit_is_a_package_and_a_function(process: Any) -> None:
    code = (
        "import delible\n"
        "{first}\n"
        "import sys, types\n"
        "stand_in = types.ModuleType('delible.audit.run')\n"
        "stand_in.audit = lambda *args, **kwargs: (args, kwargs)\n"
        "sys.modules['delible.audit.run'] = stand_in\n"
        "from delible import audit\n"
        "assert audit is delible.audit\n"
        "assert delible.audit('runs/x', 3, seed=1) == (('runs/x', 3), {{'seed': 1}})\n"
        "import delible.audit.result as result\n"
        "assert result.AuditResult.__name__ == 'AuditResult'\n"
    )
    for first in ("", "import delible.audit.result"):
        done = process(code=code.format(first=first))
        assert done.code == 0, done.err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_sentence_about_a_command_is_its_docstring(name: str, process: Any) -> None:
    place, usage, sentence, example = COMMANDS[name]
    module, _, function = place.partition(":")
    found = getattr(importlib.import_module(module), function)
    assert (found.__doc__ or "").partition("\n")[0] == sentence
    assert usage.endswith("[OPTIONS]")
    assert f"delible {name}" in example
    described = (found.__doc__ or "").partition("Parameters\n")[2]
    for argument in app_of(name).assemble_argument_collection():
        parameter = argument.field_info.name
        assert f"\n{parameter}\n" in described, f"{name} does not describe {parameter}"


def test_help_wins_over_everything_else(run: Any) -> None:
    done = run("unlearn", "--nonsense", "--help")
    assert (done.code, done.err) == (0, "")
    assert "--learning-rate" in done.out
    assert "Traceback" not in done.out


def test_no_words_print_the_help_and_version_prints_a_version(run: Any) -> None:
    assert "unlearn" in run().out
    version = run("--version")
    assert version.code == 0
    assert version.out.strip()
