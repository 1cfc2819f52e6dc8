"""Holds pseudo-terminals, and checks them: `terminals.py LOG`. Each has a child that is controlled by it."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
import tty

from holding import Held, expect, run

TIOCGPKT, TIOCGEXCL = 0x80045438, 0x80045440


def read_until(fd, end, limit=20):
    data = b""
    deadline = time.monotonic() + limit
    while not data.endswith(end):
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"{data!r} came, and not {end!r}")
        data += os.read(fd, 4096)
    return data


class Shell(Held):
    """A shell with jobs: what is typed ahead, what was printed, the window, the foreground group."""

    def __init__(self):
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["PS1"] = "$ "
            os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])
        read_until(self.master, b"$ ")
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 1, 2))
        self.name = self.ask("tty")
        self.number = 0
        self.lines = 0

    def ask(self, command):
        os.write(self.master, command.encode() + b"\n")
        text = read_until(self.master, b"$ ").decode()
        return text.replace("\r", "").split("\n")[-2]

    def check(self):
        self.lines += 1
        expect(self.ask(f"echo line {self.lines}"), f"line {self.lines}", "the shell's answer")
        expect(self.ask("tty"), self.name, "the terminal's name")
        expect(self.ask("stty size"), "33 77", "the window")
        expect(os.tcgetpgrp(self.master), os.getpgid(self.pid), "the foreground group")

    def drain(self):
        # A job in the foreground gets what is typed, and the signal of a key.
        os.write(self.master, b"cat\n")
        read_until(self.master, b"cat\r\n")
        os.write(self.master, b"to the cat\n")
        read_until(self.master, b"to the cat\r\nto the cat\r\n")
        os.write(self.master, b"\x03")
        read_until(self.master, b"$ ")


class Raw(Held):
    """A terminal without a shell: raw on the one hand, by lines on the other, with both queues filled."""

    def __init__(self, by_lines):
        self.by_lines = by_lines
        self.master, self.slave = pty.openpty()
        if by_lines:
            settings = termios.tcgetattr(self.slave)
            settings[3] &= ~termios.ECHO
            termios.tcsetattr(self.slave, termios.TCSANOW, settings)
        else:
            tty.setraw(self.slave)
        os.set_blocking(self.slave, False)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 11, 22, 0, 0))
        self.settings = termios.tcgetattr(self.slave)
        self.number = 0
        self.fill()

    def fill(self):
        self.number += 1
        os.write(self.master, b"typed %d\nand half" % self.number)
        os.write(self.slave, b"printed %d\n" % self.number)

    def check(self):
        expect(termios.tcgetattr(self.slave), self.settings, "the settings")
        expect(fcntl.ioctl(self.slave, termios.TIOCGWINSZ, b"\0" * 8), struct.pack("4H", 11, 22, 0, 0), "the window")

    def drain(self):
        if self.by_lines:
            expect(os.read(self.slave, 100), b"typed %d\n" % self.number, "the line that was typed")
            try:
                raise AssertionError(f"half a line can be read: {os.read(self.slave, 100)!r}")
            except BlockingIOError:
                pass
            # The half is still edited: erase a letter, and end it.
            os.write(self.master, b"\x7f\n")
            deadline = time.monotonic() + 20
            while not select.select([self.slave], [], [], 0.1)[0] and time.monotonic() < deadline:
                pass
            expect(os.read(self.slave, 100), b"and hal\n", "the half that was edited")
            expect(read_until(self.master, b"\n"), b"printed %d\r\n" % self.number, "what was printed")
        else:
            expect(os.read(self.slave, 100), b"typed %d\nand half" % self.number, "what was typed")
            expect(read_until(self.master, b"\n"), b"printed %d\n" % self.number, "what was printed")
        self.fill()


class Stopped(Held):
    """Output was stopped by Ctrl-S."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.slave, False)
        self.stop()

    def stop(self):
        os.write(self.master, b"\x13")
        time.sleep(0.05)

    def check(self):
        expect(select.select([], [self.slave], [], 0)[1], [], "that it can be written to")

    def drain(self):
        os.write(self.master, b"\x11")
        expect(bool(select.select([], [self.slave], [], 20)[1]), True, "that it can be written to")
        os.write(self.slave, b"on\n")
        read_until(self.master, b"on\r\n")
        self.stop()


class Packets(Held):
    """The master is in packet mode: a byte before what is read says that it is data. Nobody else may open the slave."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        fcntl.ioctl(self.slave, termios.TIOCEXCL)
        fcntl.ioctl(self.master, termios.TIOCPKT, struct.pack("i", 1))
        os.write(self.slave, b"waits")

    def drain(self):
        expect(os.read(self.master, 100), b"\0waits", "a packet")
        os.write(self.slave, b"waits")

    def check(self):
        for fd, asked, what in ((self.master, TIOCGPKT, "packet mode"), (self.slave, TIOCGEXCL, "being exclusive")):
            expect(struct.unpack("i", fcntl.ioctl(fd, asked, b"\0" * 4)), (1,), what)


def main():
    run([Packets(), Shell(), Raw(True), Raw(False), Stopped()])


main()
