"""Holds internet sockets besides TCP's, and checks them: `internet.py LOG ADDRESS6`. ADDRESS6 may be empty."""

import os
import socket
import struct
import sys
import time

from holding import Held, expect, run

address6 = sys.argv[2] if len(sys.argv) > 2 else ""
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


def udp(family):
    return socket.socket(family, socket.SOCK_DGRAM)


class Udp(Held):
    """A bound socket with datagrams in its queue, and a connected one."""

    def __init__(self, family, bound):
        self.family = family
        self.server = udp(family)
        self.server.bind((bound, 0))
        if family == socket.AF_INET6:
            self.server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            self.server.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
            self.server.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
            self.server.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 300000)
        self.client = udp(family)
        self.client.bind((LOOPBACK[family], 0))
        self.client.connect((LOOPBACK[family], self.server.getsockname()[1]))
        self.names = self.tell()
        self.number = 0
        self.fill()

    def tell(self):
        options = [(socket.SOL_SOCKET, socket.SO_BROADCAST), (socket.SOL_SOCKET, socket.SO_RCVBUF)]
        if self.family == socket.AF_INET:
            options += [(socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP)]
        values = [self.server.getsockopt(*option) for option in options]
        return self.server.getsockname(), self.client.getsockname(), self.client.getpeername(), values

    def fill(self):
        self.number += 1
        self.client.send(b"first %d" % self.number)
        self.client.send(b"")
        self.client.send(b"x" * 30000)
        self.server.sendto(b"answer %d" % self.number, self.client.getsockname())

    def check(self):
        expect(self.tell(), self.names, "names and options")

    def drain(self):
        data, messages, _, sender = self.server.recvmsg(40000, 1000)
        expect((data, sender[:2]), (b"first %d" % self.number, self.client.getsockname()[:2]), "the first datagram")
        local = socket.inet_pton(self.family, LOOPBACK[self.family])
        expect(any(local in content for _, _, content in messages), True, "where it was sent to")
        expect(self.server.recv(100), b"", "the empty datagram")
        expect(self.server.recv(40000), b"x" * 30000, "the large datagram")
        expect(self.client.recv(100), b"answer %d" % self.number, "the answer")
        self.fill()


class Group(Held):
    """A member of a multicast group on the loopback."""

    def __init__(self):
        self.member = udp(socket.AF_INET)
        self.member.bind(("", 0))
        request = struct.pack("4s4si", socket.inet_aton("239.1.2.3"), socket.inet_aton("0.0.0.0"), 1)
        self.member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        self.sender = udp(socket.AF_INET)
        request = struct.pack("4s4si", socket.inet_aton("0.0.0.0"), socket.inet_aton("0.0.0.0"), 1)
        self.request = request

    def drain(self):
        sender = udp(socket.AF_INET)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, self.request)
        sender.sendto(b"to all", ("239.1.2.3", self.member.getsockname()[1]))
        self.member.settimeout(20)
        expect(self.member.recv(100), b"to all", "what was sent to the group")
        self.member.settimeout(None)


class Idle(Held):
    """Sockets that do nothing yet, and idle ones of other kinds."""

    def __init__(self):
        self.plain = [udp(family) for family in LOOPBACK]
        self.raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
        self.raw.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        # With a group that nobody sends anything to (RTMGRP_TC).
        self.netlink.bind((0, 8))
        self.name = self.netlink.getsockname()
        # Events of devices, and questions about sockets.
        self.others = [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) for protocol in (15, 4)]
        for one in self.others:
            one.bind((0, 0))
        self.names = [one.getsockname() for one in self.others]

    def check(self):
        for sock, family in zip(self.plain, LOOPBACK):
            expect(sock.getsockname()[:2], (ANY[family], 0), "the name of an unbound socket")
        expect(self.raw.getsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL), 1, "IP_HDRINCL")
        expect(self.netlink.getsockname(), self.name, "the netlink socket's name and group")
        expect([one.getsockname() for one in self.others], self.names, "the names of the other netlink sockets")
        expect([one.getsockopt(socket.SOL_SOCKET, 38) for one in self.others], [15, 4], "their protocols")
        # RTM_GETLINK, all of them: header, then `struct ifinfomsg`.
        self.netlink.send(struct.pack("IHHII16x", 32, 18, 0x301, 1, 0))
        done = False
        while not done:
            data = self.netlink.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("IH", data)
                if kind == 2:
                    raise AssertionError("the kernel refuses")
                done |= kind == 3
                data = data[(length + 3) & ~3 :]


