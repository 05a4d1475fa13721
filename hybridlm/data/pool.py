"""Parts of a job in processes of their own. One that dies is an error that names its part, never a wait without end."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Job = Callable[[int, Callable[[int], Any]], None]


def run_parts(job: Job, names: dict[int, str], workers: int, advance: Callable[[int], Any]) -> None:
    """Calls `job(number, advance)` for every number of `names`, in at most `workers` processes.

    Args:
        job: on Linux of any kind, since the processes are forked; elsewhere it is handed to them, so it must be a module's own.
        names: what each part is, in the words of an error.
        advance: called here with what the job calls it with there.

    Raises:
        ChildProcessError: a process died. Otherwise what the job raised.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting = iter(names)
    processes: list[BaseProcess] = []
    at_work: dict[Any, tuple[BaseProcess, int]] = {}
    try:
        for number in islice(waiting, workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(job, there, workers == 1, os.getpid()), daemon=True)
            processes.append(process)
            process.start()
            there.close()  # so that the process is the only one to hold it, and its death ends what is read here
            here.send(number)
            at_work[here] = process, number
        while at_work:
            connection: Any
            for connection in wait(list(at_work)):
                process, number = at_work[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    raise ChildProcessError(
                        f"the process at part {number} ({names[number]}) died with exit code {process.exitcode} (-9 is what the "
                        "system does when memory is short). What is finished is kept: the same command goes on; fewer workers "
                        "take less memory."
                    ) from None
                if isinstance(message, Exception):
                    raise message
                if message is not None:
                    advance(message)
                elif (following := next(waiting, None)) is None:
                    del at_work[connection]
                else:
                    connection.send(following)
                    at_work[connection] = process, following
    finally:
        for process in processes:  # at once, in the middle of a part too: it appears by a rename
            process.kill()
            process.join()


def _work(job: Job, connection: Connection, alone: bool, parent: int) -> None:
    """Takes numbers and sends back progress (int), an end (None) or an error, until the parent is gone or has had enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the whole terminal gets; the parent then kills
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent may have had other plans for it
    os.environ["TOKENIZERS_PARALLELISM"] = str(alone).lower()

    def advance(progress: int) -> None:
        if os.getppid() != parent:  # killed; whoever starts anew must not find another at work
            os._exit(1)
        connection.send(progress)

    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        try:
            job(number, advance)
            connection.send(None)
        except (ValueError, OSError) as error:
            connection.send(error)
        except Exception as error:
            connection.send(RuntimeError(f"part {number}: {type(error).__name__}: {error}"))
