"""Guards whose removal no program can show, each with the reason. Keys are ``Mutant.key``."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "match.polynomial.value_of: allows: len(poly) == 1":
        "build sorts the constant term last, so it stands first only when it is alone",
}  # fmt: skip
