"""Works in two directories at once, with descriptors, locks and mappings in both, and verifies the sums of all that it wrote to either.

usage: two_volumes.py LOG FIRST SECOND PAUSE_S
"""

import fcntl
import mmap
import os
import sys
import time
import zlib

log_path, directories, pause = sys.argv[1], sys.argv[2:4], float(sys.argv[4])
log = open(log_path, "a", buffering=1)
PAGE, PAGES = 4096, 64


def check(truth, *what):
    if not truth:
        log.write(f"WRONG: {what}\n")
        os._exit(1)


class Half:
    """One of the two."""

    def __init__(self, directory):
        self.directory = directory
        self.pages = [bytes(PAGE)] * PAGES
        self.file = self.opened("pages")
        os.pwrite(self.file, b"".join(self.pages), 0)
        self.appended, self.sum, self.length = self.opened("appended", os.O_APPEND), 0, 0
        self.mapped_file = self.opened("mapped")
        os.truncate(self.mapped_file, PAGE)
        self.mapping = mmap.mmap(self.mapped_file, PAGE)
        self.deleted = self.opened("deleted")
        os.unlink(f"{directory}/deleted")
        self.locked = self.opened("locked")
        fcntl.flock(self.locked, fcntl.LOCK_EX)

    def opened(self, name, flags=0):
        return os.open(f"{self.directory}/{name}", os.O_CREAT | os.O_RDWR | flags)

    def round(self, number):
        line = b"%08d\n" % number
        at = number * 7 % PAGES
        self.pages[at] = line.ljust(PAGE, b".")
        os.pwrite(self.file, self.pages[at], at * PAGE)
        os.write(self.appended, line)
        self.sum, self.length = zlib.crc32(line, self.sum), self.length + len(line)
        self.mapping[0:9] = line
        os.write(self.deleted, line)

    def verify(self, number):
        line, where = b"%08d\n" % number, self.directory
        due = zlib.crc32(b"".join(self.pages))
        check(zlib.crc32(os.pread(self.file, PAGE * PAGES, 0)) == due, "the sum of the pages", where)
        for name, descriptor in (("appended", self.appended), ("deleted", self.deleted)):
            check(zlib.crc32(os.pread(descriptor, self.length + 1, 0)) == self.sum, "the sum of what was", name, where)
        with open(f"{where}/appended", "rb") as again:
            check(zlib.crc32(again.read()) == self.sum, "the sum, by its name", where)
        check(os.pread(self.mapped_file, 9, 0) == line, "the mapping's file", where)
        again = self.opened("locked")
        try:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check(False, "flock is lost", where)
        except BlockingIOError:
            pass
        os.close(again)


halves = [Half(directory) for directory in directories]
os.chdir(directories[0])
number = 0
while True:
    number += 1
    for half in halves:
        half.round(number)
    for half in halves:
        half.verify(number)
    check(os.path.samefile(".", directories[0]), "the working directory")
    log.write(f"round={number}\n")
    time.sleep(pause)
