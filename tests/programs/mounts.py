"""Makes mounts of its own as containers and services do, works in them, and verifies each time that all is as it left it.

usage: mounts.py LOG DIRECTORY
"""

import ctypes
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import time

log_path, directory = sys.argv[1], sys.argv[2]
log = open(log_path, "a", buffering=1)
os.chdir("/")
libc = ctypes.CDLL(None, use_errno=True)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, NOATIME, BIND, PRIVATE = 1, 2, 4, 8, 32, 1024, 4096, 1 << 18


def check(truth, *what):
    if not truth:
        log.write(f"MISMATCH: {what}\n")
        sys.exit(1)


def mount(source, name, kind=None, flags=0, data=None):
    words = [None if word is None else os.fsencode(word) for word in (source, f"{directory}/{name}", kind, data)]
    source, target, kind, data = words
    if libc.mount(source, target, kind, flags, data):
        raise OSError(ctypes.get_errno(), f"mounting {name}")


def path(name):
    return f"{directory}/{name}"


def write(name, contents):
    with open(path(name), "wb") as file:
        file.write(contents)


for name in ("memory", "jail", "again", "readonly", "twice", "a b"):
    os.makedirs(path(name), exist_ok=True)
write("file", b"")
mount("private", "memory", "tmpfs", NOSUID | NOEXEC, "size=48m,nr_inodes=4000,mode=0750,uid=1234,gid=4321")
# One in the other, and one over the other: the lower one is a bind mount, which needs no contents.
os.mkdir(path("memory/inner"))
mount("inner", "memory/inner", "tmpfs", 0, "size=1m")
write("memory/inner/kept", b"inner")
os.mkdir(path("memory/sub"))
write("memory/sub/kept", b"sub")
mount(path("memory/sub"), "again", None, BIND)
mount(path("memory/sub"), "readonly", None, BIND)
mount(None, "readonly", None, BIND | REMOUNT | RDONLY | NOATIME | NODEV)
mount("/usr", "twice", None, BIND)
mount("over", "twice", "tmpfs", 0, "size=64k")
write("twice/kept", b"over")
mount("blank", "a b", "tmpfs", 0, "size=64k,mode=0700")
write("a b/kept", b"blank")
mount("/etc/hostname", "file", None, BIND)

# A root as that of a container: read-only programs of the host, devices, and what the kernel tells of it.
mount("jail", "jail", "tmpfs", NOSUID, "mode=0755")
for name in ("usr", "proc", "sys", "dev", "dev/mqueue", "data", "tmp"):
    os.mkdir(path(f"jail/{name}"))
for name in ("bin", "sbin", "lib", "lib64"):
    os.symlink(f"usr/{name}", path(f"jail/{name}"))
mount("/usr", "jail/usr", None, BIND)
mount(None, "jail/usr", None, BIND | REMOUNT | RDONLY | NOSUID)
mount("proc", "jail/proc", "proc", NOSUID | NODEV | NOEXEC, "hidepid=invisible")
mount("sysfs", "jail/sys", "sysfs", RDONLY | NOSUID | NODEV | NOEXEC)
mount("mqueue", "jail/dev/mqueue", "mqueue", NOSUID | NODEV | NOEXEC)
mount(path("memory/sub"), "jail/data", None, BIND)
mount("tmp", "jail/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=1777")
for name, minor in (("null", 3), ("zero", 5), ("urandom", 9)):
    os.mknod(path(f"jail/dev/{name}"), 0o666 | stat.S_IFCHR, os.makedev(1, minor))
script = (
    "trap 'exit 0' TERM; n=0; while :; do n=$((n+1)); read pid rest < /proc/self/stat || exit 1; "
    "[ $pid = $$ ] || exit 2; head -c 4 /dev/zero > /dev/null || exit 3; "
    # mv(1) compares inode numbers, which a move changes between two of its looks: so it has a second try.
    "echo $n > /tmp/next && { mv /tmp/next /tmp/count 2> /data/why || mv /tmp/next /tmp/count 2>> /data/why; } || exit 4; "
    "echo $n > /data/beat; sleep 0.02; done"
)
prisoner = subprocess.Popen(["sh", "-c", script], preexec_fn=lambda: (os.chroot(path("jail")), os.chdir("/data")))

while not os.path.exists(path("jail/tmp/count")):
    check(prisoner.poll() is None, "the prisoner did not start", prisoner.poll())
    time.sleep(0.01)

# Files that are open and mapped, with names and without.
opened = open(path("memory/opened"), "w+b", buffering=0)
shared_file = open(path("memory/shared"), "w+b", buffering=0)
shared_file.truncate(64 * 4096)
shared = mmap.mmap(shared_file.fileno(), 64 * 4096)
# By a mount that nobody may write to.
seen_file = open(path("readonly/kept"), "rb")
seen = mmap.mmap(seen_file.fileno(), 3, prot=mmap.PROT_READ)
private_file = open(path("memory/private"), "w+b", buffering=0)
private_file.write(b"p" * 8192)
private = mmap.mmap(private_file.fileno(), 8192, flags=mmap.MAP_PRIVATE)
private[:5] = b"dirty"
deleted = open(path("memory/deleted"), "w+b", buffering=0)
deleted.write(b"deleted")
os.unlink(path("memory/deleted"))
gone_file = open(path("memory/gone"), "w+b", buffering=0)
gone_file.truncate(8000)
gone = mmap.mmap(gone_file.fileno(), 8000)
os.unlink(path("memory/gone"))
# As a segment of shm_open: nothing but the mapping is left.
short = open(path("memory/short"), "w+b", buffering=0)
short.truncate(4096)
only_mapped = mmap.mmap(short.fileno(), 4096)
short.close()
os.unlink(path("memory/short"))
os.mkdir(path("memory/owned"))
os.chown(path("memory/owned"), 55, 66)
os.chmod(path("memory/owned"), 0o2710)
os.setxattr(path("memory/owned"), "trusted.colour", b"blue")
os.utime(path("memory/owned"), ns=(1, 1_000_000_123))
os.utime(path("memory"), ns=(1, 3_000_000_789))
os.mkfifo(path("memory/inner/fifo"), 0o620)
os.symlink("kept", path("memory/sub/link"))
os.link(path("memory/sub/kept"), path("memory/sub/linked"))
listener = socket.socket(socket.AF_UNIX)
listener.bind(path("memory/inner/socket"))
listener.listen(5)


