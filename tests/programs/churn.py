"""A program that uses its memory as an allocator does: it writes a few bytes here and there, and gives whole stretches back.

usage: churn.py LOG MIB WRITES_PER_BURST

It keeps, apart from the memory, what every page must begin with, and looks before it writes. A page that was given back must be
zero. Each line of LOG says what has been verified so far; a line that begins with MISMATCH says what was found.
"""

import array
import mmap
import random
import sys
import time

PAGE = 4096
# Wherever it begins, some page tables are wholly within it: the kernel frees them.
STRETCH = 6 * 2**20 // PAGE
NAP_S = 0.004

log = open(sys.argv[1], "a", buffering=1)
pages = int(sys.argv[2]) * 2**20 // PAGE
writes = int(sys.argv[3])
memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
stamps = array.array("Q", bytes(8 * pages))
verified = 0


def verify(page):
    global verified
    at = page * PAGE
    found = int.from_bytes(memory[at : at + 8], "little")
    if found != stamps[page]:
        log.write(f"MISMATCH page {page} begins with {found:#x}, but {stamps[page]:#x} was written\n")
        sys.exit(1)
    verified += 1


def write(page, stamp):
    stamps[page] = stamp
    memory[page * PAGE : page * PAGE + 8] = stamp.to_bytes(8, "little")


chance = random.Random(1)
for page in range(pages):
    write(page, chance.getrandbits(63) | 1)
line = 0
while True:
    for _ in range(writes):
        page = chance.randrange(pages)
        verify(page)
        write(page, chance.getrandbits(63) | 1)
    if line % 8 == 0:
        first = chance.randrange(pages - STRETCH)
        memory.madvise(mmap.MADV_DONTNEED, first * PAGE, STRETCH * PAGE)
        for page in range(first, first + STRETCH):
            stamps[page] = 0
    if line % 64 == 63:
        for page in range(pages):
            verify(page)
    log.write(f"line={line} verified={verified}\n")
    line += 1
    time.sleep(NAP_S)
