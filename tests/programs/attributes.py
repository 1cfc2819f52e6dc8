"""Processes that check what they have set for themselves: `attributes.py LOG DIRECTORY`.

Each process sets something, and says `NAME=ok` in the log as long as all of it is as it was set.
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
PRCTL = {"pdeathsig": 1, "get pdeathsig": 2, "name": 15, "subreaper": 36, "thp": 41, "get thp": 42, "keepcaps": 8, "timerslack": 29, "nnp": 38, "ambient": 47, "securebits": 28, "mdwe": 65}
NET_BIND_SERVICE = 10
GET_ROBUST_LIST = 274
GETPPID, CAPSET, IOPRIO_SET, IOPRIO_GET, SECCOMP = 110, 126, 251, 252, 317
FORBIDDEN = 42


def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def prctl(*arguments):
    padded = [ctypes.c_ulong(value) for value in arguments[1:]] + [ctypes.c_ulong(0)] * (5 - len(arguments))
    result = libc.prctl(arguments[0], *padded)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")
    return result


def status(names):
    with open("/proc/thread-self/status") as file:
        return [line for line in file.read().splitlines() if line.split(":")[0] in names]


def keep(log, name, look):
    """Compares what `look` sees with what it saw at first, again and again."""
    first = look()
    while True:
        now = look()
        if now != first:
            log.write(f"MISMATCH {name} was {first} and is {now}\n")
            os._exit(1)
        log.write(f"{name}=ok\n")
        time.sleep(0.05)


def credentials(log):
    """A user without root's rights, who keeps one of its capabilities."""
    os.setgroups([7, 8, 9])
    prctl(PRCTL["keepcaps"], 1)
    os.setresgid(1234, 1234, 1235)
    os.setresuid(1001, 1001, 1002)
    mine = 1 << NET_BIND_SERVICE
    header = struct.pack("<II", 0x20080522, 0)
    call(CAPSET, header, struct.pack("<6I", mine, mine | 1 << 8, mine, 0, 0, 0))
    prctl(PRCTL["ambient"], 2, NET_BIND_SERVICE)
    # With CAP_SETPCAP, which it gives up next.
    call(CAPSET, header, struct.pack("<6I", mine | 1 << 8, mine | 1 << 8, mine, 0, 0, 0))
    prctl(PRCTL["securebits"], 1 << 2)
    call(CAPSET, header, struct.pack("<6I", mine, mine, mine, 0, 0, 0))
    prctl(PRCTL["nnp"], 1)
    names = ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"]
    keep(log, "credentials", lambda: (status(names), prctl(27)))


def habits(log):
    """What is neither rights nor memory."""
    os.umask(0o37)
    os.nice(3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("120")
    with open("/proc/self/coredump_filter", "w") as file:
        file.write("0x7")
    libc.personality(0x0040000)
    prctl(PRCTL["timerslack"], 77777)
    call(IOPRIO_SET, 1, 0, 2 << 13 | 6)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    prctl(PRCTL["mdwe"], 1)

    def look():
        return (
            status(["Umask"]),
            os.nice(0),
            resource.getrlimit(resource.RLIMIT_NOFILE),
            open("/proc/self/oom_score_adj").read(),
            open("/proc/self/coredump_filter").read(),
            libc.personality(0xFFFFFFFF),
            prctl(30),
            call(IOPRIO_GET, 1, 0),
            os.sched_getaffinity(0),
            prctl(66),
        )

    keep(log, "habits", look)


def identity(log):
    """By what others know it, and what the kernel knows of its memory."""
    libc.prctl(PRCTL["name"], b"renamed")
    prctl(PRCTL["pdeathsig"], signal.SIGUSR1)
    prctl(PRCTL["thp"], 1)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    memory = ctypes.create_string_buffer(64 << 10)
    stack = struct.pack("<QixxxxQ", ctypes.addressof(memory), 0, len(memory))
    if libc.sigaltstack(stack, None):
        raise OSError(ctypes.get_errno(), "sigaltstack")

    def read(name):
        with open(f"/proc/self/{name}", "rb") as file:
            return file.read()

    def look():
        death, head, length = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t()
        libc.prctl(PRCTL["get pdeathsig"], ctypes.byref(death))
        call(GET_ROBUST_LIST, 0, ctypes.byref(head), ctypes.byref(length))
        now = ctypes.create_string_buffer(24)
        libc.sigaltstack(None, now)
        return (
            [read(name) for name in ("comm", "cmdline", "environ", "auxv")],
            [os.readlink(f"/proc/self/{name}") for name in ("exe", "cwd", "root")],
            death.value,
            prctl(PRCTL["get thp"]),
            os.sched_getscheduler(0),
            now.raw,
            (head.value, length.value),
        )

    keep(log, "identity", look)


def family(log):
    """A child that dies with its parent, and orphans that come to this process."""
    prctl(PRCTL["subreaper"], 1)

    def bear():
        """A process whose child is to die with it: both pids."""
        reader, writer = os.pipe()
        parent = os.fork()
        if parent == 0:
            if os.fork() == 0:
                prctl(PRCTL["pdeathsig"], signal.SIGTERM)
                os.write(writer, struct.pack("<i", os.getpid()))
            while True:
                signal.pause()
        child = struct.unpack("<i", os.read(reader, 4))[0]
        os.close(reader)
        os.close(writer)
        return parent, child

    pair = bear()

    def look():
        nonlocal pair
        parent, child = pair
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        # It is this process's now, and is told of its parent's death.
        ended = os.waitpid(child, 0)[1]
        pair = bear()
        return ended

    keep(log, "family", look)


def root(log, directory):
    os.mkdir(f"{directory}/inside")
    os.chdir(f"{directory}/inside")
    os.chroot(directory)
    keep(log, "root", lambda: (os.stat("/").st_ino, os.getcwd(), os.listdir("/")))


def install_filter():
    """Forbids getppid."""
    code = struct.pack("<HBBI", 0x20, 0, 0, 0)
    code += struct.pack("<HBBI", 0x15, 0, 1, GETPPID)
    code += struct.pack("<HBBI", 0x06, 0, 0, 0x00050000 | FORBIDDEN)
    code += struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    call(SECCOMP, 1, 0, program)


def is_forbidden():
    return libc.syscall(GETPPID) == -1 and ctypes.get_errno() == FORBIDDEN


def filtered(log):
    """Two filters, and a thread that has them as well."""
    prctl(PRCTL["nnp"], 1)
    install_filter()
    install_filter()
    seen = [True]

    def watch():
        while True:
            seen[0] = seen[0] and is_forbidden()
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    keep(log, "filter", lambda: (is_forbidden(), seen[0], status(["Seccomp", "Seccomp_filters"])))


def strict(log):
    """Strict mode allows only read, write and exit."""
    there, here = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        reader, writer = there[0], here[1]
        prctl(22, 1)
        while True:
            os.write(writer, os.read(reader, 1))

    def look():
        os.write(there[1], b"x")
        while True:
            with open(f"/proc/{child}/status") as file:
                if "Seccomp:\t1" in file.read():
                    break
        with open(f"/proc/{child}/status") as file:
            mode = [line for line in file.read().splitlines() if line.startswith("Seccomp:")]
        return os.read(here[0], 1), mode

    keep(log, "strict", look)


def main():
    log = open(sys.argv[1], "a", buffering=1)
    for work in (credentials, habits, identity, family, filtered, strict):
        if os.fork() == 0:
            work(log)
    if os.fork() == 0:
        root(log, sys.argv[2])
    pid, ended = os.wait()
    log.write(f"MISMATCH process {pid} has ended: {ended:#x}\n")


main()
