"""Signals that ask a run to stop."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

SAME = 2.0  # seconds in which a second signal is the first one again: a terminal and a launcher both pass a Ctrl-C on


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM too raises KeyboardInterrupt: else processes that this one has started would go on without it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def unstoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM do nothing: for what ends soon, and must not be left halfway by whoever asks twice."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives `received()`: whether Ctrl-C (SIGINT) or SIGTERM has asked to stop, which the loop does after the step at hand.

    A Ctrl-C more than 2 s after the first signal is a person's and ends the run at once, with KeyboardInterrupt. SIGTERM
    never does: whoever sends it twice still wants the checkpoint, or has SIGKILL. In the main thread only.
    """
    first: list[float] = []

    def note(number, frame):
        now = monotonic()
        if not first:
            first.append(now)
            name = signal.Signals(number).name
            # Not print: the signal may have come in the middle of one. And a closed terminal must not cost the checkpoint.
            with suppress(OSError):
                os.write(2, f"\n{name}: saving after this step; Ctrl-C again, after a moment, to stop at once\n".encode())
        elif number == signal.SIGINT and now - first[0] > SAME:
            signal.default_int_handler(number, frame)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(first)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
