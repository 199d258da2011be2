"""A person teaches a model that is a novice about something, and sees how far it has come.

    check -> lesson in turns, a check after each -> teach-back -> test in other words
    recovery = (after - before) / (original - before)

What was said is coded move by move, so that it can be told which moves of a teacher go with what
came back. Paper: arXiv 2603.26142 (only its abstract is public; the details are ours).
"""

from delible.teaching.lesson import Lesson, ReadOut

__all__ = ["Lesson", "ReadOut"]
