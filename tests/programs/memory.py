"""A process that checks its memory, kind by kind: `memory.py LOG FILE HUGE_PAGES`.

FILE is made, mapped and deleted. HUGE_PAGES of 2 MiB are mapped and written; if there are any, one more is shared with a
child, and another is of memfd_create(2).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
PAGE = 4096
PAGES = 16
HUGE = 2 << 20
MLOCK2, MSEAL = 325, 462
ADVICE = {"dontfork": 10, "dontdump": 16, "wipeonfork": 18, "mergeable": 12, "hugepage": 14, "nohugepage": 15,
          "sequential": 2, "random": 1}
GUARD_INSTALL = 102
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def checked(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def anonymous(length, flags=0, sharing=mmap.MAP_PRIVATE):
    at = libc.mmap(None, length, 3, sharing | mmap.MAP_ANONYMOUS | flags, -1, 0)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    # A gap, so that neighbours stay apart.
    libc.mmap(None, PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    return at


def flags(wanted=()):
    """What the kernel tells of each mapping, by its address; what it notes by itself is left out.

    The kernel gives the file piece by piece, and what is mapped in between shifts what comes: a mapping may be told twice, in
    part (of others, the end comes then without its beginning), or not at all. So does a move in between: the flags of who is
    tracked are longer. So it is read again until all that are `wanted` are told.
    """
    for _ in range(20):
        found = flags_as_told()
        if all(at in found for at in wanted):
            break
    return found


def flags_as_told():
    found, at = {}, None
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            at = int(words[0].split("-")[0], 16)
        elif words[0] == "VmFlags:" and at is not None:
            found[at] = [word for word in words[1:] if word not in ("sd", "um", "uw", "ui", "gu", "ac", "nr")]
            at = None
    return found


class Area:
    """Memory in which every page has a number, which all go up together."""

    def __init__(self, name, at, pages, writable=True):
        self.name, self.at, self.pages, self.writable, self.turn = name, at, pages, writable, 0
        if writable:
            self.write()

    def write(self):
        self.turn += 1
        for page in range(self.pages):
            ctypes.c_uint64.from_address(self.at + page * PAGE).value = self.turn * 1000 + page

    def check(self):
        for page in range(self.pages):
            found = ctypes.c_uint64.from_address(self.at + page * PAGE).value
            if found != self.turn * 1000 + page:
                raise ValueError(f"{self.name}: page {page} has {found} in turn {self.turn}")
        if self.writable:
            self.write()


class Forbidden(Area):
    """Memory that has contents, and may not be touched but for the moment in which they are checked."""

    def __init__(self, name, at, pages, protection):
        super().__init__(name, at, pages)
        self.protection = protection
        self.protect(protection)

    def protect(self, protection):
        checked(libc.mprotect(ctypes.c_void_p(self.at), self.pages * PAGE, protection), "mprotect")

    def check(self):
        self.protect(3)
        super().check()
        self.protect(self.protection)


class Sparse:
    """A private mapping of a file with holes, of which one page was written, and one is given back."""

    def __init__(self, path):
        self.name, self.turn = "a file with holes", 0
        with open(path, "wb") as file:
            file.write(b"data" * 1024)
            file.truncate(5 * PAGE)
        descriptor = os.open(path, os.O_RDONLY)
        self.at = libc.mmap(None, 5 * PAGE, 3, mmap.MAP_PRIVATE, descriptor, 0)
        os.close(descriptor)
        for page in (0, 2, 3):
            ctypes.memset(self.at + page * PAGE, 1, PAGE)
        checked(libc.madvise(ctypes.c_void_p(self.at), PAGE, mmap.MADV_DONTNEED), "MADV_DONTNEED")
        checked(libc.madvise(ctypes.c_void_p(self.at + 3 * PAGE), PAGE, mmap.MADV_DONTNEED), "MADV_DONTNEED")
        self.write()

    def write(self):
        self.turn += 1
        ctypes.memset(self.at + 2 * PAGE, self.turn % 251, PAGE)

    def check(self):
        wanted = b"data" * 1024 + bytes(PAGE) + bytes([self.turn % 251]) * PAGE + bytes(2 * PAGE)
        if ctypes.string_at(self.at, 5 * PAGE) != wanted:
            raise ValueError(f"{self.name} in turn {self.turn}")
        self.write()


def can_be_read(at):
    data = ctypes.create_string_buffer(8)
    local = struct.pack("<QQ", ctypes.addressof(data), 8)
    remote = struct.pack("<QQ", at, 8)
    return libc.process_vm_readv(os.getpid(), local, 1, remote, 1, 0) == 8


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)


@CALLBACK
def deep(left):
    """Goes down the machine's stack."""
    return 1 + deep(left - 1) if left > 0 else 0


