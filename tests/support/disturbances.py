"""What disturbs jobs in tests: a link that breaks, a disk that fills up or goes read-only, a clock that steps."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# --- two hosts

ADDRESSES = {"ipv4": ("10.78.0.1/24", "10.78.0.2/24"), "ipv6": ("fd78::1/64", "fd78::2/64")}
RANK_0 = {family: pair[0].partition("/")[0] for family, pair in ADDRESSES.items()}
ALONE = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && hostname "$0" && exec "$@"'
"""What a process does before its command, in mounts and a host name of its own."""


def ip(*words: str) -> None:
    """The command `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts(family: str = "ipv4") -> Iterator[list[list[str]]]:
    """The beginning of a command that shall run on either host. They have addresses of that family alone."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"ql{os.getpid()}{side}" for side in "ab"]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "link0", "netns", names[1])
        for name, address in zip(names, ADDRESSES[family], strict=True):
            # Of use at once, and the only one: an address of the link's own is of none for a second or two, and
            # libraries that try all addresses fail by it.
            ip("-n", name, "link", "set", "link0", "addrgenmode", "none")
            fresh = ["nodad"] if family == "ipv6" else []
            ip("-n", name, "address", "add", address, "dev", "link0", *fresh)
            for device in ("lo", "link0"):
                ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name, "unshare", "-mu", "sh", "-c", ALONE, name] for name in names]
    finally:
        for name in names:
            ip("netns", "delete", name)


def set_link(host: list[str], state: str) -> None:
    """The link of a host of `two_hosts`, `up` or `down`."""
    ip("-n", host[3], "link", "set", "link0", state)


# --- a disk of its own


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """That folder, made and with a file system of its own, of that size (`8m`)."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a disk of its own needs a mount, which failed: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fill a file system but for `leave` bytes; the file that does."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as stream:
        try:
            while stream.write(b"\1" * 65_536) == 65_536:
                pass
        except OSError:
            pass
        stream.truncate(max(0, stream.tell() - leave))
    return path


def set_writable(folder: Path, *, writable: bool) -> bool:
    """Remount a file system of `small_disk`; whether that could be done, which an open file may keep from it."""
    how = "rw" if writable else "ro"
    command = ["mount", "-o", f"remount,{how}", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- what processes are told

LIES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long none[2], *told = none;   /* seconds that the clock is ahead; milliseconds that a sync takes */

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("TEST_LIES");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *here = mmap(0, sizeof none, PROT_READ, MAP_SHARED, file, 0);
    if (here != MAP_FAILED) told = here;
    close(file);
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, at);
    if (!failed && clock == CLOCK_REALTIME) at->tv_sec += told[0];
    return failed;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(at, zone);
    if (!failed) at->tv_sec += told[0];
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int fsync(int file) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    usleep(told[1] * 1000);
    return real(file);
}
"""
"""Loaded before everything else: the clock and the disk as a file of two numbers says. The machine's own are left
alone, since others run by them."""


class Lies:
    """The clock and the disk of processes that have `environ` can be changed while they run."""

    def __init__(self, folder: Path, preloaded: str | None) -> None:
        """Compile. `preloaded`: what they would preload anyway."""
        source, library, self._told = (folder / f"lies{suffix}" for suffix in (".c", ".so", ""))
        source.write_text(LIES)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.tell()
        preload = " ".join(filter(None, [str(library), preloaded]))
        self.environ = {"LD_PRELOAD": preload, "TEST_LIES": str(self._told)}

    def tell(self, clock_seconds: int = 0, sync_milliseconds: int = 0) -> None:
        """From now on the clock is so far ahead, and a sync of the disk takes so much longer."""
        numbers = clock_seconds.to_bytes(8, "little", signed=True) + sync_milliseconds.to_bytes(8, "little")
        with self._told.open("r+b" if self._told.exists() else "wb") as stream:
            stream.write(numbers)  # in place: it is mapped
