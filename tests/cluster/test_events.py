"""Listeners: each gets every event, and one that fails is a warning."""

from __future__ import annotations

import pytest

from dwf_cluster.cluster.events import Event, Finished, Listeners, Note

WARNING = Note("warning: TensorBoard: RuntimeError: no more paper; the run continues")


def _fail(event: Event) -> None:
    raise RuntimeError("no more paper")


def test_a_failing_listener_is_one_warning_and_the_others_get_every_event() -> None:
    events: list[Event] = []
    emit = Listeners({"TensorBoard": _fail, "progress": events.append})
    with pytest.warns(UserWarning, match="no more paper"):  # TensorBoard cannot take the warning either
        emit(Finished())
    emit(Finished())
    assert events == [WARNING, Finished(), Finished()]


def test_a_listener_that_fails_at_some_events_gets_the_others() -> None:
    events: list[Event] = []

    def take_notes(event: Event) -> None:
        if not isinstance(event, Note):
            raise RuntimeError("no more paper")
        events.append(event)

    emit = Listeners({"TensorBoard": take_notes})
    for event in (Finished(), Finished(), Note("tried again")):
        emit(event)
    assert events == [WARNING, Note("tried again")]


def test_a_warning_that_no_listener_takes_is_a_python_warning() -> None:
    with pytest.warns(UserWarning, match="TensorBoard: RuntimeError: no more paper"):
        Listeners({"TensorBoard": _fail})(Finished())
