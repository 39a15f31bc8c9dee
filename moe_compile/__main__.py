"""``python -m moe_compile``."""

from __future__ import annotations

import sys

from moe_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
