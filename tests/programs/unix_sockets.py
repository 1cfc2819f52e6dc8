"""Holds unix sockets of all kinds, in two processes, and checks them: `unix_sockets.py LOG DIRECTORY`."""

import array
import os
import socket
import struct
import sys
import threading

from holding import Held, expect, run

directory = sys.argv[2]
PEERCRED = struct.Struct("3i")


def path(name):
    return os.path.join(directory, name)


def peer(sock):
    return PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEERCRED.size))


def me():
    return os.getpid(), os.geteuid(), os.getegid()


class Child:
    """A process of another user that holds the other ends: it does what it is told, as expressions."""

    def __init__(self):
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self.ours.close()
            os.setresgid(1000, 1000, 1000)
            os.setresuid(1000, 1000, 1000)
            names = globals() | {"held": {}}
            while True:
                text = theirs.recv(4096).decode()
                if not text:
                    os._exit(0)
                try:
                    answer = repr(eval(text, names))
                except BaseException as error:
                    answer = repr(f"{type(error).__name__}: {error}")
                theirs.send(answer.encode())
        theirs.close()

    def do(self, text):
        self.ours.send(text.encode())
        return eval(self.ours.recv(1 << 16).decode())


def keep(held, name, value):
    held[name] = value
    return True


def connected(kind, name):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.connect(name)
    return sock


class Listening(Held):
    """Listening sockets with a path and an abstract name, connections through both, and some that wait."""

    def __init__(self, child, name, kind):
        self.child, self.name, self.kind = child, name, kind
        self.listener = socket.socket(socket.AF_UNIX, kind)
        self.listener.bind(name)
        self.listener.listen(5)
        self.key = repr(name)
        if isinstance(name, str):
            os.chmod(name, 0o777)
            self.mode = os.stat(name).st_mode
        self.connect()
        self.waits = 0
        self.wait()
        self.count = 0

    def connect(self):
        expect(self.child.do(f"keep(held, {self.key}, connected({int(self.kind)}, {self.key}))"), True, "connecting")
        self.accepted, _ = self.listener.accept()

    def wait(self):
        for number in range(2):
            self.child.do(f"keep(held, ({self.key}, {number}), connected({int(self.kind)}, {self.key}))")

    def check(self):
        expect(self.accepted.getsockname(), self.name, "the name of an accepted socket")
        expect(self.child.do(f"held[{self.key}].getpeername()"), self.name, "the name that the client sees")
        expect(self.accepted.getpeername(), "", "the client's name")
        expect(peer(self.accepted), (self.child.pid, 1000, 1000), "the server's view of the client")
        expect(self.child.do(f"peer(held[{self.key}])"), me(), "the client's view of the server")
        expect(self.listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN), 1, "SO_ACCEPTCONN")
        if isinstance(self.name, str):
            stat = os.stat(self.name)
            expect((stat.st_mode, stat.st_uid), (self.mode, 0), "the socket's file")
        self.count += 1
        data = b"%d" % self.count
        expect(self.child.do(f"held[{self.key}].send({data!r})"), len(data), "sending")
        expect(self.accepted.recv(100), data, "what came")

    def drain(self):
        for number in range(2):
            accepted, _ = self.listener.accept()
            accepted.send(b"late %d" % number)
            expect(self.child.do(f"held[{self.key}, {number}].recv(100)"), b"late %d" % number, "one that waited")
            expect(peer(accepted)[1:], (1000, 1000), "its credentials")
        # New ones find it by its name.
        fresh = connected(self.kind, self.name)
        accepted, _ = self.listener.accept()
        fresh.send(b"new")
        expect(accepted.recv(10), b"new", "a new connection")
        self.wait()


