"""What the package is, for Inductor's caches: a hash of its own source."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from .patterns import FORMS


@lru_cache(maxsize=1)
def source_hash() -> str:
    """SHA-256 over every Python file of the package."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parent, Path(FORMS[0].__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