class Everywhere(Held):
    """A netlink socket that hears of other network namespaces, too (NETLINK_LISTEN_ALL_NSID)."""

    NETLINK, LISTEN_ALL_NSID = 270, 8
    NEWRULE, NEWNSID = 32, 88
    # Nothing but what is made here changes rules (RTMGRP_IPV4_RULE).
    GROUP = 0x80

    def __init__(self):
        self.ears = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self.ears.setsockopt(self.NETLINK, self.LISTEN_ALL_NSID, 1)
        self.ears.bind((0, self.GROUP))
        self.ears.settimeout(20)

    def check(self):
        expect(self.ears.getsockopt(self.NETLINK, self.LISTEN_ALL_NSID), 1, "whether it listens everywhere")

    def ask(self, kind, flags, content):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            # NLM_F_REQUEST, NLM_F_ACK
            kernel.send(struct.pack("IHHII", 16 + len(content), kind, 5 | flags, 1, 0) + content)
            kind, error = struct.unpack_from("4xH10xi", kernel.recv(1 << 16))
            expect((kind, error), (2, 0), "what the kernel answers")

    def drain(self):
        """Another namespace is made, has a number here, and says something."""
        told, tell = os.pipe()
        made, make = os.pipe()

        def elsewhere():
            import ctypes

            expect(ctypes.CDLL(None).unshare(0x40000000), 0, "unshare(CLONE_NEWNET)")
            os.write(make, b"x")
            os.read(told, 1)
            # A rule of IPv4 that looks into the main table, new.
            self.ask(self.NEWRULE, 0x600, struct.pack("BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 0, 0, 1, 0))
            return 0

        pid = os.fork()
        if pid == 0:
            try:
                os._exit(elsewhere())
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(99)
        try:
            os.read(made, 1)
            self.ask(self.NEWNSID, 0, struct.pack("B3xHHiHHI", socket.AF_UNSPEC, 8, 1, -1, 8, 2, pid))
        finally:
            os.write(tell, b"x")
            ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for fd in (told, tell, made, make):
                os.close(fd)
        expect(ended, 0, "how the other namespace's process ended")
        data, about, _, _ = self.ears.recvmsg(1 << 16, 100)
        expect(struct.unpack_from("4xH", data)[0], self.NEWRULE, "what was heard")
        expect([one[:2] for one in about], [(self.NETLINK, self.LISTEN_ALL_NSID)], "of which namespace")


class Ended(Held):
    """TCP connections that have ended in both directions, with data that nobody has read."""

    def __init__(self):
        self.begin()

    def begin(self):
        self.ended = []
        for family in LOOPBACK:
            listener = socket.socket(family)
            listener.bind((LOOPBACK[family], 0))
            listener.listen()
            client = socket.create_connection(listener.getsockname()[:2])
            server, _ = listener.accept()
            listener.close()
            client.sendall(b"last words " * 1000)
            client.shutdown(socket.SHUT_WR)
            server.shutdown(socket.SHUT_WR)
            expect(client.recv(10), b"", "the server's end")
            client.close()
            while server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x07":
                time.sleep(0.001)
            self.ended.append(server)

    def check(self):
        for server in self.ended:
            expect(server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1), b"\x07", "the state of an ended connection")
            expect(server.recv(10, socket.MSG_PEEK), b"last words", "what waits at an ended connection")

    def drain(self):
        for server in self.ended:
            data = b""
            while piece := server.recv(5000):
                data += piece
            expect(data == b"last words " * 1000, True, "what came of an ended connection")
            expect(server.recv(10), b"", "behind its end")
            server.close()
        self.begin()


class Listening(Held):
    """A socket that takes connections, with a backlog and options of choice."""

    TCP_INFO, TCP_DEFER_ACCEPT, BACKLOG = 11, 9, 37

    def __init__(self):
        self.server = socket.create_server(("127.0.0.1", 0), backlog=self.BACKLOG)
        self.server.setsockopt(socket.IPPROTO_TCP, self.TCP_DEFER_ACCEPT, 5)
        self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
        self.options = self.tell()

    def tell(self):
        # Of a listening socket, the kernel tells its backlog as `tcpi_sacked`.
        info = self.server.getsockopt(socket.IPPROTO_TCP, self.TCP_INFO, 104)
        options = (self.TCP_DEFER_ACCEPT, socket.TCP_KEEPIDLE)
        values = [self.server.getsockopt(socket.IPPROTO_TCP, option) for option in options]
        return self.server.getsockname(), struct.unpack_from("I", info, 28)[0], values

    def check(self):
        expect(self.tell(), self.options, "name, backlog and options")
        expect(self.tell()[1], self.BACKLOG, "the backlog")


class Buffers(Held):
    """A connection whose buffers have the sizes that the program chose, and one whose have not."""

    BOTH = (socket.SO_SNDBUF, socket.SO_RCVBUF)

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.idle = socket.socket()
            self.chosen = [self.idle]
            for _ in range(2):
                self.chosen += [socket.create_connection(server.getsockname()), server.accept()[0]]
        self.left_alone = [self.chosen.pop(), self.chosen.pop()]
        for number, one in enumerate(self.chosen):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 70_000 + 1000 * number)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 90_000 + 1000 * number)
        self.sizes = self.look()

    def look(self):
        return [[one.getsockopt(socket.SOL_SOCKET, which) for which in self.BOTH] for one in self.chosen]

    def check(self):
        expect(self.look(), self.sizes, "the sizes of buffers that were chosen")
        expect(self.sizes[0], [140_000, 180_000], "the kernel doubles them")
        for one in self.left_alone:
            # The kernel goes on to choose: SO_BUF_LOCK.
            expect(one.getsockopt(socket.SOL_SOCKET, 72), 0, "buffers that nobody chose")


