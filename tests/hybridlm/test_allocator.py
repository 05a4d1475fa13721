import multiprocessing
import platform
import resource

import pytest
import torch

from hybridlm.allocator import keep_freed_memory


def pages_of_the_last_tensor():
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def before_and_after(results):
    handed_back = pages_of_the_last_tensor()
    keep_freed_memory()
    results.put((handed_back, pages_of_the_last_tensor()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """In a process of its own: it cannot be undone."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=before_and_after, args=(results,))
    process.start()
    process.join()
    assert process.exitcode == 0
    handed_back, kept = results.get()
    assert kept < 100 < handed_back
