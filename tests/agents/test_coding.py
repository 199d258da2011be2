"""Programs against hidden tests: statuses, calls, scripted attempts, what a verifier sees."""

import json

import pytest

from delible.acting import coding, sandbox
from delible.acting.coding import (
    REMINDER,
    Attempt,
    Call,
    Effort,
    Hidden,
    HiddenTests,
    Verdict,
    attempted,
    calibrated,
    judged,
    read_call,
    status_of,
    verifier_prompt,
    without_solution,
)
from delible.acting.sandbox import Limits, Ran
from delible.errors import RunError
from delible.system.asks import NoAnswer
from delible.system.role import Role
from delible.systems.scripted import Scripted

REASON = sandbox.why_not()
confines = pytest.mark.skipif(REASON is not None, reason=f"not confined here: {REASON}")

READ = "print(solve(int(input())))"
DOUBLE = HiddenTests(
    (Hidden("1\n", "2\n"), Hidden("21\n", "42\n")), after=READ, limits=Limits(seconds=1)
)
RIGHT = "def solve(n):\n    return n + n"


def handed_in(code: str) -> str:
    return f"Here it is.\n```python submit_final_answer\n{code}\n```"


# ---- statuses


@confines
def test_statuses_are_told_apart():
    found = {
        name: judged(code, DOUBLE).status
        for name, code in {
            "right": RIGHT,
            "wrong": "def solve(n):\n    return n + 1",
            "slow": "def solve(n):\n    while True: pass",
            "silent": "print = lambda *given: None\ndef solve(n):\n    return 2 * n",
            "broken": "def solve(n):\n    return 1 / 0",
            "spy": "def solve(n):\n    return open('/etc/passwd').read()",
            "big": "def solve(n):\n    return bytearray(10**10)",
            "loud": "def solve(n):\n    return 'x' * 10**6",
        }.items()
    }
    assert found == {
        "right": "accepted", "wrong": "wrong output", "slow": "too slow", "silent": "no output",
        "broken": "raised an error", "spy": "forbidden", "big": "too much memory",
        "loud": "too much output",
    }  # fmt: skip


def test_outputs_are_compared_without_spaces_at_the_ends_of_lines():
    def status(said: str, wanted: str) -> str:
        return status_of(Ran("finished", said, "", 0.0), wanted)

    assert status("1 2 \n3\n\n", "1 2\n3") == "accepted"
    assert status("1  2\n3", "1 2\n3") == "wrong output"
    assert status("1 2\n\n3", "1 2\n3") == "wrong output"
    assert status(" \n", "1") == "no output"
    assert status_of(Ran("crashed", "1", "", 0.0), "1") == "crashed"


@confines
def test_the_first_failing_test_ends_it_and_all_before_count():
    only_one = judged("def solve(n):\n    return 2", DOUBLE)
    assert (only_one.status, only_one.passed) == ("wrong output", 1)
    assert judged(RIGHT, DOUBLE).passed == 2


@confines
def test_no_process_holds_what_is_wanted_or_another_tests_input():
    secret = HiddenTests((Hidden("5\n", "271828\n"), Hidden("6\n", "314159\n")), after=READ)
    look = """
def solve(n):
    import gc, sys
    held = [one for one in gc.get_objects() if isinstance(one, dict)]
    texts = [str(value) for one in held for value in list(one.values()) if isinstance(value, str)]
    texts += [open(sys.argv[0]).read(), sys.stdin.read()]
    words = [word[::-1] for word in ("828172", "951413")]  # not written down here
    return [word for word in words if any(word in one for one in texts)] == []
"""
    ran = sandbox.run(secret.program(look), "5\n")
    assert ran.output == "True\n", ran
    assert "271828" not in repr(secret)


@confines
def test_outputs_and_the_time_limit_come_from_the_reference():
    found = calibrated(RIGHT, ["3\n", "4\n"], HiddenTests((), after=READ))
    assert [one.wanted for one in found.cases] == ["6\n", "8\n"]
    assert 0.5 < found.limits.seconds < 5
    with pytest.raises(RunError, match="reference solution fails"):
        calibrated("def solve(n):\n    return 1 / 0", ["3\n"], HiddenTests((), after=READ))


