"""Processes in which models are timed: one for each, so that memory is a model's own, and so that they can take turns."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context

import psutil


@contextmanager
def worker(module: str) -> Iterator[ProcessPoolExecutor]:
    """A fresh process in milliseconds: `module`, and torch with it, is imported once, in a server that forks it; nothing has run.

    An error or Ctrl-C while it is open kills it, so that nobody waits for what it is computing.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["hybridlm", module])  # in this order, as in `eval.__main__`
    # The terminal sends Ctrl-C to every process; only the one that wrote the results down may act on it.
    with ProcessPoolExecutor(1, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        pid = pool.submit(os.getpid).result()
        try:
            yield pool
        except BaseException:
            with suppress(ProcessLookupError):  # it may have died of the error
                os.kill(pid, signal.SIGKILL)
            raise


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return psutil.Process().memory_info().rss


@contextmanager
def peak_memory(interval: float = 0.001) -> Iterator[list[int]]:
    """A list whose one element is, once it is closed, the most that `resident` gave meanwhile, at every `interval` seconds.

    Watching takes time of its own: what is watched every millisecond is not to be timed.
    """
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], resident())
