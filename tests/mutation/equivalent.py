"""Guards whose removal no program can show, each with the reason. Keys are ``Mutant.key``."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "match.polynomial.value_of: allows: len(poly) == 1":
        "build sorts the constant term last, so it stands first only when it is alone",
    "match.polynomial.polynomial_of: refuses: Unsupported(f'operator {name}')":
        "calling None is the TypeError that becomes the same Unsupported one line below",
    "match.polynomial._pow: refuses: Unsupported('a power that is no number')":
        "comparing None is a TypeError, which the caller turns into the same Unsupported",
}  # fmt: skip
