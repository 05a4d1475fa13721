import os
import signal

import pytest

from train.signals import stop_signals


def send(number):
    os.kill(os.getpid(), number)  # to itself: the handler has run when the call returns


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that the handlers see, in seconds."""
    now = [100.0]
    monkeypatch.setattr("train.signals.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_said_once(number, capfd):
    with stop_signals() as received:
        assert received() is False
        send(number)
        assert received() is True
        send(number)
    assert capfd.readouterr().err.count(f"{number.name}: saving after this step") == 1


def test_the_same_ctrl_c_passed_on_by_a_launcher_does_not_end_the_run(clock):
    with stop_signals() as received:
        send(signal.SIGINT)
        clock(102.0)
        send(signal.SIGINT)
        assert received()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_later_ctrl_c_ends_the_run_at_once(clock, first):
    with stop_signals():
        send(first)
        clock(102.1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_sigterm_never_ends_the_run(clock):
    with stop_signals() as received:
        for now in (100.0, 101.0, 200.0):
            clock(now)
            send(signal.SIGTERM)
        assert received()


def test_a_closed_terminal_does_not_end_the_run(monkeypatch):
    def closed(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    with stop_signals() as received:
        send(signal.SIGTERM)
        assert received()


def test_the_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), stop_signals():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
