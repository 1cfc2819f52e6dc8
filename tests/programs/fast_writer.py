"""Rewrites a file faster than anybody could copy it, until `LOG.slow` is there.

usage: fast_writer.py LOG DIRECTORY BYTES
"""

import os
import random
import sys
import time

log_path, directory, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
log = open(log_path, "a", buffering=1)
CHUNK = 1 << 20
noise = os.urandom(8 * CHUNK)
chance = random.Random(3)
file = os.open(os.path.join(directory, "file"), os.O_CREAT | os.O_RDWR)
must_hold = {}


def write(chunk):
    at = chance.randrange(7 * CHUNK)
    os.pwrite(file, noise[at : at + CHUNK], chunk * CHUNK)
    must_hold[chunk] = at


for chunk in range(length // CHUNK):
    write(chunk)
number = 0
device = None
while True:
    number += 1
    slow = os.path.exists(log_path + ".slow")
    for _ in range(1 if slow else 16):
        write(chance.randrange(length // CHUNK))
    found = os.fstat(file).st_dev
    if found != device:
        device = found
        for chunk, at in must_hold.items():
            if os.pread(file, CHUNK, chunk * CHUNK) != noise[at : at + CHUNK]:
                log.write(f"WRONG: chunk {chunk} in round {number}\n")
                sys.exit(1)
    log.write(f"round={number}\n")
    if slow:
        time.sleep(0.02)
