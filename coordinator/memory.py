"""What keeps the memory of a long-lived coordinator at what it uses: large buffers go back to the system at once.

Left alone, glibc keeps an arena for each thread and learns from the first freed buffer not to give the next one back;
a coordinator that took forty uploads would then be larger than one that took five, and stay so.
"""

from __future__ import annotations

import ctypes

#: Numbers of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BYTES = 512 << 10
ARENAS = 2


def give_memory_back() -> bool:
    """Set the allocator of this process; ``False`` where it is not glibc's, which then stays as it is."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = ((M_ARENA_MAX, ARENAS), (M_MMAP_THRESHOLD, LARGE_BYTES), (M_TRIM_THRESHOLD, LARGE_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
