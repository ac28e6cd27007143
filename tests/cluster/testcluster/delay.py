"""Hold the packets that are routed into a tun device, and send them on: DEVICE MILLISECONDS

Does what the netem queueing discipline does, which not every kernel has.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET = 65536


def open_device(name: str) -> int:
    """The file descriptor that carries the device's packets."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def relay(device: int, seconds: float) -> None:
    """Write back each packet when it is due, in the order in which they came, until there is no more to read."""
    held: deque[tuple[float, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        if select.select([device], [], [], wait)[0]:
            if not (packet := os.read(device, PACKET)):
                return
            held.append((time.monotonic() + seconds, packet))
        while held and held[0][0] <= time.monotonic():
            os.write(device, held.popleft()[1])


if __name__ == "__main__":
    relay(open_device(sys.argv[1]), float(sys.argv[2]) / 1000)
