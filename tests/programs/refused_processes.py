"""Processes of which each has what a migration refuses of a process: `refused_processes.py LOG DIRECTORY`.

Each has what it has in the name of its first thread. Logs `ready=N`, the number of them.
"""

import ctypes
import fcntl
import mmap
import os
import shutil
import signal
import sys
import time

log, directory = sys.argv[1:3]
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PR_SET_NAME, IPC_CREAT = 15, 0o1000
CLONE, IO_SETUP, MEMFD_SECRET = 56, 206, 447


def trap():
    signal.signal(signal.SIGTRAP, signal.SIG_IGN)


def segment():
    at = libc.shmat(libc.shmget(0, 2 * mmap.PAGESIZE, IPC_CREAT | 0o600), None, 0)
    if libc.munmap(at, mmap.PAGESIZE) != 0:
        raise OSError(ctypes.get_errno(), "munmap")


def written():
    """A file outside of a volume is written through a mapping."""
    with open(os.path.join(directory, "mapped"), "w+b") as file:
        file.truncate(mmap.PAGESIZE)
        kept.append(mmap.mmap(file.fileno(), mmap.PAGESIZE))


def replaced():
    """Its program's file is removed, by the first process."""
    os.execv(program, [program, "1000"])


def rings():
    context = ctypes.c_ulong()
    if libc.syscall(IO_SETUP, 8, ctypes.byref(context)) != 0:
        raise OSError(ctypes.get_errno(), "io_setup")


def secret():
    descriptor = libc.syscall(MEMFD_SECRET, 0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "memfd_secret")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    kept.append(mmap.mmap(descriptor, mmap.PAGESIZE))
    os.close(descriptor)


def watcher():
    kept.append(os.open(directory, os.O_RDONLY))
    fcntl.fcntl(kept[-1], fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
    signal.signal(signal.SIGIO, signal.SIG_IGN)


def teller():
    """A child that tells its parent of its end by another signal."""
    if libc.syscall(CLONE, signal.SIGUSR1, 0, 0, 0, 0) != 0:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        os.close(writer)
        libc.prctl(PR_SET_NAME, b"parent")
        time.sleep(1000)
    libc.prctl(PR_SET_NAME, b"teller")


kept = []
program = os.path.join(directory, "replaced")
shutil.copy(shutil.which("sleep"), program)
have = [trap, segment, written, replaced, rings, secret, watcher, teller]
for make in have:
    # Its other end is closed when the child has what it is to have, by itself or by execve(2).
    reader, writer = os.pipe()
    if os.fork() == 0:
        libc.prctl(PR_SET_NAME, make.__name__.encode())
        make()
        os.close(writer)
        time.sleep(1000)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
os.remove(program)
with open(log, "a") as file:
    file.write(f"ready={len(have)}\n")
while True:
    signal.pause()
