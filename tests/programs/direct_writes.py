"""Writes blocks of a file directly, two at a time, as often as a day of some seconds has it, and notes how long each takes.

usage: direct_writes.py LOG DIRECTORY DAY_S LOW PEAK

LOW, PEAK: writes per second. A day is low, rises from 0.45 to 0.57 of it, is at its peak until 0.90, and low again from 0.95.
A line of LOG: the time since the beginning, in s, and how long a write took, in us. Every tenth block is read again.
"""

import mmap
import os
import struct
import sys
import threading
import time

log_path, directory = sys.argv[1], sys.argv[2]
day, low, peak = (float(word) for word in sys.argv[3:6])
log = open(log_path, "a", buffering=1)
BLOCK, BLOCKS, WRITERS = 4096, 512, 2
PATTERN = [(0.0, low), (0.45, low), (0.57, peak), (0.90, peak), (0.95, low), (1.0, low)]

path = os.path.join(directory, "blocks")
with open(path, "wb") as file:
    file.write(bytes(BLOCK * BLOCKS))
    os.fsync(file.fileno())
file = os.open(path, os.O_RDWR | os.O_DIRECT)
begun = time.monotonic()


def rate(at):
    share = at / day % 1.0
    for (start, a), (end, b) in zip(PATTERN, PATTERN[1:]):
        if share <= end:
            return a + (b - a) * (share - start) / (end - start)
    return low


def write(writer):
    # Aligned, as direct I/O asks for.
    block, read = mmap.mmap(-1, BLOCK), mmap.mmap(-1, BLOCK)
    written = {}
    number, due, last = 0, 0.0, time.monotonic()
    while True:
        now = time.monotonic()
        # What could not be done in time is not made up for.
        due = min(due + rate(now - begun) / WRITERS * (now - last), 2.0)
        last = now
        if due < 1.0:
            time.sleep(0.002)
            continue
        due -= 1.0
        number += 1
        at = number * WRITERS % BLOCKS + writer
        block[:8] = block[-8:] = struct.pack("<Q", number)
        before = time.monotonic()
        os.pwritev(file, [block], at * BLOCK)
        took = time.monotonic() - before
        written[at] = number
        log.write(f"{before - begun:.6f} {took * 1e6:.0f}\n")
        if number % 10 == 0:
            at = list(written)[number // 10 % len(written)]
            os.preadv(file, [read], at * BLOCK)
            expected = struct.pack("<Q", written[at])
            if read[:8] != expected or read[-8:] != expected:
                log.write(f"WRONG: block {at} has not {written[at]}\n")
                os._exit(1)


for writer in range(WRITERS):
    threading.Thread(target=write, args=(writer,)).start()
