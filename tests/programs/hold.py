"""A program with memory that can't be compressed, some of which it rewrites all the time.

usage: hold.py LOG MIB PAGES_PER_SECOND

Each line of LOG says how many pages were rewritten so far.
"""

import os
import random
import sys
import time

PAGE = 4096
NAP_S = 0.02

log = open(sys.argv[1], "a", buffering=1)
pages = int(sys.argv[2]) * 2**20 // PAGE
at_once = max(1, int(float(sys.argv[3]) * NAP_S))
memory = bytearray().join(os.urandom(2**20) for _ in range(int(sys.argv[2])))
written = 0
while True:
    for _ in range(at_once):
        at = random.randrange(pages) * PAGE
        memory[at : at + PAGE] = os.urandom(PAGE)
    written += at_once
    log.write(f"{written}\n")
    time.sleep(NAP_S)
