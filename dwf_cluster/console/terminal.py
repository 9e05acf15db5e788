"""What a terminal does to a run: it interrupts it, and it may be closed while the run goes on."""

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

    def heeded(self, connect: Callable[[], AbstractContextManager[Cluster]]) -> Callable[[], Any]:
        """The same connection, and signals heeded from its beginning to its end."""

        @contextmanager
        def connection() -> Iterator[Cluster]:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            # A closed terminal sends SIGHUP to all processes of the run. Those that start now inherit this mask.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            try:
                with connect() as cluster:
                    for signum in (signal.SIGINT, signal.SIGTERM):  # Ray has set SIGTERM's while it started
                        signal.signal(signum, self._ask)
                    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
                        signal.signal(signal.SIGHUP, self._ask)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
                    yield cluster
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

        return connection

    def _ask(self, signum: int, frame: object) -> None:
        if not self.is_set():
            self.set()
            print("stopping: trainings save what they have; again to stop at once", file=sys.stderr, flush=True)
        elif signum != signal.SIGHUP:  # which both the shell and the kernel send when a terminal is closed
            raise KeyboardInterrupt


class _Output:
    """Standard output or error of a run. After the first failed write (closed terminal, full disk) it drops everything.

    Args:
        stream: what is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any text stream, but never fails."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of any text stream, but never fails."""
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with open(os.devnull, "w") as nowhere:  # the file itself: the interpreter flushes it once more at its end
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let nothing that happens to standard output or error end the body."""
    with ExitStack() as stack:
        if sys.stdout:
            stack.enter_context(redirect_stdout(cast(TextIO, _Output(sys.stdout))))
        if sys.stderr:
            stack.enter_context(redirect_stderr(cast(TextIO, _Output(sys.stderr))))
        yield
