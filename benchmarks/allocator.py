"""Memory that is freed is kept for what is allocated next, as allocators of GPUs and of long-lived servers do it."""

import ctypes
import platform

import torch

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory(at_once: int = 0) -> None:
    """Have the C library keep freed memory, from now on, for this process.

    It otherwise gives large tensors back to the system, and every new one is paid for by the page: in a small virtual
    machine at ten times the price of writing it. What holds most memory, ordinary training, pays most, so that a
    comparison of seconds would say more of the system than of the methods. Libraries other than glibc are left as they
    are.

    Args:
        at_once: bytes that are paid for now, so that the first steps are as fast as later ones.

    Raises:
        OSError: glibc refused.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        raise OSError("mallopt refused to keep freed memory")
    torch.empty(at_once, dtype=torch.uint8).fill_(1)
