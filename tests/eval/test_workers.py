import os
import threading
import time

import psutil
import pytest
import torch

from eval.workers import peak_memory, resident, worker


def test_a_process_of_its_own():
    with worker("eval.workers") as pool:
        assert pool.submit(os.getpid).result() not in (os.getpid(), None)


def test_an_error_ends_what_it_computes():
    """Nobody waits for the minute that it sleeps."""
    with pytest.raises(KeyboardInterrupt), worker("eval.workers") as pool:
        process = psutil.Process(pool.submit(os.getpid).result())
        running = pool.submit(time.sleep, 60)
        raise KeyboardInterrupt
    assert running.exception() is not None
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_worker_that_died_is_no_further_error():
    with pytest.raises(ValueError, match="mine"), worker("eval.workers") as pool:
        assert pool.submit(os._exit, 1).exception() is not None
        raise ValueError("mine")


def test_ctrl_c_is_not_for_the_workers():
    with worker("eval.workers") as pool:
        pool.submit(os.kill, pool.submit(os.getpid).result(), 2).result()
        assert pool.submit(abs, -1).result() == 1


def test_the_peak_is_of_what_was_held_for_a_while():
    before = resident()
    with peak_memory() as peak:
        held = torch.ones(2**26)
        deadline = time.monotonic() + 60
        while peak[0] - before < 2**27 and time.monotonic() < deadline:
            time.sleep(0.001)
        del held
    assert abs(peak[0] - before - 2**28) < 2**25
    with peak_memory(60) as peak:  # ends at once, whatever the interval, and looks once more
        held = torch.ones(2**26)
    assert peak[0] - before > 2**27
    del held


def test_watching_ends_with_an_error():
    with pytest.raises(ValueError, match="mine"), peak_memory():
        raise ValueError("mine")
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(watch)")]
