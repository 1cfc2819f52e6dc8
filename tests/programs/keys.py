"""Threads that have rights of their own to memory with protection keys (pkeys(7)): `keys.py LOG`."""

import ctypes
import errno
import mmap
import os
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LENGTH = 16 * 4096
NO_ACCESS, NO_WRITE = 1, 2


def checked(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def mapped_with(key):
    at = libc.mmap(None, LENGTH, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ctypes.memset(at, key, LENGTH)
    checked(libc.pkey_mprotect(ctypes.c_void_p(at), LENGTH, 3, key), "pkey_mprotect")
    return at


def told_keys():
    """The key of each mapping, by its address.

    The kernel gives the file piece by piece: after a move in between, the end of a mapping may come without its beginning.
    """
    found, at = {}, None
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            at = int(words[0].split("-")[0], 16)
        elif words[0] == "ProtectionKey:" and at is not None:
            found[at], at = int(words[1]), None
    return found


def may(at, pipe, zeros):
    """Whether the calling thread may read and write there: the kernel heeds the keys as well."""

    def granted(result):
        if result < 0 and ctypes.get_errno() != errno.EFAULT:
            raise OSError(ctypes.get_errno(), "a call")
        return result == 8

    reads = granted(libc.write(pipe[1], ctypes.c_void_p(at + 8), 8))
    contents = os.read(pipe[0], 8) if reads else None
    return reads, contents, granted(libc.read(zeros, ctypes.c_void_p(at), 8))


def main():
    log = open(sys.argv[1], "a", buffering=1)
    keys = [checked(libc.pkey_alloc(0, 0), "pkey_alloc") for _ in range(3)]
    places = {keys[0]: mapped_with(keys[0]), keys[2]: mapped_with(keys[2])}
    checked(libc.pkey_free(keys[1]), "pkey_free")
    zeros = os.open("/dev/zero", os.O_RDONLY)
    rights = [{keys[0]: NO_WRITE, keys[2]: NO_ACCESS}, {keys[0]: 0, keys[2]: NO_WRITE}, {keys[0]: NO_ACCESS, keys[2]: 0}]

    def live(mine):
        pipe = os.pipe()
        for key, right in mine.items():
            checked(libc.pkey_set(key, right), "pkey_set")
        while True:
            for key, right in mine.items():
                found = libc.pkey_get(key), *may(places[key], pipe, zeros)
                reads = right != NO_ACCESS
                if found != (right, reads, bytes([key] * 8) if reads else None, right == 0):
                    log.write(f"MISMATCH key {key} with rights {right}: {found}\n")
                    os._exit(1)
            log.write(f"thread{rights.index(mine)}=1\n")
            time.sleep(0.05)

    for mine in rights:
        threading.Thread(target=live, args=[mine], daemon=True).start()
    while True:
        told = told_keys()
        if any(told.get(at, key) != key for key, at in places.items()):
            log.write(f"MISMATCH the keys are {[told.get(at) for at in places.values()]}\n")
        # The one that was given back is the only one of the three that is free.
        again = checked(libc.pkey_alloc(0, 0), "pkey_alloc")
        if again != keys[1]:
            log.write(f"MISMATCH key {again} is free\n")
        checked(libc.pkey_free(again), "pkey_free")
        log.write("keys=1\n")
        time.sleep(0.05)


main()
