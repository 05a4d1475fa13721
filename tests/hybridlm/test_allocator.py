import platform
import subprocess
import sys

import pytest

PAGES_OF_THE_LAST_TENSOR = """
import resource, sys, torch
from hybridlm.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    before = pages()
    torch.ones(2**24)  # 64 MB
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """In processes of their own: it cannot be undone."""
    run = [sys.executable, "-c", PAGES_OF_THE_LAST_TENSOR]
    handed_back, kept = (
        int(subprocess.run([*run, how], capture_output=True, text=True, check=True).stdout) for how in ("default", "keep")
    )
    assert kept < 100 < handed_back
