"""On-policy training: a model answers, rewards judge, and what earned more gets likelier.

A method is a set of questions and a list of rewards; :func:`~delible.train.onpolicy.run.train`
does the rest. The optimisation is TRL's GRPO (extra ``rl``), which only ``trl_adapter.py`` knows.
"""
