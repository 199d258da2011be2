"""An OpenAI-compatible server before any system. What it needs is the extra ``gateway``.

A call's way: ``front`` (its number, key, limits, log) → ``app`` (its route) → ``reading`` (what is
asked) → ``answering`` (asks the system, minds time and whether the client is still there) →
``writing`` or ``responses`` (what is sent).
"""
