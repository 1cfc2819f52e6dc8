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
PRCTL = {"pdeathsig": 1, "get dumpable": 3, "dumpable": 4, "get pdeathsig": 2, "name": 15, "subreaper": 36, "thp": 41, "get thp": 42, "keepcaps": 8, "timerslack": 29, "nnp": 38, "ambient": 47, "securebits": 28, "mdwe": 65, "merge": 67, "get merge": 68, "machine checks": 33, "get machine checks": 34}
NET_BIND_SERVICE = 10
GET_ROBUST_LIST = 274
RT_SIGACTION = 13
TIMERFD_CREATE, TIMERFD_SETTIME, TIMERFD_GETTIME, MEMBARRIER = 283, 286, 287, 324
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
    keep(log, "credentials", lambda: (status(names), prctl(27), prctl(PRCTL["get dumpable"])))


def secret(log):
    """It may not be dumped, nor looked into by its like: as it has chosen."""
    prctl(PRCTL["dumpable"], 0)
    keep(log, "secret", lambda: (prctl(PRCTL["get dumpable"]), os.stat("/proc/self/maps").st_uid))


def public(log):
    """It may be dumped, though its user has changed: as it has chosen."""
    os.setresgid(1234, 1234, 1234)
    os.setresuid(1001, 1001, 1001)
    prctl(PRCTL["dumpable"], 1)
    keep(log, "public", lambda: (prctl(PRCTL["get dumpable"]), os.stat("/proc/self/maps").st_uid))


def dispositions(log):
    """What is to be done at each signal, to the last flag."""
    ignored, handled = [signal.SIGHUP, signal.SIGRTMIN + 7], [signal.SIGUSR2, signal.SIGRTMIN + 8]
    actions = {number: ctypes.create_string_buffer(32) for number in range(1, 65)}

    def look():
        for number, action in actions.items():
            call(RT_SIGACTION, number, None, action, 8)
        return [action.raw for action in actions.values()]

    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    for at, number in enumerate(handled):
        # Handler, flags, restorer, mask: one that is only told, never called.
        flags = 0x04000000 | (0x08000000 | 0x4 if at else 0x40000000 | 0x80000000 | 0x10000000)
        action = struct.pack("<4Q", 0x1000 + at, flags, 0x2000 + at, 1 << (number - 1) | 0x4200 << at)
        call(RT_SIGACTION, number, action, None, 8)
    # The default, but for stops that nobody wants to hear of, and children that leave no zombie.
    call(RT_SIGACTION, signal.SIGCHLD, struct.pack("<4Q", 0, 1 | 2, 0, 0), None, 8)
    keep(log, "dispositions", look)


def thread_rights(log):
    """Threads that each have given up something of their own: the kernel knows no rights of processes."""
    names = ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"]
    header = struct.pack("<II", 0x20080522, 0)
    ids = {"setgroups": 116, "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123}

    def groups(*numbers):
        call(ids["setgroups"], len(numbers), struct.pack(f"<{len(numbers)}I", *numbers))

    # By raw system calls: those of the C library change all threads.
    def user():
        groups(11, 12)
        call(ids["setresgid"], 1234, 1235, 1236)
        call(ids["setresuid"], 1001, 1002, 1003)

    def files():
        libc.syscall(ids["setfsgid"], 77)
        libc.syscall(ids["setfsuid"], 78)

    def capabilities():
        prctl(24, NET_BIND_SERVICE + 1)
        mine = 1 << NET_BIND_SERVICE | 1 << 3
        call(CAPSET, header, struct.pack("<6I", 1 << 3, mine, 1 << 3, 0, 0, 0))

    def ambient():
        everything = int(status(["CapPrm"])[0].split()[1], 16)
        low, high = everything & 0xFFFFFFFF, everything >> 32
        call(CAPSET, header, struct.pack("<6I", low, low, 1 << NET_BIND_SERVICE, high, high, 0))
        prctl(PRCTL["ambient"], 2, NET_BIND_SERVICE)

    groups(5, 6)
    changes = [
        lambda: None, user, files, capabilities, ambient,
        lambda: groups(*range(30, 50)),
        lambda: groups(),
        lambda: prctl(PRCTL["nnp"], 1),
        lambda: prctl(PRCTL["securebits"], 1 << 2 | 1 << 3),
    ]
    in_threads(log, "thread rights", changes, lambda: (status(names), prctl(27)))


def thread_habits(log):
    """Threads that have each set something else for themselves: the kernel knows most of it only of threads."""
    stacks = []

    def stack():
        memory = ctypes.create_string_buffer(64 << 10)
        stacks.append(memory)
        libc.sigaltstack(struct.pack("<QixxxxQ", ctypes.addressof(memory), 0, len(memory)), None)

    changes = [
        lambda: None,
        stack,
        lambda: libc.prctl(PRCTL["name"], b"renamed too"),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 7),
        lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)),
        lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
        lambda: call(IOPRIO_SET, 1, 0, 3 << 13),
        lambda: prctl(PRCTL["timerslack"], 88888),
        lambda: prctl(PRCTL["machine checks"], 1, 1),
        lambda: libc.personality(0x0040000),
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGRTMIN + 3}),
    ]

    def look():
        now = ctypes.create_string_buffer(24)
        libc.sigaltstack(None, now)
        with open("/proc/thread-self/comm") as file:
            name = file.read()
        return (
            name,
            os.getpriority(os.PRIO_PROCESS, 0),
            os.sched_getscheduler(0),
            sorted(os.sched_getaffinity(0)),
            call(IOPRIO_GET, 1, 0),
            prctl(30),
            prctl(PRCTL["get machine checks"]),
            libc.personality(0xFFFFFFFF),
            sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            now.raw[:8] if stacks and int.from_bytes(now.raw[:8], "little") == ctypes.addressof(stacks[0]) else None,
        )

    in_threads(log, "thread habits", changes, look)


