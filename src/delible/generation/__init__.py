"""Making rows before training: what the generators of the slot ``generate`` share.

``filters`` decides which texts may be trained on, ``templates`` writes them offline, ``writing``
lets a system (a local model, an endpoint) write them, with retries, a cache and a count of what
was thrown away.
"""
