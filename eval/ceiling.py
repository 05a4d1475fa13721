"""What the machine can do at most: the ends that speeds are held against."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (m, k, n), from the smallest to the largest: one is tried where those before it say that it will not take long.
PRODUCTS = ((256, 256, 256), (1024, 1024, 1024), (4096, 512, 2048), (4096, 2048, 512), (2048,) * 3, (4096,) * 3)
TOO_LONG = 1.0  # seconds for one product: without bf16 units, bf16 runs at a hundredth of fp32
COPIED = READ = 2**29  # bytes, past every cache
TIMES = 7


def ceiling(
    threads: int, products: tuple[tuple[int, ...], ...] = PRODUCTS, copied: int = COPIED, read: int = READ
) -> dict[str, Any]:
    """Per precision FLOP/s of the fastest matrix product and bytes/s read by a matrix-vector product; bytes/s of a copy."""
    torch.set_num_threads(threads)
    return {
        "flops_per_second": {name: fastest_product(dtype, products) for name, dtype in DTYPES.items()},
        "read_bytes_per_second": {name: matrix_vector(dtype, read) for name, dtype in DTYPES.items()},
        "copy_bytes_per_second": copy(copied),
    }


def fastest_product(dtype: torch.dtype, products: tuple[tuple[int, ...], ...] = PRODUCTS) -> float:
    """FLOP/s: of each size the median, of all sizes the largest."""
    best = 0.0
    for m, k, n in products:
        flops = 2 * m * k * n
        if best and flops / best > TOO_LONG:
            break
        a, b, out = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
        best = max(best, flops / median_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))  # type: ignore[misc]
    return best


def matrix_vector(dtype: torch.dtype, nbytes: int = READ) -> float:
    """Bytes of the matrix a second."""
    columns = 1024
    a = torch.ones(nbytes // dtype.itemsize // columns, columns, dtype=dtype)
    x, out = torch.ones(columns, dtype=dtype), torch.empty(len(a), dtype=dtype)
    return a.nbytes / median_seconds(lambda: torch.mv(a, x, out=out))


def copy(nbytes: int = COPIED) -> float:
    """Bytes read and bytes written, together, a second."""
    a = torch.ones(nbytes // 4)
    out = torch.empty_like(a)
    return 2 * a.nbytes / median_seconds(lambda: out.copy_(a))


def median_seconds(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
