"""Has no room for a second mapping of its file, until LOG.free exists; holds locks and offsets, and verifies them.

usage: limited.py LOG DIRECTORY
"""

import errno
import fcntl
import mmap
import os
import resource
import sys
import time

log_path, directory = sys.argv[1:3]
log = open(log_path, "a", buffering=1)
LENGTH = 64 << 20


def check(truth, *what):
    if not truth:
        log.write(f"WRONG: {what}\n")
        sys.exit(1)


os.chdir(directory)
contents = os.open("contents", os.O_CREAT | os.O_RDWR)
os.pwrite(contents, b"first", 0)
os.truncate(contents, LENGTH)
private = mmap.mmap(contents, LENGTH, flags=mmap.MAP_PRIVATE)
private[8192:8197] = b"dirty"
shared = mmap.mmap(contents, LENGTH)
deleted = os.open("deleted", os.O_CREAT | os.O_RDWR)
os.unlink("deleted")
appended = os.open("appended", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
locked = os.open("locked", os.O_CREAT | os.O_RDWR)
fcntl.flock(locked, fcntl.LOCK_EX)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
number = 0
while True:
    number += 1
    check(os.lseek(deleted, 0, os.SEEK_CUR) == 8 * (number - 1) and os.fstat(deleted).st_nlink == 0, "deleted", number)
    os.write(deleted, b"%08d" % number)
    os.write(appended, b"%08d" % number)
    check(os.stat("appended").st_size == 8 * number == os.fstat(deleted).st_size, "appended")
    shared[4096:4104] = b"%08d" % number
    check(os.pread(contents, 8, 4096) == b"%08d" % number, "the shared mapping")
    check(private[0:5] == b"first" and private[8192:8197] == b"dirty", "the private mapping")
    again = os.open("locked", os.O_RDWR)
    try:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check(False, "the lock is lost")
    except OSError as error:
        check(error.errno == errno.EAGAIN, error)
    os.close(again)
    check(os.readlink(f"/proc/self/fd/{locked}") == f"{directory}/locked", "its name")
    if os.path.exists(log_path + ".free"):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write(f"round={number}\n")
    time.sleep(0.005)
