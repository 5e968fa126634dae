"""What a program asks of the process it runs in, where that makes a difference to its speed."""

import ctypes
import platform

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed for the next allocation, and says whether it could (glibc only).

    By default glibc maps every large array anew and gives it back at once. On CPU, XLA allocates its temporaries at
    every call, so that each step spends a fifth of its time or more on page faults. Threads share one arena, since
    those of threads are kept in pieces of 64 MiB, and given back. To be called before there are threads: an arena that
    exists stays in use. The price: memory stays as large as it was at most.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 28), (_M_ARENA_MAX, 1))
    done = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(done)
