"""The wheel where nothing is installed but what it needs: it works, and says what the rest needs.

Run by the Python of such an environment (``make installed``). Exit code 1: something is wrong.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

DELIBLE = Path(sys.executable).with_name("delible")
RECORDS = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")
#: What each extra brings, and a command that cannot do without it.
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("datasets", ("unlearn", "model", "--forget", "hf:a/b", "--out", "data")),
    "gateway": ("fastapi", ("serve", "model", "--port", "0")),
    "ledger": ("cryptography", ("request", "key")),
    "ray": ("ray", ("bench", "world", "--model", "model", "--ray", "--out", "ray")),
    "rl": ("trl", ("unlearn", "model", *RECORDS, "--method", "rule", "--out", "rl")),
    "tune": ("optuna", ("tune", "model", *RECORDS, "--method", "npo", "--out", "tuned")),
    "utility": ("lm_eval", ("bench", "utility", "--model", "model", "--out", "utility")),
    "vision": ("PIL", ("chat", "tiny-vlm")),
    "vllm": ("vllm", ("chat", "vllm:model")),
}


def make() -> None:
    """A model small enough to be made, changed and asked here, and records for it."""
    from delible.testing.tiny import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    for name in ("forget", "retain"):
        rows = [{"question": f"What is {name} {i}?", "answer": f"It is {i}."} for i in range(4)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def told(*command: str) -> tuple[int, str]:
    """The exit code of a command, run in this process, and what it wrote."""
    from delible.cli import main

    print("$ delible", *command, flush=True)
    wrote = io.StringIO()
    with redirect_stdout(wrote), redirect_stderr(wrote):
        code = main(command)
    return code, wrote.getvalue()


def must(wanted: str, code: int, said: str, *, ends: int = 0) -> None:
    """Gives up unless a command ended as it should, and told something."""
    if code != ends or wanted not in said:
        sys.exit(f"installed: it ended with {code}, or did not tell {wanted!r}:\n{said}")


def work() -> None:
    """All of it, in this folder."""
    from delible import open as open_system
    from delible.system.asks import Decoding, Prompt

    alone = subprocess.run([DELIBLE, "--help"], capture_output=True, text=True, check=False)
    must("methods", alone.returncode, alone.stdout + alone.stderr)
    must("npo", *told("list", "methods"))
    must("arXiv", *told("show", "npo"))
    make()
    must("run", *told("unlearn", "model", *RECORDS, "--max-steps", "2", "--out", "run"))
    (answer,) = open_system("run").generate([Prompt.ask("What is it?")], Decoding(4))
    if not isinstance(answer, str):
        sys.exit(f"installed: the result does not answer ({answer.reason}).")
    for extra, (package, command) in EXTRAS.items():
        if importlib.util.find_spec(package):
            sys.exit(f"installed: {package} is here, so the environment is not an empty one.")
        must(f"pip install 'delible[{extra}]'", *told(*command), ends=2)
    print(f"installed: works, and tells what {len(EXTRAS)} extras are for")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        work()
