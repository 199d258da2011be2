"""What delible tells is logged: who sees it, where it stands, and that it is told once."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from delible.cli.output import Reporter
from delible.watching import aside, indented, shown

logger = logging.getLogger("delible.anywhere")


def test_sentences_are_shown_once_in_order_and_only_while_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines: list[str] = []
    logger.info("before")
    with shown(lines.append):
        logger.info("one with 100% of its signs")
        logger.debug("a detail")
        logger.warning("two")
    logger.info("after")
    assert lines == ["one with 100% of its signs", "two"]
    assert caplog.messages == ["before", "after"]  # shown ones go nowhere else
    assert logging.getLogger("delible").propagate


def test_what_belongs_to_other_work_is_indented_or_not_shown() -> None:
    lines: list[str] = []
    with shown(lines.append):
        with indented():
            logger.info("a step")
            with indented(), aside():
                logger.info("nobody reads this")
                with indented():
                    logger.info("nor this")
            logger.info("the next")
        logger.info("the end")
    assert lines == ["   a step", "   the next", "the end"]


def test_what_goes_wrong_while_showing_goes_wrong_where_it_was_told() -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), shown(closed):
        logger.info("too late")
    assert logging.getLogger("delible").handlers == [
        one for one in logging.getLogger("delible").handlers if type(one) is logging.NullHandler
    ]


def test_a_reporter_shows_what_is_logged_while_it_is_open(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Reporter() as reporter:
        logger.info("of the library")
        reporter.say("of the command")
        with aside():
            logger.info("of a part")
    logger.info("later")
    assert capsys.readouterr().out.splitlines() == ["of the library", "of the command"]


def test_python_shows_nothing_that_is_not_asked_for() -> None:
    words = (
        "import logging, delible\n"
        "logging.getLogger('delible.api').warning('left out')\n"
        "logging.getLogger('delible.api').info('going on')\n"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
