"""Processes that sit in cgroups of their own making: `cgroups.py LOG`."""

import os
import sys
import time


def main():
    log = open(sys.argv[1], "a", buffering=1)
    mount = next(line.split()[4] for line in open("/proc/self/mountinfo") if " - cgroup2 " in line)

    def own():
        """The path of this process's cgroup, wherever the instance's is."""
        return mount + next(line.strip()[3:] for line in open("/proc/self/cgroup") if line.startswith("0::"))

    top = own()
    for name in ("workers", "workers/one", "idle"):
        os.mkdir(f"{top}/{name}")
    with open(f"{top}/workers/cgroup.max.descendants", "w") as file:
        file.write("7")
    with open(f"{top}/workers/cgroup.max.depth", "w") as file:
        file.write("3")
    idle = os.fork()
    if idle == 0:
        while True:
            time.sleep(0.01)
    with open(f"{top}/idle/cgroup.procs", "w") as file:
        file.write(str(idle))
    if os.fork() == 0:
        with open(f"{top}/workers/one/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))
        while True:
            if not own().endswith("/workers/one"):
                log.write(f"MISMATCH the worker is in {own()}\n")
            log.write("worker=1\n")
            time.sleep(0.05)
    while True:
        top = own()
        seen = (
            open(f"{top}/workers/cgroup.max.descendants").read().strip(),
            open(f"{top}/workers/cgroup.max.depth").read().strip(),
            open(f"{top}/idle/cgroup.procs").read().strip(),
        )
        if seen != ("7", "3", str(idle)):
            log.write(f"MISMATCH the cgroups say {seen}\n")
        log.write("main=1\n")
        time.sleep(0.05)


main()
