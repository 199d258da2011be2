"""The wheel where nothing is installed but what it needs: it works, and says what the rest needs.

Run by the Python of such an environment (``make installed``). Exit code 1: something is wrong.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
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
#: A model small enough to be made, changed and asked here, and records for it.
MAKE = """
import json, pathlib
from delible.testing.tiny import tiny_model, tiny_tokenizer
tiny_model("llama").save_pretrained("model")
tiny_tokenizer().save_pretrained("model")
for name in ("forget", "retain"):
    rows = [{"question": f"What is {name} {i}?", "answer": f"It is {i}."} for i in range(4)]
    pathlib.Path(f"{name}.jsonl").write_text("\\n".join(map(json.dumps, rows)))
"""
ASK = """
import delible
from delible.system.asks import Decoding, Prompt
(answer,) = delible.open("run").generate([Prompt.ask("What is it?")], Decoding(4))
assert isinstance(answer, str), answer
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in this folder, with what it wrote; stopped after five minutes."""
    print("$", *(str(part).strip().partition("\n")[0] for part in command[1:]), flush=True)
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL
    )


def must(told: str, *command: str | Path) -> None:
    """A command that succeeds and tells something."""
    done = run(*command)
    if done.returncode or told not in done.stdout + done.stderr:
        sys.exit(f"installed: that failed, or did not tell {told!r}:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Everything, in an empty folder with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        must("methods", DELIBLE, "--help")
        must("npo", DELIBLE, "list", "methods")
        must("arXiv", DELIBLE, "show", "npo")
        must("", sys.executable, "-c", MAKE)
        must("run", DELIBLE, "unlearn", "model", *RECORDS, "--max-steps", "2", "--out", "run")
        must("", sys.executable, "-c", ASK)
        for extra, (package, command) in EXTRAS.items():
            if importlib.util.find_spec(package):
                sys.exit(f"installed: {package} is here, so the environment is not an empty one.")
            done = run(DELIBLE, *command)
            told = done.stdout + done.stderr
            if done.returncode != 2 or f"pip install 'delible[{extra}]'" not in told:
                sys.exit(f"installed: without '{extra}' it told ({done.returncode}):\n{told}")
    print(f"installed: works, and tells what {len(EXTRAS)} extras are for")


if __name__ == "__main__":
    main()
