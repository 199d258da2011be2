"""A model is repaired while one talks with it: what the user asks it to forget is edited away.

    turn -> watchdog: is it asked to forget? -> confirmed? -> surgeon: a plan -> edit, looked at
         -> kept as a patch, or tried otherwise, or told that it failed

A plan is options of an editor, checked by a form; nothing that a model writes is ever executed.
Paper: arXiv 2604.12820 (RePAIR).
"""

from delible.repair.conversation import Conversation, Heard, Repairing

__all__ = ["Conversation", "Heard", "Repairing"]
