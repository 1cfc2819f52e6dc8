"""Holds locks of every kind on files that it holds in no other way, or maps as well, and verifies them. Has no room for a second mapping of its
large file, until LOG.free exists.

usage: locked.py LOG DIRECTORY
"""

import fcntl
import mmap
import os
import resource
import sys
import time

from locks import F_OFD_SETLK, check, is_taken, lock, log

directory = sys.argv[2]
LENGTH = 64 << 20


def opened(name):
    return os.open(f"{directory}/{name}", os.O_CREAT | os.O_RDWR)


# Its working directory is elsewhere.
whole, of_description, of_process, mapped = [opened(name) for name in ("whole", "of-description", "of-process", "mapped")]
os.truncate(mapped, 4096)
small = mmap.mmap(mapped, 4096)
contents = opened("contents")
os.pwrite(contents, b"first", 0)
os.truncate(contents, LENGTH)
# Below the other one, so that this is the first that could not be made again.
private = mmap.mmap(contents, LENGTH, flags=mmap.MAP_PRIVATE)
private[8192:8197] = b"dirty"
os.close(contents)

to_second, to_first = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(whole), os.close(of_description), os.close(of_process), os.close(mapped)
    os.close(to_second[1])
    while os.read(to_second[0], 1):
        for name in ("of-process", "mapped"):
            others = opened(name)
            check(is_taken(lambda: fcntl.fcntl(others, fcntl.F_SETLK, lock(fcntl.F_WRLCK, 14, 1))), "the lock is lost", name)
            check(not is_taken(lambda: fcntl.fcntl(others, fcntl.F_SETLK, lock(fcntl.F_WRLCK, 15, 1))), "it has grown", name)
            # With it goes what this one has locked.
            os.close(others)
        os.write(to_first[1], b".")
    os._exit(0)
os.close(to_first[1])

fcntl.flock(whole, fcntl.LOCK_EX)
fcntl.fcntl(of_description, F_OFD_SETLK, lock(fcntl.F_WRLCK, 5, 10))
fcntl.fcntl(of_process, fcntl.F_SETLK, lock(fcntl.F_WRLCK, 5, 10))
fcntl.fcntl(mapped, fcntl.F_SETLK, lock(fcntl.F_RDLCK, 5, 10))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
number = 0
while True:
    number += 1
    small[0:8] = b"%08d" % number
    check(os.pread(mapped, 8, 0) == b"%08d" % number, "the mapping's file")
    check(private[0:5] == b"first" and private[8192:8197] == b"dirty", "the private mapping")
    again = opened("whole")
    check(is_taken(lambda: fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)), "flock is lost")
    os.close(again)
    again = opened("of-description")
    check(is_taken(lambda: fcntl.fcntl(again, F_OFD_SETLK, lock(fcntl.F_WRLCK, 14, 1))), "the description's lock is lost")
    os.close(again)
    os.write(to_second[1], b".")
    check(os.read(to_first[0], 1) == b".", "the other process has ended")
    if os.path.exists(log.name + ".free"):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write(f"round={number}\n")
    time.sleep(0.005)