class Routes(Held):
    """What goes elsewhere is sent to a gateway, of either family."""

    def __init__(self):
        self.routes = self.look()
        default = ("eth0", "00000000", "00000000"), ("eth0", "0" * 32, "00")
        expect([any(line[:3] == wanted for line in self.routes) for wanted in default], [True, True], f"two default routes in {self.routes}")

    def look(self):
        found = []
        # Interface, destination, mask, gateway, flags; the rest counts.
        with open("/proc/net/route") as file:
            found += [tuple(words[at] for at in (0, 1, 7, 2, 3)) for words in map(str.split, file)]
        # Interface, destination, length, gateway, metric: those that lead on, as the others come with the address.
        with open("/proc/net/ipv6_route") as file:
            found += [tuple(words[at] for at in (9, 0, 1, 4, 5)) for words in map(str.split, file) if int(words[4], 16)]
        return sorted(found)

    def check(self):
        expect(self.look(), self.routes, "the routes")


def main():
    held = [Routes(), Listening(), Buffers(), Ended(), Udp(socket.AF_INET, "0.0.0.0"), Udp(socket.AF_INET, "127.0.0.1"), Udp(socket.AF_INET6, "::1"), Group(), Idle()]
    # Kernels that do not tell the option can't have it carried.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        try:
            kernel.getsockopt(Everywhere.NETLINK, Everywhere.LISTEN_ALL_NSID)
            held.append(Everywhere())
        except OSError:
            pass
    run(held)


main()
