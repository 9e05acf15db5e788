"""Signals of a terminal, and output to one that may be closed during a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from dwf_cluster.cluster.driver import Cluster


class Stop(threading.Event):
    """Set by the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal) of a run; a second one ends it at once."""

    def with_signals(self, connect: Callable[[], AbstractContextManager[Cluster]]) -> Callable[[], Any]:
        """The same connection, with signal handlers that set this event while it lasts."""

        @contextmanager
        def connection() -> Iterator[Cluster]:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            # A closed terminal sends SIGHUP to all processes of the run. Processes that start now inherit this mask.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            try:
                with connect() as cluster:
                    for signum in (signal.SIGINT, signal.SIGTERM):  # Ray set SIGTERM's when it started
                        signal.signal(signum, self._handle)
                    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
                        signal.signal(signal.SIGHUP, self._handle)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
                    yield cluster
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

        return connection

    def _handle(self, signum: int, frame: object) -> None:
        if not self.is_set():
            self.set()
            print("stopping: trainings save what they have; again to stop at once", file=sys.stderr, flush=True)
        elif signum != signal.SIGHUP:  # the shell and the kernel both send it when a terminal is closed
            raise KeyboardInterrupt


class _Output:
    """Standard output or error of a run. After the first failed write (closed terminal, full disk) it drops everything.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As for any text stream, but never fail."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As for any text stream, but never fail."""
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with open(
                os.devnull, "w"
            ) as nowhere:  # replaces the file itself: the interpreter flushes it once more when it exits
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep the body running when standard output or error can no longer be written."""
    with ExitStack() as stack:
        if sys.stdout:
            stack.enter_context(redirect_stdout(cast(TextIO, _Output(sys.stdout))))
        if sys.stderr:
            stack.enter_context(redirect_stderr(cast(TextIO, _Output(sys.stderr))))
        yield