def in_threads(log, name, changes, look):
    """A thread for each change, which makes it, and compares what `look` sees from then on. No two see the same."""
    firsts = [None] * len(changes)
    wrong = []

    def live(at, change):
        change()
        firsts[at] = look()
        while firsts[at] == (now := look()):
            time.sleep(0.02)
        wrong.append(f"{firsts[at]} became {now}")

    threads = [threading.Thread(target=live, args=pair, daemon=True) for pair in enumerate(changes)]
    for thread in threads:
        thread.start()
    while None in firsts:
        time.sleep(0.01)
    if len(set(map(str, firsts))) != len(changes):
        log.write(f"MISMATCH threads have the same {name}: {firsts}\n")
    keep(log, name, lambda: (list(wrong), [thread.is_alive() for thread in threads]))


def habits(log):
    """What is neither rights nor memory."""
    os.umask(0o37)
    os.nice(3)
    limits = range(resource.RLIM_NLIMITS) if hasattr(resource, "RLIM_NLIMITS") else range(16)
    for limit in limits:
        # Each below what it was, so that nobody needs a privilege, and none so low that it is in the way.
        soft, hard = resource.getrlimit(limit)
        lowered = min([value for value in (soft, hard) if value >= 0] + [1 << 40])
        if lowered > 1000:
            resource.setrlimit(limit, (lowered - 100 - limit, lowered - 50))
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
            [resource.getrlimit(limit) for limit in limits],
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


def barriers(log):
    """It has registered with membarrier(2), and lets its memory be merged."""
    private, registrations = 1 << 3, 1 << 9
    call(MEMBARRIER, 1 << 4, 0, 0)
    prctl(PRCTL["merge"], 1)
    keep(log, "barriers", lambda: (call(MEMBARRIER, private, 0, 0), call(MEMBARRIER, registrations, 0, 0), prctl(PRCTL["get merge"])))


def joined(log):
    """Threads of the C library that end and are waited for: the kernel says so where the thread has told it to."""
    routine = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    reader, writer = os.pipe()

    @routine
    def until_told(_):
        os.read(reader, 1)

    def start():
        thread = ctypes.c_ulong()
        assert libc.pthread_create(ctypes.byref(thread), None, until_told, None) == 0
        return thread

    waiting = start()

    def look():
        nonlocal waiting
        os.write(writer, b"x")
        until = struct.pack("<2q", int(time.time()) + 10, 0)
        ended = libc.pthread_timedjoin_np(waiting, None, until)
        waiting = start()
        return ended

    keep(log, "joined", look)


def alarm(log):
    """A timer at a time of the clock, which ends when somebody sets that."""
    at = int(time.time()) + 100_000
    timer = call(TIMERFD_CREATE, 0, 0)
    call(TIMERFD_SETTIME, timer, 1 | 2, struct.pack("<4q", 0, 0, at, 0), None)

    def look():
        now = ctypes.create_string_buffer(32)
        call(TIMERFD_GETTIME, timer, now)
        *_, seconds, nanoseconds = struct.unpack("<4q", now.raw)
        expires = time.time() + seconds + nanoseconds / 1e9
        with open(f"/proc/self/fdinfo/{timer}") as file:
            flags = [line for line in file.read().splitlines() if line.startswith("settime flags")]
        # Neither early, nor much later; the clock is looked at a moment after the timer.
        return flags, -0.001 < expires - at < 5

    assert look()[1]
    keep(log, "alarm", look)


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
    for work in (credentials, secret, public, dispositions, thread_rights, thread_habits, habits, identity, barriers, joined, alarm, family, filtered, strict):
        if os.fork() == 0:
            work(log)
    if os.fork() == 0:
        root(log, sys.argv[2])
    pid, ended = os.wait()
    log.write(f"MISMATCH process {pid} has ended: {ended:#x}\n")


main()