def stack_kib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmStk:"))


def main():
    path, file_name, huge_pages = sys.argv[1], sys.argv[2], int(sys.argv[3])
    log = open(path, "a", buffering=1)
    areas, watched = [], []
    counter, counted = None, 0
    for name, advice in ADVICE.items():
        at = anonymous(HUGE * 2 if name == "hugepage" else PAGES * PAGE)
        checked(libc.madvise(ctypes.c_void_p(at), PAGES * PAGE, advice), name)
        areas.append(Area(name, at, PAGES))
        watched.append(at)

    at = anonymous(PAGES * PAGE)
    checked(libc.mlock(ctypes.c_void_p(at), PAGES * PAGE), "mlock")
    areas.append(Area("mlock", at, PAGES))
    watched.append(at)
    at = anonymous(PAGES * PAGE)
    checked(libc.syscall(MLOCK2, ctypes.c_void_p(at), PAGES * PAGE, 1), "mlock2")
    areas.append(Area("mlock2", at, 2))
    watched.append(at)
    at = anonymous(PAGES * PAGE)
    areas.append(Area("mseal", at, PAGES))
    checked(libc.syscall(MSEAL, ctypes.c_void_p(at), PAGES * PAGE, 0), "mseal")
    watched.append(at)

    guarded = anonymous(PAGES * PAGE)
    checked(libc.madvise(ctypes.c_void_p(guarded), 2 * PAGE, GUARD_INSTALL), "guard pages")
    areas.append(Area("behind guards", guarded + 2 * PAGE, PAGES - 2))

    for name, protection in (("forbidden", 0), ("only read", 1), ("only executed", 4)):
        at = anonymous(PAGES * PAGE)
        areas.append(Forbidden(name, at, PAGES, protection))
        # What may not be touched at all is told together with the gap beside it.
        watched += [at] if protection else []
    areas.append(Sparse(file_name + ".sparse"))

    if huge_pages:
        at = anonymous(huge_pages * HUGE, mmap.MAP_ANONYMOUS | 0x40000)
        areas.append(Area("huge pages", at, huge_pages * HUGE // PAGE - 7))
        watched.append(at)
        at = anonymous(HUGE, 0x40000, mmap.MAP_SHARED)
        areas.append(Area("shared huge page", at, HUGE // PAGE - 1))
        watched.append(at)
        # The child counts in the last page.
        counter = ctypes.c_uint64.from_address(at + HUGE - PAGE)
        huge_memory = os.memfd_create("huge", os.MFD_HUGETLB)
        os.ftruncate(huge_memory, HUGE)
        at = libc.mmap(None, HUGE, 3, mmap.MAP_SHARED, huge_memory, 0)
        areas.append(Area("huge page of memfd_create", at, HUGE // PAGE))
        watched.append(at)

    with open(file_name, "wb") as file:
        for page in range(PAGES):
            file.write(struct.pack("<Q", page) + bytes(PAGE - 8))
    descriptor = os.open(file_name, os.O_RDWR)
    for name, sharing in (("deleted file", mmap.MAP_PRIVATE), ("deleted file, as it is", mmap.MAP_PRIVATE)):
        at = libc.mmap(None, PAGES * PAGE, 3, sharing, descriptor, 0)
        areas.append(Area(name, at, PAGES, writable=name == "deleted file"))
    os.close(descriptor)
    os.unlink(file_name)

    memory = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, PAGES * PAGE)
    at = libc.mmap(None, PAGES * PAGE, 3, mmap.MAP_SHARED, memory, 0)
    areas.append(Area("sealed memory", at, PAGES))
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
    os.close(memory)

    heap = libc.sbrk
    heap.restype, heap.argtypes = ctypes.c_void_p, [ctypes.c_long]
    at = heap(PAGES * PAGE + PAGE)
    areas.append(Area("heap", at, PAGES))

    # A page of the file, and one behind its end.
    source = os.open(__file__, os.O_RDONLY)
    pages = -(-os.fstat(source).st_size // PAGE)
    beyond = [libc.mmap(None, (pages + 1) * PAGE, 1, sharing, source, 0) for sharing in (mmap.MAP_PRIVATE, mmap.MAP_SHARED)]
    os.close(source)
    depth, sys_limit = 100, 3000
    sys.setrecursionlimit(4 * sys_limit)

    first = flags(watched)
    child = os.fork()
    if child == 0:
        # Locked as a whole, with all that comes later.
        checked(libc.mlockall(1 | 2), "mlockall")
        while os.getppid() != 1:
            late = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = ctypes.addressof(ctypes.c_char.from_buffer(late))
            told = flags()
            begins = [at for at in told if at <= start]
            if "lo" not in told[max(begins)]:
                log.write("MISMATCH what is mapped now is not locked\n")
            log.write("locked=1\n")
            if counter is not None:
                counter.value += 1
            time.sleep(0.1)
        os._exit(0)
    while True:
        for area in areas:
            try:
                area.check()
            except ValueError as error:
                log.write(f"MISMATCH {error}\n")
                os._exit(1)
        now = flags(watched)
        for at in watched:
            if now.get(at) != first[at]:
                log.write(f"MISMATCH {at:#x} was {first[at]} and is {now.get(at)}\n")
                os._exit(1)
        if can_be_read(guarded) or can_be_read(guarded + PAGE) or not can_be_read(guarded + 2 * PAGE):
            log.write("MISMATCH the guard pages are not where they were\n")
            os._exit(1)
        with open("/proc/self/map_files/" + map_file(at_of(areas, "sealed memory")), "rb") as file:
            if fcntl.fcntl(file, fcntl.F_GET_SEALS) != SEALS:
                log.write("MISMATCH the seals are not as they were\n")
                os._exit(1)
        if counter is not None:
            if counter.value > counted:
                counted = counter.value
                log.write("counted=1\n")
            if os.pread(huge_memory, 8, 0) != ctypes.string_at(at_of(areas, "huge page of memfd_create"), 8):
                log.write("MISMATCH the descriptor of memfd_create is of other memory\n")
                os._exit(1)
        for at in beyond:
            with open(__file__, "rb") as file:
                same = ctypes.string_at(at, pages * PAGE).rstrip(b"\0") == file.read()
            if not same or can_be_read(at + pages * PAGE):
                log.write("MISMATCH the mapping that is longer than its file\n")
                os._exit(1)
        # The stack and the heap grow.
        before, depth = stack_kib(), min(depth + 50, sys_limit)
        if deep(depth) != depth or stack_kib() < before:
            log.write("MISMATCH the stack does not grow\n")
            os._exit(1)
        at = heap(PAGE)
        ctypes.c_uint64.from_address(at).value = 1
        if heap(0) != at + PAGE:
            log.write("MISMATCH the heap does not grow\n")
            os._exit(1)
        log.write("checked=1\n")
        time.sleep(0.05)


def at_of(areas, name):
    return next(area.at for area in areas if area.name == name)


def map_file(at):
    return next(name for name in os.listdir("/proc/self/map_files") if int(name.split("-")[0], 16) == at)


main()