@confines
def test_the_limit_grows_with_what_the_reference_takes(monkeypatch):
    spent = {"": [0.04, 0.05], "3\n": [0.64], "4\n": [0.24]}
    monkeypatch.setattr(
        sandbox, "run",
        lambda program, given="", limits=None: Ran("finished", "1\n", "", spent[given].pop(0)),
    )  # fmt: skip
    found = calibrated(RIGHT, ["3\n", "4\n"], HiddenTests((), after=READ))
    assert found.limits.seconds == pytest.approx(0.04 + 8 * 0.60)


# ---- calls


def test_calls_are_read_from_blocks_and_json():
    assert read_call("no call") is None
    assert read_call(handed_in("x = 1")) == Call("submit_final_answer", "x = 1")
    tried = "```python execute_python_code\nprint(input())\n```\n```input\n5\n```"
    assert read_call(tried) == Call("execute_python_code", "print(input())", "5\n")
    assert read_call(f"```python\n{RIGHT}\n```") == Call("submit_final_answer", RIGHT)
    assert read_call("```python\nprint(1)\n```") is None  # an example, not a solution
    assert read_call("```text\ndef solve(): pass\n```") is None
    written = json.dumps({"tool": "submit_final_answer", "arguments": {"code": RIGHT}})
    assert read_call(f"I call: {written}") == Call("submit_final_answer", RIGHT)
    written = json.dumps({"tool": "execute_python_code", "arguments": {"code": "1", "input": "2"}})
    assert read_call(written) == Call("execute_python_code", "1", "2")
    assert read_call('{"tool": "submit_final_answer", "arguments": {"code": 5}}') is None
    assert read_call('{"tool": "rm", "arguments": {"code": "x"}}') is None


def test_the_last_call_counts_and_a_cut_block_is_read_to_its_end():
    both = handed_in("x = 1") + "\n" + handed_in("x = 2")
    assert read_call(both) == Call("submit_final_answer", "x = 2")
    assert read_call("```python submit_final_answer\nx = 3") == Call("submit_final_answer", "x = 3")


# ---- attempts


def attempts(*names: str) -> list[Attempt]:
    return [Attempt(one, f"Double it ({one}).", DOUBLE, RIGHT) for one in names]


@confines
def test_an_attempt_tries_fails_is_told_why_and_is_accepted():
    system = Scripted([
        "Let me think.",
        "```python execute_python_code\nprint(int(input()) + 1)\n```\n```input\n41\n```",
        handed_in("def solve(n):\n    return n + 1"),
        handed_in(RIGHT),
        "never asked",
    ])  # fmt: skip
    (one,) = attempts("a")
    attempted(system, [one], Effort(temperature=0.0))
    assert (one.solved, one.ended, one.replies) == (True, "accepted", 4)
    assert (one.reminded, one.tried, len(one.verdicts)) == (1, 1, 2)
    told = [turn.text for turn in one.turns if turn.role == "user"]
    assert told[0] == "Double it (a)."
    assert told[1] == REMINDER
    assert "42" in told[2]
    assert told[3] == "Not accepted: a hidden test: wrong output."
    assert all("42" not in text and "21" not in text for text in told[3:])
    assert system.calls == 4


@confines
def test_attempts_go_side_by_side_in_one_batch_and_end_each_for_itself():
    def say(prompt):
        if "(b)" in prompt.messages[1].text:
            return handed_in(RIGHT)
        return NoAnswer("too long") if "(c)" in prompt.messages[1].text else "hm"

    system = Scripted(say)
    one, two, three = attempts("a", "b", "c")
    attempted(system, [one, two, three], Effort(turns=3, temperature=0.0))
    assert [each.ended for each in (one, two, three)] == [
        "nothing handed in", "accepted", "no answer",
    ]  # fmt: skip
    assert [each.replies for each in (one, two, three)] == [3, 1, 0]
    assert system.calls == 3
    assert len(system.prompts) == 3 + 1 + 1
    assert one.repeated == pytest.approx(2 / 3)
    assert two.repeated == 0
    assert three.repeated is None


