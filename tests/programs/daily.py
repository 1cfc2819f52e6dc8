"""Days of some seconds: most of each does next to nothing, its end computes and uses a block of memory that nothing else uses.

daily.py LOG DAY_S PEAK_S MIB: a line in LOG per peak, with the number of major faults that it took to use the block first."""

import random
import sys
import time

log, day_s, peak_s, mib = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
PAGE = 4096
block = bytearray(mib << 20)
expected = []
for page in range(0, len(block), PAGE):
    word = random.getrandbits(64).to_bytes(8, "little") * 16
    block[page : page + 128] = word
    expected.append(word[:8])


def faults():
    with open("/proc/self/stat") as stat:
        return int(stat.read().rsplit(")", 1)[1].split()[9])


def use():
    for number, page in enumerate(range(0, len(block), PAGE)):
        if block[page : page + 8] != expected[number]:
            raise SystemExit(f"page {number} is wrong")


begun = time.monotonic()
with open(log, "a", buffering=1) as out:
    for day in range(10**6):
        peak = begun + (day + 1) * day_s - peak_s
        while time.monotonic() < peak:
            time.sleep(0.05)
        before = faults()
        use()
        out.write(f"{day} {faults() - before}\n")
        while time.monotonic() < begun + (day + 1) * day_s:
            use()
