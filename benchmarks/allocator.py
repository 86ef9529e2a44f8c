"""Memory that is freed is kept for what is allocated next, as allocators of GPUs and of long-lived servers do it."""

import ctypes

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have the C library keep freed memory, from now on, for this process.

    It otherwise gives large tensors back to the system, and every new one is paid for by the page: in a sandbox such as
    gVisor at ten times the price of writing it. What holds most memory, ordinary training, pays most, so that a
    comparison of seconds would say more of the system than of the methods.

    Raises:
        OSError: the C library is not glibc.
    """
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        raise OSError("mallopt refused to keep freed memory")
