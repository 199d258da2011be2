"""``delible tune`` on a tiny random model: what is searched, what decides, what survives a kill."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from delible.errors import DataError, MissingExtraError, RecipeError, RunError
from delible.lm.lm import LM
from delible.ranges import Range
from delible.records import QA, ForgetRequest
from delible.report.tuning import render_search
from delible.resolving import resolve_method
from delible.rundir import RunDirectory
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.recipe import Recipe
from delible.tune import search, trying, tune, tuned_options
from delible.tune.measuring import ROWS, cut, leak, utility
from delible.tune.results import Trial, winner
from delible.tune.space import rounded, space
from delible.tune.study import JOURNAL, STARTUP

QUICK: dict[str, Any] = {"max_steps": 2, "batch_size": 4}


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between trials memory is given back, which takes longer than a tiny trial does."""
    monkeypatch.setattr("delible.tune.search.gc.collect", lambda: 0)


def rows(word: str, count: int) -> tuple[QA, ...]:
    return tuple(
        QA(question=f"{word} of {index}?", answer=f"{word} {index}.") for index in range(count)
    )


REQUEST = ForgetRequest(forget=rows("Town", 4), retain=rows("Job", 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tune") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def stand_in(monkeypatch: pytest.MonkeyPatch, score: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Replaces unlearning and measuring by a function of the options; returns the calls."""
    calls: list[Any] = []

    class Result:
        stopped = None

        def __init__(self, model: Any) -> None:
            self.system = model

    def unlearn(model: Any, request: Any, *, method: Any, **_: Any) -> Result:
        values = {
            "rate": method.recipe.training.learning_rate,
            "beta": method.recipe.objective.beta,
            "weight": method.recipe.balance.retain_weight,
        }
        calls.append(values)
        return Result(score(values))

    def measured(system: Any, splits: Any, progress: Any = None) -> dict[str, float]:
        left, kept = (0.8, 1.0) if isinstance(system, LM) else system
        return {
            "answer_probability/forget": left,
            "extraction_strength/forget": left,
            "answer_probability/retain": 0.5 * kept,
            "rouge_l_recall/retain": 0.4 * kept,
        }

    monkeypatch.setattr(trying, "unlearn", unlearn)
    for module in (search, trying):
        monkeypatch.setattr(module, "measured", measured)
    return calls


def trade(values: dict[str, Any]) -> tuple[float, float]:
    """The faster the training, the less is left of both; half of the utility goes by a decade."""
    decades = math.log10(values["rate"] / 2e-5)
    return 0.4 - 0.3 * decades, min(1.0, 0.99 - 0.3 * decades)


# ---- what is searched


def test_every_recipe_has_a_space_that_holds_its_own_values() -> None:
    from delible import registry

    for name in registry.recipe_files():
        method = resolve_method(name)
        found = space(method)
        adaptive = method.value("training.optimizer") == "adamw"  # or the balance is searched
        rate = "training.learning_rate" if adaptive else "balance.forget_norm"
        assert {rate, "training.epochs"} <= set(found), name
        for option, bounds in found.items():
            own = method.value(option)
            assert bounds.low <= own <= bounds.high, f"{name}: {option}"
        for end in ("low", "high"):  # both ends are allowed values
            method.with_options({
                option: type(method.value(option))(getattr(bounds, end))
                for option, bounds in found.items()
            })  # fmt: skip


def test_the_rule_of_the_space() -> None:
    npo = space(resolve_method("npo"))
    assert set(npo) == {
        "training.learning_rate", "training.epochs", "objective.beta", "balance.retain_weight",
    }  # fmt: skip
    rate = npo["training.learning_rate"]
    assert (rate.low, rate.high) == (pytest.approx(2e-6), pytest.approx(2e-4))
    assert rate.log
    assert npo["training.epochs"] == Range(low=5, high=20, log=True)
    assert npo["objective.beta"].high == pytest.approx(1.0)
    # no retain loss: its weight is nothing to search
    assert "balance.retain_weight" not in space(resolve_method("gradient_ascent"))
    # a depth is bounded, so it is no scale; the inactive constant is kept out by the recipe file
    rmu = space(resolve_method("rmu"))
    assert {one for one in rmu if one.startswith("objective")} == {"objective.adaptive"}
    assert set(space(resolve_method("rocr"))) == {"threshold", "rho"}
    short = resolve_method("npo", options={"max_steps": 1})
    assert space(short)["training.max_steps"] == Range(low=1, high=2, log=True)
    assert "training.epochs" not in space(short)


def test_held_options_are_left_out_and_holding_all_is_refused() -> None:
    npo = resolve_method("npo")
    assert not {"training.epochs", "training.max_steps"} & set(space(npo, ["epochs"]))
    assert "objective.beta" not in space(npo, ["npo.beta"])
    with pytest.raises(RecipeError, match="unknown option 'bet'"):
        space(npo, ["bet"])
    with pytest.raises(RecipeError, match="nothing to search"):
        space(npo, ["beta", "epochs", "learning_rate", "retain_weight"])
    with pytest.raises(RecipeError, match="nothing to search"):
        space(resolve_method("rocr"), ["threshold", "rho"])


def test_ranges_of_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = "objective: {name: npo, beta: 0.1}\nkeep: nll\ntune: {beta: [0.2, 0.4], epochs: null}\n"
    path.write_text(text)
    recipe = Recipe.from_file(path)
    assert recipe.tune == {"objective.beta": Range(low=0.2, high=0.4), "training.epochs": None}
    assert "tune" not in recipe.spec()
    found = space(resolve_method(recipe))
    assert "training.epochs" not in found
    assert found["objective.beta"] == Range(low=0.1, high=0.4)  # widened: the recipe's own value
    # they survive other options, and go with their component
    assert recipe.changed({}, {"learning_rate": 1e-4}).tune == recipe.tune
    assert recipe.changed({"objective": "rmu"}, {}).tune == {"training.epochs": None}


@pytest.mark.parametrize(
    ("tune_text", "said"),
    [
        ("{beta: 3}", "3 is no range"),
        ("{beta: [1, 2, sqrt]}", "is no range"),
        ("{beta: [2, 1]}", "2 is not below 1"),
        ("{beta: [0, 1, log]}", "starts above 0"),
        ("{beta: [low, 1]}", "'low' = 'low'"),
        ("{betta: [1, 2]}", "unknown option 'betta'. Did you mean 'beta'"),
        ("{schedule: [1, 2]}", "is no number"),
        ("[beta]", "'tune' is a mapping"),
    ],
)
def test_a_range_that_makes_no_sense_is_told(tmp_path: Path, tune_text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"objective: npo\ntune: {tune_text}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: tune") as caught:
        Recipe.from_file(path)
    assert said in str(caught.value)


def test_values_are_rounded_inside_their_range() -> None:
    bounds = Range(low=0.012345, high=0.99, log=True)
    assert rounded(0.123456, bounds) == 0.123
    assert rounded(0.0123451, bounds) == 0.012345
    assert rounded(0.9899, bounds) == 0.99
    assert rounded(7, Range(low=1, high=9)) == 7


# ---- what is measured


def test_the_cut_keeps_what_decides_apart_from_what_is_trained_on() -> None:
    parts = cut(REQUEST)
    assert parts.request.forget == REQUEST.forget
    trained = set(parts.request.retain)
    decides, aside = set(parts.splits["retain"]), set(parts.splits["retain (aside)"])
    assert len(trained) == 4
    assert len(decides) == len(aside) == 2
    assert len(trained | decides | aside) == 8
    assert trained | decides | aside == set(REQUEST.retain)
    assert set(parts.splits["forget"]).isdisjoint(parts.splits["forget (aside)"])
    assert parts.shared == ()
    one = cut(ForgetRequest(forget=rows("Town", 1), retain=rows("Job", 1)))
    assert one.shared == ("retain",)
    assert set(one.splits) == {"forget", "retain"}
    many = cut(ForgetRequest(forget=rows("Town", 300), neighbours=rows("Job", 9)))
    assert len(many.splits["forget"]) == ROWS
    assert "neighbours" in many.splits
    with pytest.raises(DataError, match="there are none"):
        cut(ForgetRequest(subjects=("A",), retain=rows("Job", 2)))


def test_leak_and_utility() -> None:
    means = {"answer_probability/forget": 0.4, "extraction_strength/forget": 0.2}
    assert leak(means) == pytest.approx(0.3)
    assert leak({**means, "paraphrase_probability/forget": 0.0}) == pytest.approx(0.2)
    assert leak({"answer_probability/forget": None}) is None
    before = {"answer_probability/retain": 0.5, "rouge_l_recall/retain": 0.8}
    after = {"answer_probability/retain": 0.25, "rouge_l_recall/retain": 0.9}
    assert utility(before, before) == 1
    assert utility(before, after) == pytest.approx(2 / (1 / 0.5 + 1))  # 0.9 / 0.8 is no credit
    assert utility(before, {**after, "rouge_l_recall/retain": None}) == 0
    assert utility({**before, "rouge_l_recall/retain": 0.0}, after) == pytest.approx(0.5)
    assert utility({}, after) is None


# ---- the search


def test_first_trial_is_the_recipe_and_the_winner_keeps_the_budget(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    stand_in(monkeypatch, trade)
    tried = []
    asked = trying.unlearn

    def noting(*args: Any, **options: Any) -> Any:
        tried.append(options["method"])
        return asked(*args, **options)

    monkeypatch.setattr(trying, "unlearn", noting)
    found = tune(model, REQUEST, trials=14, utility=0.9, out=tmp_path / "out")
    npo = Recipe.named("npo")
    assert tried[0].recipe == npo
    assert found.trials[0].options["training.learning_rate"] == npo.training.learning_rate
    assert [trial.index for trial in found.trials] == list(range(14))
    # the budget allows a third of a decade more than the recipe's own rate; beyond, less is left
    kept = [trial for trial in found.trials if trial.utility is not None and trial.utility >= 0.9]
    assert found.best.leak == min(trial.leak for trial in kept if trial.leak is not None)
    assert min(trial.leak or 0 for trial in found.trials) < found.best.leak
    assert found.within_budget
    assert found.best.index > 0
    # the sampler knows the constraint: after its start most proposals keep it, or nearly so
    later = [math.log10(t.options["training.learning_rate"] / 2e-5) for t in found.trials[4:]]
    assert sorted(later)[len(later) // 2] < 0.5

    loaded = Recipe.from_file(tmp_path / "out" / "recipe.yaml")
    assert loaded.spec() == {**npo.changed({}, found.best_options).spec(), "name": "npo_tuned"}
    page = render_search(found, RunDirectory(tmp_path / "out").manifest)
    assert "NPO with retain loss, tuned" in page
    assert page.count(">below the budget<") == 14 - len(kept)
    assert "recipe.yaml</code>" in page


def test_a_killed_search_goes_on_as_if_it_had_not_been(
    caplog: pytest.LogCaptureFixture, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    whole_calls = stand_in(monkeypatch, trade)
    whole = tune(model, REQUEST, trials=9, out=tmp_path / "whole")
    assert len(whole_calls) == 9

    left = [7]

    def dies(values: dict[str, Any]) -> tuple[float, float]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return trade(values)

    stand_in(monkeypatch, dies)
    with pytest.raises(KeyboardInterrupt):
        tune(model, REQUEST, trials=9, out=tmp_path / "cut")
    calls = stand_in(monkeypatch, trade)
    again = tune(model, REQUEST, trials=9, out=tmp_path / "cut")
    assert "Going on after 7 finished trials." in caplog.messages
    assert len(calls) == 2
    assert [trial.options for trial in again.trials] == [trial.options for trial in whole.trials]
    assert again.best_options == whole.best_options

    more = tune(model, REQUEST, trials=9, out=tmp_path / "cut")
    assert len(calls) == 2, "a finished search is only read"
    assert more.best == again.best
    assert len(tune(model, REQUEST, trials=10, out=tmp_path / "cut").trials) == 10
    with pytest.raises(RunError, match="different: utility"):
        tune(model, REQUEST, trials=9, utility=0.5, out=tmp_path / "cut")


@pytest.mark.parametrize("call", [1, 2])
def test_killed_at_the_worst_moment(
    call: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a result and its end."""
    optuna = pytest.importorskip("optuna")
    stand_in(monkeypatch, trade)
    whole = tune(model, REQUEST, trials=3)
    real, calls = optuna.study.Study.add_trial, [0]

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.study.Study, "add_trial", dies)
        with pytest.raises(KeyboardInterrupt):
            tune(model, REQUEST, trials=3, out=tmp_path / "out")
    again = tune(model, REQUEST, trials=3, out=tmp_path / "out")
    assert [trial.options for trial in again.trials] == [trial.options for trial in whole.trials]


def test_a_journal_of_an_earlier_version_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept what was under way, too: such trials are closed, and tried again."""
    optuna = pytest.importorskip("optuna")
    stand_in(monkeypatch, trade)
    whole = tune(model, REQUEST, trials=6)
    tune(model, REQUEST, trials=2, out=tmp_path / "out")
    journal = optuna.storages.journal
    storage = optuna.storages.JournalStorage(
        journal.JournalFileBackend(str(tmp_path / "out" / JOURNAL))
    )
    study = optuna.load_study(study_name="tune", storage=storage)
    study.ask()
    study.enqueue_trial(dict(whole.trials[2].options))
    again = tune(model, REQUEST, trials=6, out=tmp_path / "out")
    assert [trial.options for trial in again.trials] == [trial.options for trial in whole.trials]


class AtOnce:
    """Several trials under way at once, which end in another order than they began."""

    def __init__(self, work: Any, at_once: int, last_first: bool) -> None:
        self.work, self.at_once, self.last_first = work, at_once, last_first
        self.given: list[Any] = []
        self.most = 0

    def give(self, key: Any, piece: Any) -> None:
        self.given.append((key, piece))
        self.most = max(self.most, len(self.given))

    def done(self) -> list[Any]:
        key, piece = self.given.pop(-1 if self.last_first else 0)
        return [(key, self.work(piece))]


def test_what_is_tried_at_once_does_not_depend_on_who_ends_first(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    at_once, trials = 2, 8
    stand_in(monkeypatch, trade)
    found = {}
    for last_first in (False, True):
        doing: list[AtOnce] = []

        def opened(
            work: Any, given: Any, last_first: bool = last_first, doing: Any = doing, **_: Any
        ) -> Any:
            doing.append(AtOnce(work, at_once, last_first))
            return nullcontext(doing[0])

        monkeypatch.setattr(search, "_hands", opened)
        whole = tune(model, REQUEST, trials=trials, out=tmp_path / str(last_first))
        assert doing[0].most == at_once
        assert [trial.index for trial in whole.trials] == list(range(trials))
        found[last_first] = [trial.options for trial in whole.trials]
    assert found[True] == found[False]
    assert len(found[True]) == len({str(options) for options in found[True]}), "none is tried twice"
    rates = [options["training.learning_rate"] for options in found[True][:at_once]]
    own = 2e-5
    assert rates == [pytest.approx(own * 10**power, rel=0.01) for power in (0, 0.5, -0.5)[:at_once]]
    monkeypatch.undo()
    stand_in(monkeypatch, trade)
    alone = tune(model, REQUEST, trials=trials)
    assert [trial.options for trial in alone.trials] != found[True]
    assert not any("at once" in note for note in alone.notes)
    assert any(f"{at_once} trials were under way at once" in note for note in whole.notes)


def test_a_search_of_several_at_once_goes_on_after_a_kill(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    left = [99]

    def dies(values: dict[str, Any]) -> tuple[float, float]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return trade(values)

    calls = stand_in(monkeypatch, dies)

    def opened(work: Any, given: Any, **_: Any) -> Any:
        return nullcontext(AtOnce(work, 3, last_first=True))

    monkeypatch.setattr(search, "_hands", opened)
    whole = tune(model, REQUEST, trials=10, out=tmp_path / "whole")
    left[0] = 6
    with pytest.raises(KeyboardInterrupt):
        tune(model, REQUEST, trials=10, out=tmp_path / "cut")
    left[0] = 99
    calls.clear()
    again = tune(model, REQUEST, trials=10, out=tmp_path / "cut")
    assert len(calls) == 4
    assert [trial.options for trial in again.trials] == [trial.options for trial in whole.trials]


def test_a_cluster_tries_a_quarter_at_once_at_most(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    stand_in(monkeypatch, trade)
    large: list[AtOnce] = []

    def opened(work: Any, given: Any, **_: Any) -> Any:
        large.append(AtOnce(work, 64, last_first=False))
        return nullcontext(large[-1])

    monkeypatch.setattr(search, "_hands", opened)
    for trials, most in ((8, 2), (3, 1)):
        tune(model, REQUEST, trials=trials)
        assert large[-1].most == most


def test_a_model_in_memory_is_not_tried_elsewhere(model: str) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(RecipeError, match="a model is given itself"):
        tune(LM.load(model), REQUEST, trials=2, jobs=2)


@pytest.mark.slow
def test_processes_try_what_is_tried_here(model: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    found = tune(
        model, REQUEST, trials=4, utility=0.5, jobs=2, out=tmp_path, learning_rate=1e-3, **QUICK
    )
    assert [trial.failed for trial in found.trials] == [None] * 4
    lm = tune(model, REQUEST, trials=1, utility=0.5, learning_rate=1e-3, **QUICK)
    for name, value in lm.trials[0].means.items():
        assert found.trials[0].means[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_another_seed_searches_elsewhere(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    stand_in(monkeypatch, trade)
    options = [
        [trial.options for trial in tune(model, REQUEST, trials=STARTUP + 1, seed=seed).trials]
        for seed in (0, 0, 1)
    ]
    assert options[0] == options[1]
    assert options[0][:STARTUP] == options[2][:STARTUP]  # no chance before the sampler
    assert options[0][STARTUP:] != options[2][STARTUP:]


@pytest.mark.parametrize(
    ("breaks_from", "factors"),
    [
        (1e9, (1, 10**0.5, 10, None)),  # always kept: up to the end of the range, then the sampler
        (0, (1, 10**-0.5, 0.1, None)),  # never kept: down to the other end
        (2, (1, 10**0.5, 10**0.25, 10**0.375)),  # kept at 1, broken above 2: between the two
        (0.5, (1, 10**-0.5, 10**-0.25, 10**-0.375)),
    ],
)
def test_the_learning_rate_is_searched_first(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    breaks_from: float,
    factors: tuple[float | None, ...],
) -> None:
    pytest.importorskip("optuna")
    name = "training.learning_rate"
    own = 2e-5  # of npo

    def outcome(values: dict[str, Any]) -> tuple[float, float]:
        return 0.1, 1.0 if values["rate"] < breaks_from * own else 0.5

    stand_in(monkeypatch, outcome)
    trials = tune(model, REQUEST, trials=STARTUP).trials
    for trial, factor in zip(trials, factors, strict=True):
        if factor is not None:
            assert trial.options[name] == pytest.approx(own * factor, rel=0.01)
            others = {key: value for key, value in trial.options.items() if key != name}
            assert others == {k: v for k, v in trials[0].options.items() if k != name}


def test_failed_trials_are_recorded_and_do_not_win(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    count = [0]

    def sometimes(values: dict[str, Any]) -> tuple[float, float]:
        count[0] += 1
        if count[0] == 1:
            raise RunError("training collapsed at step 3.")
        if count[0] == 3:
            raise ZeroDivisionError("inside")
        return trade(values)

    stand_in(monkeypatch, sometimes)
    found = tune(model, REQUEST, trials=4, utility=0.5, out=tmp_path / "out")
    assert [trial.failed for trial in found.trials] == [
        "training collapsed at step 3.", None, "ZeroDivisionError: inside", None,
    ]  # fmt: skip
    assert found.best.index in (1, 3)
    page = render_search(found, RunDirectory(tmp_path / "out").manifest)
    assert "The method as it is (trial 1) failed." in page
    assert "ZeroDivisionError: inside" in page
    again = tune(model, REQUEST, trials=4, utility=0.5, out=tmp_path / "out")
    assert count[0] == 4, "failures are results: they are not tried again"
    assert [trial.failed for trial in again.trials] == [trial.failed for trial in found.trials]

    def never(values: dict[str, Any]) -> tuple[float, float]:
        raise RunError("training collapsed.")

    stand_in(monkeypatch, never)
    with pytest.raises(RunError, match="all 2 trials failed; the first: training collapsed"):
        tune(model, REQUEST, trials=2)

    def wrong(values: dict[str, Any]) -> tuple[float, float]:
        raise DataError("the records are of the wrong kind.")

    stand_in(monkeypatch, wrong)
    with pytest.raises(DataError, match="wrong kind"):
        tune(model, REQUEST, trials=2)


def test_when_no_trial_keeps_the_budget_the_nearest_is_named(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    stand_in(monkeypatch, lambda values: (0.1, min(0.5, 1e-5 / values["rate"])))
    found = tune(model, REQUEST, trials=4, out=tmp_path)
    assert not found.within_budget
    assert found.best.utility == max(trial.utility or 0 for trial in found.trials)
    page = render_search(found, RunDirectory(tmp_path).manifest)
    assert "No trial kept the budget" in page


def test_winner() -> None:
    def trial(index: int, left: float | None, kept: float | None) -> Trial:
        return Trial(index, {}, left, kept, failed=None if kept is not None else "collapsed")

    some = [trial(0, 0.5, 0.99), trial(1, 0.0, 0.2), trial(2, 0.3, 0.95), trial(3, 0.3, 1.0)]
    assert winner(some, 0.95) == some[2]
    assert winner(some, 0.96) == some[3]
    assert winner([trial(0, None, None), *some[1:2]], 0.95) == some[1]
    assert winner([trial(0, None, None)], 0.95) is None


def test_bad_budgets_and_the_missing_extra(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in (0.0, 1.2, -1.0, math.nan):
        with pytest.raises(RecipeError, match=r"is not in \(0, 1\]"):
            tune(model, REQUEST, utility=budget)
    with pytest.raises(RecipeError, match="trials = 0"):
        tune(model, REQUEST, trials=0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'delible\[tune\]'"):
        tune(model, REQUEST, trials=1)
    with pytest.raises(MissingExtraError):
        tuned_options(model, REQUEST, "npo", 1, {})


# ---- end to end


def test_the_real_thing_leaves_the_model_alone(model: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    lm = LM.load(model)
    before = lm.fingerprint
    runs = [
        tune(start, REQUEST, trials=trials, utility=0.5, out=tmp_path / str(trials),
             learning_rate=1e-3, **QUICK)
        for start, trials in ((model, 2), (lm, 1))
    ]  # fmt: skip
    lm.touch()
    assert lm.fingerprint == before
    one, two = runs
    # by name or in memory, the same numbers; and they moved
    assert one.trials[0].means == two.trials[0].means
    assert set(one.space) == {"objective.beta", "balance.retain_weight"}
    assert one.trials[0].leak != one.start_leak
    assert one.trials[0].aside_leak is not None
    content = yaml.safe_load((tmp_path / "2" / "recipe.yaml").read_text())
    assert content["training"]["max_steps"] == 2
    assert content["objective"]["beta"] == one.best_options["objective.beta"]

    from delible.api import unlearn

    done = unlearn(model, REQUEST, method=tmp_path / "2" / "recipe.yaml", shown=0)
    assert len(done.history) == 2


def test_an_editor_is_searched_too(model: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    request = REQUEST.model_copy(update={"subjects": ("Ada Nord",)})
    found = tune(
        model, request, method="rocr", trials=2, utility=0.01, out=tmp_path,
        tokens=64, first_depth=0.5, last_depth=0.5,
    )  # fmt: skip
    assert set(found.space) == {"threshold", "rho"}
    assert [trial.failed for trial in found.trials] == [None, None]
    content = yaml.safe_load((tmp_path / "editor.yaml").read_text())
    assert content["editor"]["rho"] == found.best_options["rho"]
    again = resolve_method(tmp_path / "editor.yaml")
    assert found.command == f"--method {tmp_path / 'editor.yaml'}"
    assert again.value("rho") == found.best_options["rho"]


def test_tuned_options_are_kept_in_the_cache(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    calls = stand_in(monkeypatch, lambda values: (values["rate"], 1.0))
    given = {"learning_rate": 5e-5, "max_steps": 8}
    found = tuned_options(model, REQUEST, "npo", 3, given)
    assert calls[0]["rate"] == 5e-5  # it starts at the benchmark's own budget
    assert found["max_steps"] == 8
    assert "learning_rate" not in found
    assert found["training.learning_rate"] <= 5e-5
    assert set(found) == {
        "max_steps", "training.learning_rate", "objective.beta", "balance.retain_weight",
    }  # fmt: skip
    assert resolve_method("npo", options=found).name == "npo"
    assert tuned_options(model, REQUEST, "npo", 3, given) == found
    assert len(calls) == 3
    tuned_options(model, REQUEST, "npo", 3, {**given, "beta": 0.2})
    assert len(calls) == 6
