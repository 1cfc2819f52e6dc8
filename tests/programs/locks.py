"""What programs that hold locks and verify them have in common; the first argument is their log's path."""

import errno
import os
import struct
import sys

log = open(sys.argv[1], "a", buffering=1)
F_OFD_SETLK = 37


def check(truth, *what):
    if not truth:
        log.write(f"WRONG: {what}\n")
        os._exit(1)


def lock(kind, start, length):
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


def is_taken(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    return False
