"""Two blocks of so many MiB in huge pages: one is read all the time, the other never."""

import errno
import mmap
import sys
import time

HUGE = 2 << 20
MADV_COLLAPSE = 25
size = int(sys.argv[1]) << 20


def block(mark):
    # Aligned as it needs only at its start: one huge page more, and it has enough.
    memory = mmap.mmap(-1, size + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = mark * len(memory)
    # A kernel that had no huge page to give when a part was written first may have one now.
    while True:
        try:
            memory.madvise(MADV_COLLAPSE)
            return memory
        except OSError as error:
            if error.errno == errno.EINVAL:
                return memory  # Before Linux 6.1.
            time.sleep(0.1)


hot, cold = block(b"h"), block(b"c")
expected = b"h" * (len(hot) // 4096)
while True:
    if hot[::4096] != expected:
        raise SystemExit("what is read is not what was written")
    time.sleep(0.1)
