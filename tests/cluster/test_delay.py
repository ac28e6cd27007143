"""The relay holds packets, keeps their order and ends with its device."""

import socket
import threading
import time

from testcluster import delay


def test_packets_come_back_in_order_and_not_before_they_are_due() -> None:
    """Each packet is held for the whole delay, and none overtakes another."""
    ours, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    relay = threading.Thread(target=delay.relay, args=(device.fileno(), 0.05))
    relay.start()
    packets = [bytes([number]) * 100 for number in range(20)]

    start = time.monotonic()
    for packet in packets:
        ours.sendall(packet)
    received = [ours.recv(delay.PACKET) for _ in packets]
    held = time.monotonic() - start
    ours.shutdown(socket.SHUT_WR)
    relay.join()
    ours.close()
    device.close()

    assert received == packets
    assert held >= 0.05