class Queues(Held):
    """What waits in streams and in sequences of packets, with descriptors and credentials among it."""

    def __init__(self):
        self.stream = socket.socketpair()
        self.packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.packets[1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.number = 0
        self.fill()

    def fill(self):
        self.number += 1
        self.stream[0].send(b"%07d;" % self.number * 2000)
        kept = os.open(path("kept"), os.O_RDWR | os.O_CREAT)
        os.write(kept, b"kept %d" % self.number)
        passed = os.open(path("passed"), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.write(passed, b"passed %d" % self.number)
        reader, writer = os.pipe()
        os.write(writer, b"in the pipe %d" % self.number)
        inner = socket.socketpair()
        inner[0].send(b"in the socket %d" % self.number)
        send(self.packets[0], b"one", reader, kept, passed)
        self.packets[0].send(b"")
        send(self.packets[0], b"two", inner[1].fileno())
        self.packets[0].send(b"three" * 100)
        self.kept = kept
        # These are nowhere but in the queues.
        os.close(passed)
        os.close(reader)
        inner[1].close()
        self.writer, self.inner = writer, inner[0]

    def drain(self):
        found = b""
        while len(found) < 16000:
            found += self.stream[1].recv(16000 - len(found))
        expect(found, b"%07d;" % self.number * 2000, "the bytes of the stream")
        data, (reader, kept, passed), sender = receive(self.packets[1], 1000)
        expect((data, sender), (b"one", me()), "the first packet")
        # The description is the same: one offset.
        os.lseek(kept, 0, os.SEEK_SET)
        expect(os.lseek(self.kept, 0, os.SEEK_CUR), 0, "the offset of the description that was kept")
        expect(os.lseek(passed, 0, os.SEEK_CUR), len(b"passed %d" % self.number), "the offset of the one that was not")
        expect(os.pread(passed, 100, 0), b"passed %d" % self.number, "its contents")
        expect(os.read(reader, 100), b"in the pipe %d" % self.number, "what was in the pipe")
        os.write(self.writer, b"more")
        expect(os.read(reader, 100), b"more", "what came after it")
        data, none, sender = receive(self.packets[1], 1000)
        expect((data, none, sender), (b"", [], me()), "the empty packet")
        data, (other,), sender = receive(self.packets[1], 1000)
        expect((data, sender), (b"two", me()), "the second packet")
        expect(socket.socket(fileno=other).recv(100), b"in the socket %d" % self.number, "what was in the socket")
        data, none, sender = receive(self.packets[1], 1000)
        expect((data, none, sender), (b"three" * 100, [], me()), "the third packet")
        for fd in (kept, passed, reader, self.kept, self.writer):
            os.close(fd)
        self.inner.close()
        self.fill()


class Passing(Held):
    """Streams with descriptors in their queues, one of which has lost its peer."""

    def __init__(self):
        self.number = 0
        self.fill()

    def fill(self):
        self.number += 1
        self.streams = []
        for closed in (False, True):
            ours, theirs = socket.socketpair()
            self.wanted = {}
            self.bytes = b""
            for data, descriptors in (
                (b"first", 1),
                (b"nothing with it" * 30, 0),
                (b"twice " * 500, 2),
                (b"at once", 1),
                (b"", 0),
                (b"x", 3),
                (b"long" * 10000, 1),
                (b"the end", 0),
            ):
                names = [f"{self.number}-{len(self.bytes)}-{one}" for one in range(descriptors)]
                if names:
                    self.wanted[len(self.bytes)] = names
                passed = [self.file(name) for name in names]
                expect(send(theirs, data, *passed) if names else theirs.send(data), len(data), "bytes sent")
                self.bytes += data
                for fd in passed:
                    os.close(fd)
            if closed:
                theirs.close()
            self.streams.append((ours, theirs))

    def file(self, name):
        fd = os.memfd_create(name)
        os.write(fd, name.encode())
        return fd

    def drain(self):
        for ours, theirs in self.streams:
            found, data = {}, b""
            while len(data) < len(self.bytes):
                byte, descriptors, _ = receive(ours, 1)
                if descriptors:
                    found[len(data)] = [os.pread(fd, 100, 0).decode() for fd in descriptors]
                for fd in descriptors:
                    os.close(fd)
                data += byte
            expect(data == self.bytes, True, "the bytes of a stream with descriptors")
            expect(found, self.wanted, "with which bytes descriptors came")
            if theirs.fileno() < 0:
                expect(ours.recv(10), b"", "what comes behind the end")
            ours.close()
            theirs.close()
        self.fill()


def send(sock, data, *descriptors):
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def receive(sock, limit):
    data, messages, _, _ = sock.recvmsg(limit, 4096)
    descriptors, sender = [], None
    for _, kind, content in messages:
        if kind == socket.SCM_RIGHTS:
            descriptors += array.array("i", content).tolist()
        elif kind == socket.SCM_CREDENTIALS:
            sender = PEERCRED.unpack(content)
    return data, descriptors, sender


class Datagrams(Held):
    """Datagram sockets: one with a path, one with an abstract name that is connected to it, one without a name."""

    def __init__(self):
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.server.bind(path("datagrams"))
        self.client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.client.bind(b"\0rswap-test-client-%d" % os.getpid())
        self.client.connect(path("datagrams"))
        self.nameless = connected(socket.SOCK_DGRAM, path("datagrams"))
        self.pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.number = 0
        self.fill()

    def fill(self):
        self.number += 1
        self.client.send(b"client %d" % self.number)
        self.nameless.send(b"nameless %d" % self.number)
        self.client.send(b"client again")
        self.pair[0].send(b"pair %d" % self.number)

    def drain(self):
        name = self.client.getsockname()
        expect(self.server.recvfrom(100), (b"client %d" % self.number, name), "the first datagram")
        expect(self.server.recvfrom(100), (b"nameless %d" % self.number, None), "the second")
        expect(self.server.recvfrom(100), (b"client again", name), "the third")
        expect(self.pair[1].recv(100), b"pair %d" % self.number, "the pair's")
        self.server.sendto(b"back", name)
        expect(self.client.recvfrom(10), (b"back", path("datagrams")), "the answer")
        self.pair[1].send(b"back")
        expect(self.pair[0].recv(10), b"back", "the pair's answer")
        self.fill()

    def check(self):
        expect(self.client.getpeername(), path("datagrams"), "the peer's name")
        expect(self.server.getsockname(), path("datagrams"), "the server's name")


class Ended(Held):
    """Streams whose peer is closed, or writes no more, with data still to be read."""

    def __init__(self):
        self.begin()

    def begin(self):
        self.left, other = socket.socketpair()
        other.send(b"last words")
        other.close()
        self.half = socket.socketpair()
        self.half[0].send(b"the end")
        self.half[0].shutdown(socket.SHUT_WR)
        self.packets, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other.send(b"a")
        other.send(b"b")
        other.close()

    def drain(self):
        expect([self.left.recv(100) for _ in range(2)], [b"last words", b""], "the closed stream")
        expect([self.half[1].recv(100) for _ in range(2)], [b"the end", b""], "the half-closed stream")
        self.half[1].send(b"answer")
        expect(self.half[0].recv(100), b"answer", "the other direction")
        expect([self.packets.recv(100) for _ in range(3)], [b"a", b"b", b""], "the closed packets")
        for sock in (self.left, *self.half, self.packets):
            sock.close()
        self.begin()


class Plain(Held):
    """Sockets that do nothing yet, and a relative name."""

    def __init__(self):
        self.unbound = [socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
        os.chdir(directory)
        self.relative = socket.socket(socket.AF_UNIX)
        self.relative.bind("relative")
        self.relative.listen()
        self.deleted = socket.socket(socket.AF_UNIX)
        self.deleted.bind(path("deleted-socket"))
        self.deleted.listen()
        self.client = connected(socket.SOCK_STREAM, path("deleted-socket"))
        self.accepted, _ = self.deleted.accept()
        os.unlink(path("deleted-socket"))

    def check(self):
        expect(self.relative.getsockname(), "relative", "the relative name")
        fresh = connected(socket.SOCK_STREAM, path("relative"))
        self.relative.accept()
        fresh.close()
        expect(os.path.exists(path("deleted-socket")), False, "the deleted name")
        expect(self.client.getpeername(), path("deleted-socket"), "the deleted name that the client sees")
        self.client.send(b"x")
        expect(self.accepted.recv(10), b"x", "what came")
        expect([name for name in os.listdir(directory) if name.startswith(".")], [], "what is left in the directory")


class Threads(Held):
    """A thread that waits in accept, and one that waits for data."""

    def __init__(self):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path("threads"))
        self.listener.listen()
        self.asked, self.told = socket.socketpair()
        threading.Thread(target=self.serve, daemon=True).start()
        threading.Thread(target=self.echo, daemon=True).start()

    def serve(self):
        while True:
            sock, _ = self.listener.accept()
            sock.send(b"served")
            sock.close()

    def echo(self):
        while True:
            self.told.send(self.told.recv(100))

    def check(self):
        expect(connected(socket.SOCK_STREAM, path("threads")).recv(100), b"served", "the server thread's answer")
        self.asked.send(b"ask")
        expect(self.asked.recv(100), b"ask", "the echo")


def main():
    os.makedirs(directory)
    os.chmod(directory, 0o777)
    child = Child()
    held = [Queues(), Passing(), Datagrams(), Ended(), Plain(), Threads()]
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        held.append(Listening(child, path(f"listening-{int(kind)}"), kind))
        held.append(Listening(child, b"\0rswap-test-%d-%d" % (os.getpid(), kind), kind))
    run(held)


main()
