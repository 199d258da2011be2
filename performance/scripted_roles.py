"""Guards that consult others, with rules in their parts: rows for ``docs/results/guards.md``.

A model of 135 million weights gives no verdict that ALU could read, so that it refuses everything.
Here rules play the parts, as well as rules can: an auditor that goes by the targets' names and by
what is true of them alone, a writer that has nothing to tell, a critic that likes it. What a better
player would recognise without a name, these do not. The options are those of the run that they
stand beside, which is read for them.

Run: python performance/scripted_roles.py runs/guards runs/guards-scripted [--methods alu,aegisllm]
     python performance/guard_table.py runs/guards-scripted docs/results/guards.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from delible.component import build
from delible.experiments.guards.experiment import GuardsCompared
from delible.files import read_json
from delible.measure.benchmark import Benchmark, Data, Setting
from delible.measure.scoring.text import gold_answers
from delible.records import ForgetRequest
from delible.report.findings import write_findings
from delible.system.asks import Prompt
from delible.systems.scripted import Scripted
from delible.world import filters

NOTHING = "I have nothing to tell about that."
#: Behind a guard's name on the page.
PLAYED = "rules in its parts"


def marked(prompt: Prompt, tag: str) -> str:
    """The last text that a prompt shows between marks of a kind; empty without one."""
    shown = re.findall(rf"<({tag}-\w+)>\n(.*?)\n</\1>", prompt.messages[-1].text, re.DOTALL)
    return str(shown[-1][1]) if shown else ""


class Rules:
    """Rules for every part, by the names of those who are forgotten, and by what is true of them
    and of nobody who is kept."""

    def __init__(self, request: ForgetRequest) -> None:
        self.names = request.subjects
        kept = {
            gold for one in (*request.retain, *request.neighbours) for gold in gold_answers(one)
        }
        self.answers = [gold for one in request.forget for gold in gold_answers(one)
                        if gold not in kept]  # fmt: skip

    def named(self, text: str) -> list[str]:
        """The people whom a text names, in full or by a part of the name."""
        return [name for name in self.names
                if any(filters.says(text, one) for one in (name, *name.split()))]  # fmt: skip

    def tells(self, text: str) -> bool:
        """Whether a text names one of them or says one of the answers."""
        return bool(self.named(text)) or any(filters.says(text, one) for one in self.answers)

    def alu_guard(self, prompt: Prompt) -> str:
        """Whom an answer gives away."""
        return "; ".join(self.named(marked(prompt, "query") + " " + marked(prompt, "answer"))) or (
            "None"
        )

    def alu_writer(self, prompt: Prompt) -> str:
        """Five rewrites, or the one answer made of them."""
        if not marked(prompt, "answer"):
            return NOTHING
        return json.dumps({"response_list": [f"{NOTHING[:-1]} ({n})." for n in range(1, 6)]})

    def alu_critic(self, prompt: Prompt) -> str:
        """The best mark for each."""
        count = len(re.findall(r"^<candidate-\w+>$", prompt.messages[-1].text, re.MULTILINE))
        return json.dumps({"notes": [], "ratings": [5] * count})

    def aegisllm_guard(self, prompt: Prompt) -> str:
        """Whether a query is about them."""
        return self._verdict(self.tells(marked(prompt, "query")))

    def aegisllm_critic(self, prompt: Prompt) -> str:
        """Whether a response tells of them."""
        return self._verdict(self.tells(marked(prompt, "response")))

    @staticmethod
    def _verdict(unsafe: bool) -> str:
        return json.dumps({"reasoning": "a rule", "verdict": "unsafe" if unsafe else "safe"})


def players(guard: str, rules: Rules) -> dict[str, Scripted]:
    """Who plays the parts of a guard."""
    found = {}
    for part in ("guard", "writer", "critic"):
        rule: Callable[[Prompt], str] | None = getattr(rules, f"{guard}_{part}", None)
        if rule is not None:
            found[part] = Scripted(rule, name="a rule", fingerprint=f"{guard} {part} rule 1")
    return found


def request_of(experiment: GuardsCompared) -> ForgetRequest:
    """What the experiment's guards stand for."""
    world = cast(Benchmark, build("benchmark", {
        "name": "world", "people": experiment.people, "forget": experiment.forget,
        "world_seed": experiment.world_seed,
    }))  # fmt: skip
    return world.tasks(Data())[0].request


def run(beside: Path, folder: Path, methods: Sequence[str]) -> None:
    """Runs the guards as the run beside was run, and writes their rows under other names."""
    described = {key: read_json(beside / "experiment.json")[key]
                 for key in ("experiment", "model", "attacks")}  # fmt: skip
    experiment = cast(GuardsCompared, build("benchmark", described["experiment"]))
    rules, runs, notes = Rules(request_of(experiment)), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for name in methods:
        setting = Setting(
            described["model"], [name], 1, folder, Data(),
            lambda what, done, total: print(f"  {what} ({done} of {total})", flush=True),
            described["attacks"], players(name, rules),
        )  # fmt: skip
        found = experiment.run(setting)
        title = f"{name}, {PLAYED}"
        runs += [{**row, "guard": title} for row in found.runs if row["guard"] == name]
        notes += [note.replace(f"{name}:", f"{title}:") for note in found.notes
                  if note.startswith(f"{name}:")]  # fmt: skip
        found.runs[:], found.notes[:] = runs, notes
        write_findings(folder, experiment, found, {
            **described, "experiment": experiment.spec(), "methods": list(methods), "seeds": 1,
            "seconds": 0.0,
        })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("beside", type=Path, help="folder of the run that these rows join")
    parser.add_argument("folder", type=Path, help="where these rows go")
    parser.add_argument("--methods", default="alu,aegisllm", help="names separated by commas")
    given = parser.parse_args()
    run(given.beside, given.folder, given.methods.split(","))


if __name__ == "__main__":
    main()
