"""Holds files of a directory in every way that a descriptor can, in two processes, and verifies each time that all is as it
left it.

usage: rehomed.py LOG DIRECTORY PAUSE_S
"""

import fcntl
import mmap
import os
import sys
import time

from locks import F_OFD_SETLK, check, is_taken, lock, log

directory, pause = sys.argv[2], float(sys.argv[3])


def same_file(*places):
    """Whether these are one file. It has another number when its volume has moved between two looks, so it is looked at again."""
    return any(len({os.stat(place).st_ino for place in places}) == 1 for _ in range(3))


os.chdir(directory)
os.mkdir("below")
below = os.open("below", os.O_RDONLY | os.O_DIRECTORY)
os.chdir("below")

# Both processes have this description: its offset is theirs.
common = os.open("common", os.O_CREAT | os.O_RDWR, 0o640)
appended = os.open("appended", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
twice = os.dup2(common, 77, inheritable=False)
read_only = os.open("common", os.O_RDONLY)
path_only = os.open("common", os.O_PATH)

deleted = os.open("deleted", os.O_CREAT | os.O_RDWR)
os.write(deleted, b"d" * 10000)
os.unlink("deleted")
deleted_and_mapped = os.open("deleted-and-mapped", os.O_CREAT | os.O_RDWR)
os.truncate(deleted_and_mapped, 4 * 4096)
deleted_mapping = mmap.mmap(deleted_and_mapped, 4 * 4096)
os.unlink("deleted-and-mapped")
# Of this one nothing but the mapping is left.
only_mapped = os.open("only-mapped", os.O_CREAT | os.O_RDWR)
os.truncate(only_mapped, 4096)
only_mapping = mmap.mmap(only_mapped, 4096)
os.close(only_mapped)
temporary = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
os.write(temporary, b"t" * 5000)

with open("text", "wb") as file:
    file.write(b"x" * 3 * 4096)
text = os.open("text", os.O_RDONLY)
private = mmap.mmap(text, 3 * 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
private[4096:4101] = b"dirty"
os.close(text)

whole = os.open("flock", os.O_CREAT | os.O_RDWR)
fcntl.flock(whole, fcntl.LOCK_EX)
posix = os.open("posix", os.O_CREAT | os.O_RDWR)
os.truncate(posix, 1000)
own = os.open("ofd", os.O_CREAT | os.O_RDWR)
fcntl.fcntl(own, F_OFD_SETLK, lock(fcntl.F_WRLCK, 5, 10))

to_second, to_first = os.pipe(), os.pipe()
second = os.fork() == 0
if not second:
    # Of a process alone: after fork(2) it is nobody else's.
    fcntl.fcntl(posix, fcntl.F_SETLK, lock(fcntl.F_WRLCK, 100, 50))
    others = os.open("posix", os.O_RDWR)
    fcntl.fcntl(posix, fcntl.F_SETLK, lock(fcntl.F_RDLCK, 300, 50))
turn, pass_on = (to_second[0], to_first[1]) if second else (to_first[0], to_second[1])

number = 0
while True:
    number += 1
    if second:
        os.read(turn, 1)
    # Each writes in its turn, at the common offset.
    at = os.lseek(common, 0, os.SEEK_CUR)
    due = (2 * (number - 1) + (1 if second else 0)) * 8
    check(at == due, "the common offset", second, at, due)
    os.write(twice if number % 2 else common, b"%07d\n" % number)
    check(os.pread(read_only, 8, due) == b"%07d\n" % number, "what was written")
    os.write(appended, b"%07d\n" % number)
    check(os.fstat(appended).st_size == due + 8, "what was appended", os.fstat(appended).st_size)
    check(same_file("appended", appended), "the appended file's name")
    check(same_file("common", path_only, common), "O_PATH")
    check(same_file(".", below), "the directory")
    check(os.getcwd().endswith("/below"), "the working directory", os.getcwd())
    check(fcntl.fcntl(appended, fcntl.F_GETFL) & (os.O_APPEND | os.O_ACCMODE) == os.O_APPEND | os.O_WRONLY, "flags")
    check(fcntl.fcntl(77, fcntl.F_GETFD) == fcntl.FD_CLOEXEC, "FD_CLOEXEC")

    if not second:
        check(os.fstat(deleted).st_nlink == 0 and os.lseek(deleted, 0, os.SEEK_CUR) == 10000 + 8 * (number - 1), "deleted")
        os.write(deleted, b"%07d\n" % number)
        check(os.pread(deleted, 10000, 0) == b"d" * 10000, "the deleted file")
        check(os.pread(temporary, 5000, 0) == b"t" * 5000 and os.fstat(temporary).st_nlink == 0, "the temporary file")
    else:
        size = os.fstat(deleted).st_size
        check(os.pread(deleted, 8, size - 8) == b"%07d\n" % number, "what the other wrote to the deleted file")
    # The other process maps the same memory.
    slot = 0 if second else 8
    for mapping, what in ((deleted_mapping, "deleted"), (only_mapping, "only mapped")):
        check(mapping[slot:slot + 8] == (b"%08d" % (number - 1) if number > 1 else bytes(8)), "mapping", what)
        mapping[slot:slot + 8] = b"%08d" % number
        theirs = mapping[8 - slot:16 - slot]
        seen = number if second else number - 1
        check(theirs == (b"%08d" % seen if seen else bytes(8)), "the other's mapping", what, theirs, seen)
    check(os.pread(deleted_and_mapped, 8, slot) == b"%08d" % number, "the mapping's file")
    check(private[0:3] == b"xxx" and private[4096:4102] == b"dirtyx", "the private mapping")

    again = os.open("flock", os.O_RDWR)
    check(is_taken(lambda: fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)), "flock is lost")
    os.close(again)
    if second:
        check(is_taken(lambda: fcntl.fcntl(posix, fcntl.F_SETLK, lock(fcntl.F_WRLCK, 149, 1))), "the process's lock is lost")
        check(is_taken(lambda: fcntl.fcntl(posix, fcntl.F_SETLK, lock(fcntl.F_WRLCK, 349, 1))), "the read lock is lost")
        check(not is_taken(lambda: fcntl.fcntl(posix, fcntl.F_SETLK, lock(fcntl.F_WRLCK, 150, 1))), "it has grown")
    again = os.open("ofd", os.O_RDWR)
    check(is_taken(lambda: fcntl.fcntl(again, F_OFD_SETLK, lock(fcntl.F_WRLCK, 14, 1))), "the description's lock is lost")
    check(not is_taken(lambda: fcntl.fcntl(again, F_OFD_SETLK, lock(fcntl.F_WRLCK, 15, 1))), "it has grown")
    os.close(again)
    check(os.path.exists("/proc/self/fd/77") and os.readlink("/proc/self/fd/77") == f"{directory}/below/common", "name")

    os.write(pass_on, b".")
    if not second:
        os.read(turn, 1)
        log.write(f"round={number}\n")
        time.sleep(pause)
