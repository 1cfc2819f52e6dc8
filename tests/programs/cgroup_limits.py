"""A process in a cgroup of its own making with limits: `cgroup_limits.py LOG FILE=VALUE...`, the files named by their controllers."""

import os
import sys
import time


def cgroup_of(pid):
    mount = next(line.split()[4] for line in open("/proc/self/mountinfo") if " - cgroup2 " in line)
    return mount + next(line.strip()[3:] for line in open(f"/proc/{pid}/cgroup") if line.startswith("0::"))


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def read(path):
    with open(path) as file:
        return file.read().split()


def main():
    log = open(sys.argv[1], "a", buffering=1)
    limits = [argument.split("=") for argument in sys.argv[2:]]
    controllers = sorted({name.split(".")[0] for name, _ in limits})
    top = cgroup_of("self")
    # Who gives controllers to cgroups below has no processes.
    for name, pid in (("rest", "1"), ("work", str(os.getpid()))):
        os.mkdir(f"{top}/{name}")
        write(f"{top}/{name}/cgroup.procs", pid)
    write(f"{top}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))
    for name, value in limits:
        write(f"{top}/work/{name}", value)
    while True:
        work = cgroup_of("self")
        top = os.path.dirname(work)
        seen = [[name, *read(f"{work}/{name}")] for name, _ in limits]
        if seen != limits or sorted(read(f"{top}/cgroup.subtree_control")) != controllers:
            log.write(f"MISMATCH the limits are {seen}, with {read(f'{top}/cgroup.subtree_control')}\n")
        if not work.endswith("/work") or not cgroup_of(1).endswith("/rest"):
            log.write(f"MISMATCH it is in {work}, and the first process in {cgroup_of(1)}\n")
        log.write("limits=1\n")
        time.sleep(0.05)


main()
