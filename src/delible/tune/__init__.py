"""``delible tune``: searches a method's options for the least leak under a utility budget."""

from __future__ import annotations

from delible.tune.search import Trial, TuneResult, tune, tuned_options

__all__ = ["Trial", "TuneResult", "tune", "tuned_options"]
