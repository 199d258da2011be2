"""``delible tune``: searches a method's options for the least leak under a utility budget."""

from __future__ import annotations

from delible.tune.results import Trial, TuneResult
from delible.tune.search import tune
from delible.tune.tuned import tuned_options

__all__ = ["Trial", "TuneResult", "tune", "tuned_options"]
