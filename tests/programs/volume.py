"""Works in a directory in every way that a program can, and verifies each time that all is as it left it.

usage: volume.py LOG DIRECTORY PAUSE_S BYTES

BYTES: length of a file of which a page is rewritten in each round.
"""

import ctypes
import mmap
import os
import stat
import struct
import sys
import time

log_path, directory, pause, length = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
log = open(log_path, "a", buffering=1)
os.chdir(directory)
KEPT = 8


def check(truth, *what):
    if not truth:
        log.write(f"WRONG: {what}\n")
        sys.exit(1)


def are_links(n):
    return os.stat(f"ring/{n}").st_nlink == 2 and os.path.samefile(f"ring/{n}", f"link/linked{n}")


def contents(number):
    return (f"file {number}\n" * 1000).encode()


os.mkdir("ring")
os.symlink("ring", "link")
os.mkfifo("fifo", 0o620)
appended = os.open("appended", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o640)
written = os.open("written", os.O_CREAT | os.O_RDWR, 0o600)
big = os.open("big", os.O_CREAT | os.O_RDWR, 0o600)
os.truncate(big, length)
for at in range(0, length, 1 << 20):
    os.pwrite(big, os.urandom(min(1 << 20, length - at)), at)
sparse = os.open("sparse", os.O_CREAT | os.O_RDWR)
os.pwrite(sparse, b"end", 100 << 20)
shared_file = os.open("shared", os.O_CREAT | os.O_RDWR)
os.truncate(shared_file, 64 * 4096)
shared = mmap.mmap(shared_file, 64 * 4096)
private_file = os.open("private", os.O_CREAT | os.O_RDWR)
os.write(private_file, b"p" * 8192)
private = mmap.mmap(private_file, 8192, flags=mmap.MAP_PRIVATE)
private[0:5] = b"dirty"
# Longer mappings than the file, which grows and shrinks.
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
short_file = os.open("short", os.O_CREAT | os.O_RDWR)
os.write(short_file, b"s" * 5000)
beyond = [libc.mmap(None, 4 * 4096, 3, sharing, short_file, 0) for sharing in (mmap.MAP_SHARED, mmap.MAP_PRIVATE)]
hole = mmap.mmap(sparse, 64 << 20, prot=mmap.PROT_READ)


def can_be_read(at):
    data = ctypes.create_string_buffer(8)
    local, remote = struct.pack("<QQ", ctypes.addressof(data), 8), struct.pack("<QQ", at, 8)
    return libc.process_vm_readv(os.getpid(), local, 1, remote, 1, 0) == 8


os.mkdir("owned", 0o2750)
os.chown("owned", 1234, 4321)
os.chmod("owned", 0o2750)
os.utime("owned", ns=(1, 1_000_000_123))
with open("owned/attributes", "w") as file:
    file.write("a")
os.utime("owned/attributes", ns=(1, 2_000_000_456))
os.utime("owned", ns=(1, 1_000_000_123))
try:
    os.setxattr("owned/attributes", "user.colour", b"blue")
    attributes = [("user.colour", b"blue")]
except OSError:
    attributes = []

number = 0
pages = {}
while True:
    number += 1
    os.write(appended, b"%08d\n" % number)
    check(os.stat("appended").st_size == 9 * number, "appended", os.stat("appended").st_size, number)
    with open("appended", "rb") as file:
        file.seek(-9, os.SEEK_END)
        check(file.read() == b"%08d\n" % number, "the end of what was appended")

    with open(f"ring/new{number}", "wb") as file:
        file.write(contents(number))
    os.rename(f"ring/new{number}", f"ring/{number}")
    os.link(f"ring/{number}", f"ring/linked{number}")
    if number > KEPT:
        os.unlink(f"ring/{number - KEPT}")
        os.unlink(f"ring/linked{number - KEPT}")
    kept = range(max(1, number - KEPT + 1), number + 1)
    check(sorted(os.listdir("ring")) == sorted([str(n) for n in kept] + [f"linked{n}" for n in kept]), os.listdir("ring"))
    for n in kept:
        # A second look: inode numbers are others after a move, which may come between the two that are compared.
        check(are_links(n) or are_links(n), "links of", n)
        with open(f"ring/linked{n}", "rb") as file:
            check(file.read() == contents(n), "contents of", n)

    # The offset is the descriptor's own.
    check(os.lseek(written, 0, os.SEEK_CUR) == 100 * (number - 1), "the offset")
    os.write(written, b"%099d\n" % number)
    check(os.pread(written, 100, 100 * (number - 1)) == b"%099d\n" % number, "what was written")

    page = number * 7 % 64
    for at, value in pages.items():
        check(shared[at * 4096:at * 4096 + 8] == b"%08d" % value, "shared page", at, value)
        check(os.pread(shared_file, 8, at * 4096) == b"%08d" % value, "shared page in the file", at, value)
    shared[page * 4096:page * 4096 + 8] = b"%08d" % number
    pages[page] = number
    if number % 50 == 0:
        shared.flush()
    check(private[0:6] == b"dirtyp" and private[4096:4097] == b"p", "the private mapping")
    check(os.pread(private_file, 6, 0) == b"pppppp", "the private mapping's file")

    os.pwrite(big, os.urandom(4096), number * 4096 % length)
    check(os.pread(sparse, 3, 100 << 20) == b"end" and os.pread(sparse, 9, 5 << 20) == bytes(9), "the sparse file")
    check(os.stat("sparse").st_blocks < 2048, "the hole was filled", os.stat("sparse").st_blocks)
    for at in beyond:
        check(ctypes.string_at(at + 4990, 20) == b"s" * 10 + bytes(10), "the end of the short file")
        check(can_be_read(at + 8180) and not can_be_read(at + 8192), "what is behind its end")
    os.truncate(short_file, 9000)
    check(can_be_read(beyond[0] + 8192) and not can_be_read(beyond[0] + 12288), "where it has grown")
    os.truncate(short_file, 5000)
    check(hole[5 << 20:(5 << 20) + 9] == bytes(9), "the hole, mapped")
    check(stat.S_ISFIFO(os.stat("fifo").st_mode) and os.readlink("link") == "ring", "FIFO and link")
    owned = os.stat("owned")
    check((owned.st_uid, owned.st_gid, stat.S_IMODE(owned.st_mode)) == (1234, 4321, 0o2750), "owner and mode")
    check(owned.st_mtime_ns == 1_000_000_123, "the directory's time", owned.st_mtime_ns)
    check(os.stat("owned/attributes").st_mtime_ns == 2_000_000_456, "the file's time")
    for name, value in attributes:
        check(os.getxattr("owned/attributes", name) == value, "extended attribute", name)
    log.write(f"round={number}\n")
    time.sleep(pause)
