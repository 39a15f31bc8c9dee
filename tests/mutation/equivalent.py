"""Guards whose removal no program can show, each with the reason. Keys are ``Mutant.key``."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {}
