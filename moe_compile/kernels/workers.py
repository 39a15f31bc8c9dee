"""Processes that compile kernels ahead of their launches (``ahead``), side by side.

Processes and not threads, although those would run side by side too (the interpreter is held for 5 to 12 % of a
compilation): a compiler that crashes takes only its own process with it, its memory is given back, and several programs
share the work. Each takes some three seconds of a processor to start. They are started as a command and not by
``multiprocessing``, which would run the caller's own script again in each of them. They see no GPU. Sources go in and
answers come out as pickles through pipes.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

from . import ahead

# They take most of the time: first, so that no process ends with a long one while the others wait.
LONG = ("grouped_kernel", "decode_kernel")
MOST = 16  # processes, unless more are asked for


class Job(NamedTuple):
    """One kernel to compile."""

    key: str
    source: ahead.Source


class Answer(NamedTuple):
    """What became of a job: compiled here (else another process had done it), or the error."""

    job: Job
    compiled: bool
    error: str = ""


def default_workers() -> int:
    """One per processor; each takes some hundred megabytes, and a layer has a few dozen kernels."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(count or 1, MOST))


def compile_all(jobs: Sequence[Job], workers: int, step: Callable[[Answer], None]) -> None:
    """Compile every job in at most ``workers`` processes; one that fails or dies does not stop the others.

    Args:
        step: called in this thread with every answer as it comes.
    """
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    for job in sorted(jobs, key=lambda job: job.source.function not in LONG):
        todo.put(job)
    folder = ahead.cache_folder()
    team = [_Worker(folder) for _ in range(min(workers, len(jobs)))]
    threads = [threading.Thread(target=_run, args=(worker, todo, done), daemon=True) for worker in team]
    try:
        for thread in threads:
            thread.start()
        for _ in jobs:
            step(done.get())
    finally:  # at an interrupt, too: nothing half done counts in the cache
        for worker in team:
            worker.stop()


def _run(worker: _Worker, todo: queue.SimpleQueue[Job], done: queue.SimpleQueue[Answer]) -> None:
    while not worker.stopped:
        try:
            job = todo.get_nowait()
        except queue.Empty:
            worker.stop()
            return
        try:
            compiled, error = worker.ask(job)
        except Exception as failure:  # no process, or it died
            compiled, error = False, worker.last_words(failure)
            worker.end()
        done.put(Answer(job, compiled, error))


class _Worker:
    """One process, started when it is first asked and again if it died."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  read when the process is gone
        self.lock = threading.Lock()
        self.stopped = False

    def ask(self, job: Job) -> tuple[bool, str]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        pickle.dump((job, self.folder), process.stdin)
        process.stdin.flush()
        compiled, error = pickle.load(process.stdout)
        return bool(compiled), str(error)

    def _started(self) -> subprocess.Popen[bytes]:
        with self.lock:
            if self.stopped:
                raise RuntimeError("stopped")
            if self.process is None:
                # the same places for modules, in the same order
                code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
                env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=env,
                )  # fmt: skip
            return self.process

    def last_words(self, failure: Exception) -> str:
        """What is known of a process that gave no answer."""
        try:
            code = None if self.process is None else self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:  # it lives, or never did
            return described(failure)
        self.errors.seek(0, os.SEEK_END)
        size = self.errors.tell()
        self.errors.seek(max(0, size - 2000))
        tail = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"the compiler's process ended with code {code} ({type(failure).__name__}): {''.join(tail)}"

    def end(self) -> None:
        """End the process; the next job starts another."""
        with self.lock:
            process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except OSError:  # what was not sent is lost
                    pass

    def stop(self) -> None:
        """End the process for good."""
        self.stopped = True
        self.end()


def serve() -> None:
    """The life of a process: compile what comes in until nothing comes any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever compilers print is no answer
    while True:
        try:
            job, folder = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[bool, str]
        try:
            answer = ahead.build(job.key, job.source, folder), ""
        except Exception as error:  # the compiler's; the next kernel may be fine
            answer = False, described(error)
        pickle.dump(answer, answers)
        answers.flush()


def described(error: BaseException) -> str:
    """An error in one line, with the last cause: Triton's own message is often a long listing."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines: list[Any] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[-1:])}".strip()
