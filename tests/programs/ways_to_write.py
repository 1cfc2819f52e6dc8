"""Changes files in every way that there is, and compares all of them with what they must hold when they have come to another file system.

usage: ways_to_write.py LOG DIRECTORY PAUSE_S SEED
"""

import ctypes
import errno
import mmap
import os
import random
import sys
import time

log_path, directory, pause, seed = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
log = open(log_path, "a", buffering=1)
chance = random.Random(seed)
PAGE = 4096
LENGTH = 4 << 20
KEEP_SIZE, PUNCH, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
aligned = mmap.mmap(-1, 16 * PAGE)
files, must_hold = {}, {}


def make(name, flags=0):
    files[name] = os.open(os.path.join(directory, name), os.O_CREAT | os.O_RDWR | flags)
    must_hold[name] = bytearray(os.urandom(LENGTH))
    for at in range(0, LENGTH, 1 << 20):
        os.pwrite(files[name], must_hold[name][at : at + (1 << 20)], at)


def contents(bytes_at_most):
    return chance.randbytes(chance.randint(1, bytes_at_most))


def place(length, unit=1):
    return chance.randrange(max(1, (LENGTH - length) // unit)) * unit


def write(name, bytes_at_most=20_000):
    data = contents(bytes_at_most)
    at = place(len(data))
    os.pwrite(files[name], data, at)
    hold = must_hold[name]
    hold.extend(bytes(max(0, at + len(data) - len(hold))))
    hold[at : at + len(data)] = data


def store(name):
    data = contents(9000)
    at = place(len(data))
    maps[name][at : at + len(data)] = data
    must_hold[name][at : at + len(data)] = data
    if chance.random() < 0.02:
        maps[name].flush()


def no_time(name):
    os.utime(files[name], ns=(1, 1))


def direct(name):
    length = chance.randint(1, 16) * PAGE
    aligned[:length] = chance.randbytes(length)
    at = place(length, PAGE)
    with memoryview(aligned) as view:
        os.pwritev(descriptor_of_direct, [view[:length]], at)
    must_hold[name][at : at + length] = aligned[:length]


def allocate(name):
    hold, length = must_hold[name], chance.randint(1, 8) * PAGE
    mode = chance.choice([PUNCH | KEEP_SIZE, ZERO, COLLAPSE, INSERT])
    if len(hold) < LENGTH // 2 or len(hold) > LENGTH:
        mode = INSERT if len(hold) < LENGTH // 2 else COLLAPSE
    at = chance.randrange((len(hold) - length) // PAGE) * PAGE
    if libc.fallocate(files[name], mode, at, length) != 0:
        if ctypes.get_errno() == errno.EOPNOTSUPP:
            # Not every file system can collapse and insert.
            return
        sys.exit(f"fallocate {mode}: {os.strerror(ctypes.get_errno())}")
    if mode == COLLAPSE:
        del hold[at : at + length]
    elif mode == INSERT:
        hold[at:at] = bytes(length)
    else:
        hold[at : at + length] = bytes(length)


def cut(name):
    length = chance.randrange(LENGTH)
    os.truncate(files[name], length)
    hold = must_hold[name]
    del hold[length:]
    hold.extend(bytes(length - len(hold)))


def append(name):
    hold = must_hold[name]
    if len(hold) > LENGTH + (1 << 20):
        os.truncate(files[name], 0)
        hold.clear()
    data = contents(9000)
    os.pwrite(files[name], data, len(hold))
    hold.extend(data)


def long(name):
    at = place(1 << 20)
    data = chance.randbytes(1 << 20)
    os.pwrite(files[name], data, at)
    must_hold[name][at : at + len(data)] = data


def check(name):
    hold = must_hold[name]
    found = os.pread(files[name], len(hold) + 1, 0)
    if found != bytes(hold):
        wrong = [at for at in range(0, max(len(hold), len(found)), PAGE) if found[at : at + PAGE] != hold[at : at + PAGE]]
        log.write(f"WRONG: seed {seed}: {name} in round {number}, {len(found)} bytes of {len(hold)}, pages at {wrong[:20]}\n")
        sys.exit(1)


for name in ("written", "stored", "both", "timeless", "direct", "allocated", "cut", "appended", "long"):
    make(name)
descriptor_of_direct = os.open(os.path.join(directory, "direct"), os.O_RDWR | os.O_DIRECT)
maps = {name: mmap.mmap(files[name], LENGTH) for name in ("stored", "both", "timeless")}
WAYS = [
    ("written", [write]),
    ("stored", [store]),
    ("both", [write, store]),
    ("timeless", [store, no_time]),
    ("direct", [direct, direct, write]),
    ("allocated", [allocate]),
    ("cut", [cut, write]),
    ("appended", [append]),
    ("long", [write]),
]
device = None
number = 0
while True:
    number += 1
    name, ways = WAYS[number % len(WAYS)]
    chance.choice(ways)(name)
    if number % 97 == 0:
        long("long")
    found = os.fstat(files["written"]).st_dev
    if found != device or number % 2000 == 0:
        device = found
        for name in files:
            check(name)
    log.write(f"round={number}\n")
    time.sleep(pause)