@confines
def test_the_conversation_is_bounded_and_keeps_problem_and_newest_turns():
    system = Scripted(lambda prompt: "x" * 400)
    (one,) = attempts("a")
    attempted(system, [one], Effort(turns=8, context_letters=2500, temperature=0.0))
    last = system.prompts[-1].messages
    assert sum(len(turn.text) for turn in last) <= 2500
    assert last[1].text == "Double it (a)."
    assert last[-1].text == REMINDER


@confines
def test_draws_differ_from_turn_to_turn_and_by_seed():
    seeds = []

    class Watching(Scripted):
        def generate(self, prompts, decoding):
            seeds.append(decoding.seed)
            return super().generate(prompts, decoding)

    for seed in (0, 1):
        attempted(Watching(lambda prompt: "hm"), attempts("a"), Effort(turns=3), seed=seed)
    assert len(set(seeds)) == 6


@confines
def test_a_script_gives_the_same_transcript_twice():
    def transcript() -> list[str]:
        lines = [
            "hm", handed_in("def solve(n):\n    return sorted({'a', 'b'}) / n"),
            "```python execute_python_code\nprint({'q', 'r', 's'})\n```", handed_in(RIGHT),
        ]  # fmt: skip
        (one,) = attempts("a")
        attempted(Scripted(lines), [one], Effort(temperature=0.0))
        return [turn.text for turn in one.turns]

    assert transcript() == transcript()


def test_nothing_is_handed_in_where_programs_cannot_be_confined(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "no Landlock")
    with pytest.raises(RunError, match="no Landlock"):
        attempted(Scripted([handed_in(RIGHT)]), attempts("a"), Effort(temperature=0.0))


# ---- the verifier


@confines
def test_a_verifier_explains_and_never_gives_the_solution_away():
    words = [
        "It adds one where the number had to be added to itself.",
        "Try this: ```python\ndef solve(n): return n + n\n```",
        "You want: solve ( n ) : return n + n instead.",
    ]
    judge = Scripted(words)
    system = Scripted([handed_in("def solve(n):\n    return n + 1")] * 3)
    (one,) = attempts("a")
    attempted(system, [one], Effort(turns=3, temperature=0.0), verifier=Role("critic", judge))
    told = [turn.text for turn in one.turns if turn.role == "user"][1:]
    assert told[0].endswith(words[0])
    assert told[1:] == ["Not accepted: a hidden test: wrong output."] * 2
    assert one.withheld == 2
    asked = "\n".join(prompt.messages[-1].text for prompt in judge.prompts)
    assert "return n + 1" in asked
    assert "n + n" not in asked  # it never sees the reference
    assert not {"42", "21\n"} & set(asked.split("The program:")[0].split())


def test_what_gives_a_solution_away():
    reference = "def solve(a, b):\n    while b:\n        a, b = b, a % b\n    return a"
    assert without_solution("It loops for ever if b is zero.", reference)
    assert without_solution("Set a, b = b, a % b while b holds.", reference) is None
    assert without_solution("Write def solve(x): ...", reference) is None
    assert without_solution("```\nx\n```", reference) is None
    assert without_solution("  ", reference) is None


def test_a_verifier_is_asked_with_problem_status_and_code_alone():
    verdict = Verdict("raised an error", 3, 0.1, "Traceback\nZeroDivisionError: division by zero")
    text = verifier_prompt("Halve {code}.", verdict, "x = '{status}'").messages[-1].text
    assert "ZeroDivisionError: division by zero" in text
    assert "Halve {code}." in text  # braces of the problem, and of the program, stay
    assert text.index("Halve") < text.index("raised an error") < text.index("x = '{status}'")


def test_a_verifier_that_fails_leaves_the_status():
    judge = Role("critic", Scripted(lambda prompt: NoAnswer("down")))
    (one,) = attempts("a")
    one.verdicts.append(Verdict("wrong output", 0, 0.0))
    coding._explained([(one, Call("submit_final_answer", "x"))], judge)
    assert one.turns[-1].text == "Not accepted: a hidden test: wrong output."
    assert one.withheld == 0
