"""Writes numbered blocks to a file, syncs each, and keeps a processor busy, both as much as it is told; verifies all blocks that it wrote last.

usage: needs.py LOG DIRECTORY

LOG.rates has two numbers: blocks per second, and cores. A line of LOG: round=NUMBER, when that block is on the disk.
"""

import os
import struct
import sys
import time

log_path, directory = sys.argv[1], sys.argv[2]
BLOCK, BLOCKS, KEPT = 4096, 256, 64


def rates():
    with open(log_path + ".rates") as file:
        return [float(word) for word in file.read().split()]


if os.fork() == 0:
    while True:
        share = min(rates()[1], 1.0)
        until = time.monotonic() + 0.02 * share
        while time.monotonic() < until:
            pass
        time.sleep(0.02 * (1.0 - share) + 0.0001)

log = open(log_path, "a", buffering=1)
path = os.path.join(directory, "blocks")
file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
os.pwrite(file, bytes(BLOCK * BLOCKS), 0)
os.fsync(file)


def contents(number):
    return struct.pack("<Q", number) * (BLOCK // 8)


number = 0
while True:
    number += 1
    os.pwrite(file, contents(number), number % BLOCKS * BLOCK)
    os.fdatasync(file)
    for before in range(max(1, number - KEPT), number + 1):
        if os.pread(file, BLOCK, before % BLOCKS * BLOCK) != contents(before):
            log.write(f"WRONG: block {before}\n")
            sys.exit(1)
    if os.stat(path).st_ino != os.fstat(file).st_ino:
        # A move comes between the two looks at most once.
        if os.stat(path).st_ino != os.fstat(file).st_ino:
            log.write("WRONG: the open file is another one than that of its name\n")
            sys.exit(1)
    log.write(f"round={number}\n")
    time.sleep(1.0 / rates()[0])
