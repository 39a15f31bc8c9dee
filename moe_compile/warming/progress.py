"""A bar on stderr: ``tqdm``'s where it is installed, else a line ``12/40 kernels``."""

from __future__ import annotations

import importlib
import sys
from types import TracebackType
from typing import Any


class Progress:
    """Counts to a total inside a ``with`` block; silent unless wanted and stderr is a terminal."""

    def __init__(self, total: int, what: str, wanted: bool) -> None:
        self.total, self.what, self.done = total, what, 0
        self.shown = wanted and total > 0 and sys.stderr.isatty()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            try:
                self.bar = importlib.import_module("tqdm").tqdm(total=self.total, desc=self.what, file=sys.stderr)
            except ImportError:
                self._line()
        return self

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.shown:
            self._line()

    def _line(self) -> None:
        sys.stderr.write(f"\r{self.done}/{self.total} {self.what}")
        sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.shown:
            sys.stderr.write("\n")
