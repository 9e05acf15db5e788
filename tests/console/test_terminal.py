"""Signals that stop a run, and output that can no longer be written."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dwf_cluster.console.terminal import Stop, lasting_output


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in signals}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@contextmanager
def _connect() -> Iterator[Any]:
    yield "cluster"


def test_a_closed_terminal_stops_the_run_once_however_many_signals_it_sends(capsys: pytest.CaptureFixture[str]) -> None:
    stop = Stop()
    with stop.with_signals(_connect)() as cluster:
        assert cluster == "cluster"
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err.count("stopping: ") == 1


def test_a_terminal_that_closes_while_ray_starts_stops_the_run_afterwards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = Stop()

    @contextmanager
    def connect() -> Iterator[Any]:
        assert signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # processes that start now never get it
        signal.raise_signal(signal.SIGHUP)
        assert not stop.is_set()
        yield "cluster"

    with stop.with_signals(connect)():
        assert stop.is_set()
        assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_run_under_nohup_ignores_a_closed_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    stop = Stop()
    with stop.with_signals(_connect)():
        signal.raise_signal(signal.SIGHUP)
    assert not stop.is_set()


def test_no_signal_stays_blocked_if_ray_does_not_start() -> None:
    @contextmanager
    def connect() -> Iterator[Any]:
        raise ValueError("no Ray")
        yield

    with pytest.raises(ValueError, match="no Ray"), Stop().with_signals(connect)():
        pass
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_output_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with lasting_output():
            for _ in range(2):
                print("line", flush=True)
            assert not sys.stdout.isatty()
        print("line", flush=True)  # the interpreter's last flush does not fail either
