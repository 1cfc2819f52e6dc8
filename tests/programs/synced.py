"""Writes a page of a file, syncs it, and verifies another one, round by round.

usage: synced.py LOG DIRECTORY PAUSE_S PAGES

The file has all its pages from the start: a round is one request of the disk's.
"""

import os
import sys
import time

log_path, directory, pause, pages = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
PAGE = 4096


def page(number, version):
    return f"page {number}, version {version}\n".encode().ljust(PAGE, b".")


log = open(log_path, "a", buffering=1)
file = os.open(os.path.join(directory, "synced"), os.O_CREAT | os.O_RDWR, 0o600)
versions = [0] * pages
for number in range(pages):
    os.pwrite(file, page(number, 0), number * PAGE)
os.fsync(file)
made = 0
while True:
    made += 1
    number = made * 7919 % pages
    versions[number] = made
    os.pwrite(file, page(number, made), number * PAGE)
    os.fdatasync(file)
    other = made * 104729 % pages
    if os.pread(file, PAGE, other * PAGE) != page(other, versions[other]):
        log.write(f"WRONG: page {other}\n")
        sys.exit(1)
    log.write(f"round={made}\n")
    time.sleep(pause)
