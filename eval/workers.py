"""Processes in which models are timed: one for each, so that memory is a model's own, and so that they can take turns."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


@contextmanager
def worker(module: str) -> Iterator[ProcessPoolExecutor]:
    """A fresh process in milliseconds: `module`, and torch with it, is imported once, in a server that forks it; nothing has run.

    An error or Ctrl-C while it is open kills it, so that nobody waits for what it is computing.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    # The terminal sends Ctrl-C to every process; only the one that wrote the results down may act on it.
    with ProcessPoolExecutor(1, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        pid = pool.submit(os.getpid).result()
        try:
            yield pool
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
