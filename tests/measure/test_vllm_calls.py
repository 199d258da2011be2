"""Our calls of vLLM against its source: every argument and every attribute is there.

The source is read, not imported, so that a wheel for GPUs that is unpacked somewhere on the path is
enough. Read so far: 0.32.0 (for processors) and 0.33.0 (for CUDA).
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import vllm_stand_in


@pytest.fixture(scope="module")
def source() -> Path:
    found = find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not here")
    return Path(found.origin).parent


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def class_of(path: Path, name: str) -> ast.ClassDef:
    return next(
        node
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and node.name == name
    )


def fields(path: Path, name: str) -> set[str]:
    """Annotated attributes of a class."""
    return {
        node.target.id
        for node in class_of(path, name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def arguments(path: Path, name: str, method: str) -> list[str]:
    """Names of a method's arguments, ``self`` left out; the last such method counts."""
    found = [
        node
        for node in class_of(path, name).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == method
    ][-1]
    return [one.arg for one in (*found.args.args, *found.args.kwonlyargs)][1:]


def passed(stand_in: type) -> set[str]:
    """What our calls give; the stand-in takes nothing else."""
    return {name for name in stand_in.__dataclass_fields__ if name != "asked"}  # type: ignore[attr-defined]


def test_the_engines_take_our_arguments(source: Path) -> None:
    engine = fields(source / "engine" / "arg_utils.py", "EngineArgs")
    assert passed(vllm_stand_in.Engine) <= engine
    own = set(arguments(source / "entrypoints" / "llm.py", "LLM", "__init__"))
    kept = {"load_format", "max_model_len", "generation_config"}  # handed to EngineArgs
    assert passed(vllm_stand_in.Engine) - kept <= own
    assert passed(vllm_stand_in.AsyncEngineArgs) - {"disable_log_stats"} <= engine
    assert "disable_log_stats" in engine
    bases = class_of(source / "engine" / "arg_utils.py", "AsyncEngineArgs").bases
    assert [base.id for base in bases if isinstance(base, ast.Name)] == ["EngineArgs"]


def test_answers_are_asked_for_as_it_takes_them(source: Path) -> None:
    assert passed(vllm_stand_in.SamplingParams) <= fields(
        source / "sampling_params.py", "SamplingParams"
    )
    kind = class_of(source / "sampling_params.py", "RequestOutputKind")
    assert "DELTA" in ast.unparse(kind)
    asked = arguments(source / "entrypoints" / "llm.py", "LLM", "generate")
    assert asked[:2] == ["prompts", "sampling_params"]
    assert "use_tqdm" in asked
    served = arguments(source / "v1" / "engine" / "async_llm.py", "AsyncLLM", "generate")
    assert served[:3] == ["prompt", "sampling_params", "request_id"]
    for method in ("from_engine_args", "shutdown"):
        arguments(source / "v1" / "engine" / "async_llm.py", "AsyncLLM", method)
    alias = (source / "engine" / "async_llm_engine.py").read_text(encoding="utf-8")
    assert "AsyncLLMEngine = AsyncLLM" in alias


def test_answers_have_what_is_read_of_them(source: Path) -> None:
    assert {"text", "token_ids", "finish_reason"} <= fields(
        source / "outputs.py", "CompletionOutput"
    )
    whole = arguments(source / "outputs.py", "RequestOutput", "__init__")
    assert {"outputs", "prompt_logprobs"} <= set(whole)
    assert {"logprob", "rank"} <= fields(source / "logprobs.py", "Logprob")
    names = (source / "__init__.py").read_text(encoding="utf-8")
    for name in ("LLM", "SamplingParams", "AsyncLLMEngine", "AsyncEngineArgs"):
        assert f'"{name}"' in names
