"""What a rewrite did: one ``Site`` per MoE candidate, collected into a ``Report``."""

from __future__ import annotations

import html
import json
import logging
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_compile.codes import CODES, fix_for

log = logging.getLogger("moe_compile.report")

REWRITTEN, REFUSED, NOT_CAPTURED = "rewritten", "refused", "not captured"
WIDTH = 110


@dataclass(frozen=True)
class Site:
    """One candidate.

    Args:
        status: ``"rewritten"``, ``"refused"`` or ``"not captured"``.
        form: name of the form that matched, or of the nearest one.
        code: ``MC...`` when not rewritten, else None.
        reason: the failing fact in one line.
        location: ``"file:line"`` of the user's source, or "".
        fix: what the user can do, in one line.
        spec: the ``spec.MoE`` when rewritten.
        kernel: what runs for which T, as text.
    """

    status: str
    form: str = ""
    code: str | None = None
    reason: str = ""
    location: str = ""
    fix: str = ""
    spec: Any = None
    kernel: str = ""

    @property
    def layer(self) -> str:
        """``spec.describe()``, or "" without a spec."""
        return str(self.spec.describe()) if self.spec is not None else ""

    def why(self) -> str:
        """``MC208 missing or repeated expert: <reason>``, "" when rewritten."""
        if self.code is None:
            return self.reason
        title = CODES[self.code].title if self.code in CODES else ""
        return f"{self.code} {title}: {self.reason}" if self.reason else f"{self.code} {title}"

    def advice(self) -> str:
        """The site's own fix, else the one of its code."""
        return self.fix or fix_for(self.code)


@dataclass
class Report:
    """Every candidate that one compile (or ``optimize``) saw."""

    sites: list[Site] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Site]:
        return [s for s in self.sites if s.status == REWRITTEN]

    @property
    def refused(self) -> list[Site]:
        return [s for s in self.sites if s.status == REFUSED]

    @property
    def not_captured(self) -> list[Site]:
        return [s for s in self.sites if s.status == NOT_CAPTURED]

    def totals(self) -> str:
        """One line: ``moe_compile: 1 of 2 MoE candidates rewritten, 1 refused``."""
        if not self.sites:
            return "moe_compile: no MoE candidate found"
        noun = "candidate" if len(self.sites) == 1 else "candidates"
        parts = [f"moe_compile: {len(self.rewritten)} of {len(self.sites)} MoE {noun} rewritten"]
        for name, group in ((REFUSED, self.refused), (NOT_CAPTURED, self.not_captured)):
            if group:
                parts.append(f"{len(group)} {name}")
        return ", ".join(parts)

    def folded(self) -> list[tuple[Site, int]]:
        """Identical sites (48 layers of one class) once, with their number, in order of appearance."""
        counts: Counter[tuple[str, ...]] = Counter()
        first: dict[tuple[str, ...], Site] = {}
        for s in self.sites:
            key = (s.status, s.form, s.code or "", s.reason, s.location, s.fix, s.layer, s.kernel)
            counts[key] += 1
            first.setdefault(key, s)
        return [(site, counts[key]) for key, site in first.items()]

    def __str__(self) -> str:
        """A plain aligned table; reason and fix stand below their row."""
        rows = [
            (
                s.status if n == 1 else f"{s.status} x{n}",
                *(c or "-" for c in (s.form, s.layer, s.location, s.kernel)),
            )
            for s, n in self.folded()
        ]
        if not rows:
            return self.totals()
        head = ("status", "form", "layer", "source", "kernel")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [self.totals(), "", _line(head, widths)]
        for row, (site, _) in zip(rows, self.folded(), strict=True):
            lines.append(_line(row, widths))
            if site.why():
                lines += _wrap("why: ", site.why())
            if site.code is not None and site.advice():
                lines += _wrap("fix: ", site.advice())
        return "\n".join(lines)

    def to_json(self) -> str:
        """The sites as a JSON list; ``spec`` becomes its one-line description."""
        rows = []
        for site in self.sites:
            row = asdict(Site(**{**site.__dict__, "spec": None}))
            row["spec"] = site.layer or None
            rows.append(row)
        return json.dumps(rows, indent=2)

    def to_html(self) -> str:
        """A self-contained page: no scripts, no outside files, every text escaped."""
        columns = ("status", "sites", "form", "layer", "source", "kernel", "why", "fix")
        head = "".join(f"<th>{name}</th>" for name in columns)
        body = ""
        for s, n in self.folded():
            advice = s.advice() if s.code is not None else ""
            cells = (s.status, str(n), s.form, s.layer, s.location, s.kernel, s.why(), advice)
            body += f"<tr class='{html.escape(s.status.replace(' ', '-'))}'>"
            body += "".join(f"<td>{html.escape(text)}</td>" for text in cells) + "</tr>"
        return (
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>moe_compile</title>"
            f"<style>{_STYLE}</style></head><body><h1>{html.escape(self.totals())}</h1>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></body></html>\n"
        )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#1c1e21}h1{font-size:1.2rem}"
    "table{border-collapse:collapse}td,th{padding:.4rem .7rem;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #ddd}.rewritten td:first-child{color:#0a7d33}"
    ".refused td:first-child,.not-captured td:first-child{color:#b3261e}"
)

_collectors: list[Report] = []
_quiet: list[Report] = []  # the collectors whose owner tells what they hold
_logged: set[tuple[str, str]] = set()


def record(site: Site) -> None:
    """Hand a site to every open collector and, unless one of them is quiet, to the log."""
    for report in _collectors:
        report.sites.append(site)
    if not _quiet:
        tell(site)


def tell(site: Site) -> None:
    """Log a site: at WARNING what was not rewritten, once per code and location."""
    key = (site.code or "", site.location)
    if site.status == REWRITTEN or key in _logged:
        log.debug("%s %s %s %s", site.status, site.form, site.location, site.why())
        return
    _logged.add(key)
    log.warning(
        "MoE layer %s at %s: %s; fix: %s",
        site.status,
        site.location or "unknown source",
        site.why(),
        site.advice() or "none known",
    )


@contextmanager
def collect(quiet: bool = False) -> Iterator[Report]:
    """Collect the sites recorded inside the ``with`` block; its end logs the totals.

    ``quiet``: the caller tells what was found, so the log does not.
    """
    report = Report()
    _collectors.append(report)
    if quiet:
        _quiet.append(report)
    try:
        yield report
    finally:
        for reports in (_collectors, _quiet):
            reports[:] = [other for other in reports if other is not report]
        if report.sites:
            log.info("%s", report.totals())


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _wrap(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="    " + label,
        subsequent_indent="         ",
        break_long_words=False,
        break_on_hyphens=False,
    )
