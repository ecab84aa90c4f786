"""How many files a process may have open, each socket being one.

Owns the question and the answer on each system; must not know what the files are.
"""

import sys
from contextlib import suppress

if sys.platform != "win32":
    import resource

DESCRIPTORS_MAX = 1_048_576
"""File descriptors a process is taken to have where it says that there is no bound."""


def descriptors() -> int:
    """How many file descriptors this process may have."""
    if sys.platform != "win32":
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft != resource.RLIM_INFINITY:
            return soft
    return DESCRIPTORS_MAX


def raise_descriptor_limit() -> None:
    """Take as many file descriptors as are allowed: a socket takes one, and the soft limit is often 1 024."""
    if sys.platform != "win32":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
        if descriptors() < most:
            with suppress(ValueError, OSError):  # macOS has a limit below its hard limit
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
