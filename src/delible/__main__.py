"""``python -m delible`` is the command ``delible``."""

from __future__ import annotations

import sys

from delible.cli import main

if __name__ == "__main__":
    sys.exit(main())
