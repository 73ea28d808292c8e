"""Bandwidth of the GPU's kernels against a copy inside its memory, and equality with the CPU's bits.

    python tools/bench_gpu.py [--megabytes 64] [--tensors 8]

A batch of tensors lies in the GPU's memory; each kernel runs over all of it in one launch. Bandwidth
is bytes read by the kernel per second, and for the copy bytes read and written, so 100 % means that
nothing but the memory limits a kernel. Without a GPU or CuPy one line says so.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from rich.console import Console
from rich.table import Table

from ptqlit.errors import InputError
from ptqlit.statistics.gpu import (Device, count_batch, count_bins, error_blocks, error_sums,
                                   error_sums_numpy, gpu, launch_errors, scan, to_batch)
from ptqlit.statistics.histogram import Counts, count_numpy, needed_k

Clock = Callable[[Callable[[], object]], float]  # seconds of one call
ROUNDS = 20


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    bandwidth: float  # bytes a second
    equal: bool | None  # whether the bits are the CPU's; None for the copy


def activations(count: int, size: int) -> list[np.ndarray]:
    """Values as a network has them: two-sided, behind a Relu, behind a ReLU6, in turn."""
    rng, made = np.random.default_rng(0), []
    for place in range(count):
        x = rng.standard_normal(size, np.float32) * np.float32(3)
        made.append((x, np.maximum(x, 0), np.clip(x, 0, 6))[place % 3])
    return made


def same_counts(a: Counts, b: Counts) -> bool:
    """Whether two counts agree in every field and every bin."""
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Counts))


def rows_of(device: Device, clock: Clock, count: int, size: int) -> list[Row]:
    """Measure the copy and the three kernels over `count` tensors of `size` values."""
    host = activations(count, size)
    rounded = [np.round(x * 16) / 16 for x in host]
    left, right = ([device.take(x) for x in arrays] for arrays in (host, rounded))
    expected = [count_numpy(x) for x in host]
    counts = all(map(same_counts, count_batch(left, device), expected))
    errors = error_sums(left, right, device) == list(map(error_sums_numpy, host, rounded))
    batch, ks = to_batch(left, device), [needed_k(max(-c.lo, c.hi)) for c in expected]
    sizes = np.full(count, size, np.int64)
    blocks, targets = error_blocks(sizes), [device.arrays.empty_like(x) for x in left]
    runs = [
        ("device copy", 2, None, lambda: [device.arrays.copyto(b, a) for a, b in zip(left, targets)]),
        ("min and max", 1, counts, lambda: scan(batch, device)),
        ("histogram", 1, counts, lambda: count_bins(batch, ks, device)),
        ("error measures", 2, errors, lambda: launch_errors([left, right], sizes, blocks, device)),
    ]
    moved = 4 * size * count
    return [Row(name, part * moved / clock(run), equal) for name, part, equal, run in runs]


def gpu_clock(run: Callable[[], object]) -> float:
    """Seconds of a call on the GPU: the median of several rounds between two events."""
    import cupy

    seconds = []
    run()
    for _ in range(ROUNDS):
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record()
        run()
        after.record()
        after.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(before, after) / 1000)
    return float(np.median(seconds))


def to_table(rows: list[Row], title: str) -> Table:
    """The rows as they are printed."""
    table = Table("kernel", "GB/s", "of the copy", "bits", title=title)
    for row in rows:
        bits = {None: "-", True: "equal to the CPU's", False: "DIFFERENT"}[row.equal]
        share = f"{row.bandwidth / rows[0].bandwidth:.0%}"
        table.add_row(row.name, f"{row.bandwidth / 1e9:.1f}", share, bits)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 when any bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=64, help="size of a tensor")
    parser.add_argument("--tensors", type=int, default=8, help="tensors of the batch")
    options = parser.parse_args(arguments)
    try:
        device = gpu()
    except InputError as error:
        print(f"bench-gpu: nothing was measured: {error}")
        return 0
    size = int(options.megabytes * 2**20 / 4)
    rows = rows_of(device, gpu_clock, options.tensors, size)
    Console().print(to_table(rows, f"{options.tensors} tensors of {options.megabytes:g} MB"))
    return int(any(row.equal is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