def mounts():
    """The mounts of this program's own, as they are shown, without what numbers them."""
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, after = line.split(" - ")
            _, _, _, root, point, flags, *others = before.split()
            if point.startswith(directory):
                kind, source, options = after.split()
                others = " ".join(other.partition(":")[0] for other in others)
                found.append((point, root if kind == "tmpfs" else "", flags, others, kind, source, options))
    return sorted(found)


def holds(name):
    holds = os.statvfs(path(name))
    return holds.f_blocks * holds.f_frsize, holds.f_files


first_mounts, first_limits = mounts(), [holds(name) for name in ("memory", "memory/inner", "jail", "twice")]
check(len(first_mounts) == 15, "mounts", first_mounts)
beats = 0
number = 0
while True:
    number += 1
    now = mounts()
    check(now == first_mounts, "mounts", set(now) ^ set(first_mounts))
    limits = [holds(name) for name in ("memory", "memory/inner", "jail", "twice")]
    check(limits == first_limits, "limits", limits, first_limits)
    opened.seek(0, os.SEEK_END)
    check(opened.tell() == 8 * (number - 1), "the open file", opened.tell())
    opened.write(b"%08d" % number)
    check(os.stat(path("memory/opened")).st_size == 8 * number, "the open file's name")
    page = number % 64 * 4096
    for mapping, file, at, last in ((shared, shared_file, page, number - 64), (gone, gone_file, 4096, number - 1)):
        wanted = b"%08d" % last if last > 0 else bytes(8)
        check(mapping[at:at + 8] == wanted and os.pread(file.fileno(), 8, at) == wanted, "shared", mapping[at:at + 8], wanted)
        mapping[at:at + 8] = b"%08d" % number
    with open(path("memory/shared"), "rb") as file:
        file.seek(page)
        check(file.read(8) == b"%08d" % number, "the mapped file, by its name")
    check(os.fstat(gone_file.fileno()).st_size == 8000, "the length", os.fstat(gone_file.fileno()).st_size)
    check(seen[:3] == b"sub", "what is mapped by a read-only mount")
    check(only_mapped[:8] == (b"%08d" % (number - 1) if number > 1 else bytes(8)), "the mapping without a name")
    only_mapped[:8] = b"%08d" % number
    check(private[:6] == b"dirtyp" and os.pread(private_file.fileno(), 6, 0) == b"pppppp", "the private mapping")
    check(os.pread(deleted.fileno(), 9, 0) == b"deleted", "the deleted file")
    check(not any(os.path.exists(path(f"memory/{name}")) for name in ("deleted", "gone", "short")), "names came back")
    for name, wanted in (("memory/inner/kept", b"inner"), ("memory/sub/linked", b"sub"), ("again/kept", b"sub"),
                         ("readonly/link", b"sub"), ("jail/data/kept", b"sub"), ("twice/kept", b"over"), ("a b/kept", b"blank")):
        with open(path(name), "rb") as file:
            check(file.read() == wanted, name)
    with open(path("file")) as one, open("/etc/hostname") as other:
        check(one.read() == other.read(), "the file that is mounted")
    for name in ("readonly/new", "jail/usr/new", "jail/sys/new"):
        try:
            open(path(name), "w")
            check(False, name, "was made")
        except OSError as error:
            check(error.errno in (1, 13, 30), name, error)
    owned = os.stat(path("memory/owned"))
    check((owned.st_uid, owned.st_gid, stat.S_IMODE(owned.st_mode)) == (55, 66, 0o2710), "owner and mode")
    check(owned.st_mtime_ns == 1_000_000_123, "the time")
    check(os.getxattr(path("memory/owned"), "trusted.colour") == b"blue", "the extended attribute")
    root = os.stat(path("memory"))
    check((root.st_uid, root.st_gid, stat.S_IMODE(root.st_mode)) == (1234, 4321, 0o750), "the root's owner")
    check(os.stat(path("memory/sub/kept")).st_nlink == 2, "links")
    check(stat.S_ISFIFO(os.stat(path("memory/inner/fifo")).st_mode), "FIFO")
    check(os.stat(path("jail/dev/zero")).st_rdev == os.makedev(1, 5), "device")
    client = socket.socket(socket.AF_UNIX)
    client.connect(path("memory/inner/socket"))
    client.sendall(b"%d" % number)
    accepted, _ = listener.accept()
    check(accepted.recv(20) == b"%d" % number, "the socket")
    accepted.close()
    client.close()
    try:
        write("twice/full", bytes(128 << 10))
        check(False, "it holds more than its limit")
    except OSError as error:
        check(error.errno == 28, "full", error)
    os.unlink(path("twice/full"))
    if prisoner.poll() is not None:
        with open(path("memory/sub/why")) as file:
            check(False, "the prisoner has ended", prisoner.poll(), file.read())
    with open(path("jail/tmp/count")) as file:
        count = int(file.read())
    check(count >= beats, "the prisoner's count", count, beats)
    if count > beats:
        beats = count
        log.write(f"beat={count}\n")
    log.write(f"checked={number}\n")
    time.sleep(0.01)
