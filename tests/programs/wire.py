"""Says who announces an address on an interface, and who resets a connection: `wire.py INTERFACE`."""

import ctypes
import socket
import struct
import sys

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
TCP, ICMPV6 = 6, 58
RESET = 4
NEIGHBOUR_ADVERTISEMENT, SOLICITED = 136, 0x40


def say(*words):
    print(*words, flush=True)


def arp(packet):
    sender, target = packet[14:18], packet[24:28]
    if sender == target:
        say("announced", socket.inet_ntop(socket.AF_INET, sender))


def segment(source, packet):
    if packet[13] & RESET:
        say("reset by", source)


def ipv4(packet):
    if packet[9] == TCP:
        segment(socket.inet_ntop(socket.AF_INET, packet[12:16]), packet[(packet[0] & 15) * 4 :])


def ipv6(packet):
    source, payload = socket.inet_ntop(socket.AF_INET6, packet[8:24]), packet[40:]
    if packet[6] == TCP:
        segment(source, payload)
    if packet[6] == ICMPV6 and payload[0] == NEIGHBOUR_ADVERTISEMENT and not payload[4] & SOLICITED:
        say("announced", socket.inet_ntop(socket.AF_INET6, payload[8:24]))


# For the kernel to pass over all data (classic BPF): ARP, ICMPv6, and TCP segments that reset.
FILTER = [
    (0x28, 0, 0, 12),  # ldh [12]
    (0x15, 13, 0, ARP),  # jeq accept
    (0x15, 0, 5, IPV4),  # jeq, else IPv6
    (0x30, 0, 0, 23),  # ldb [23]
    (0x15, 0, 9, TCP),  # jeq, else drop
    (0xB1, 0, 0, 14),  # ldxb 4*([14]&0xf)
    (0x50, 0, 0, 27),  # ldb [x+27]
    (0x45, 7, 6, RESET),  # jset accept, else drop
    (0x15, 0, 5, IPV6),  # jeq, else drop
    (0x30, 0, 0, 20),  # ldb [20]
    (0x15, 4, 0, ICMPV6),  # jeq accept
    (0x15, 0, 2, TCP),  # jeq, else drop
    (0x30, 0, 0, 67),  # ldb [67]
    (0x45, 1, 0, RESET),  # jset accept, else drop
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFF),  # accept
]
SO_ATTACH_FILTER = 26

frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in FILTER))
frames.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(FILTER), ctypes.addressof(code)))
frames.bind((sys.argv[1], 3))
say("ready")
while True:
    frame = frames.recv(65536)
    kind = struct.unpack_from("!H", frame, 12)[0]
    look = {ARP: arp, IPV4: ipv4, IPV6: ipv6}.get(kind)
    if look:
        look(frame[14:])
