"""CUDA's context of a process, opened while torch is being imported: both take seconds.

The driver's library makes it, with the interpreter's lock given up; torch finds it there, for it computes in the
device's primary context, too. What fails here fails again when torch asks, and torch says what is wrong.
"""

import ctypes
import threading


def begin_context() -> threading.Thread:
    """The thread that opens the context of the first device that this process sees."""
    thread = threading.Thread(target=_open, name="headrace-context", daemon=True)
    thread.start()
    return thread


def _open() -> None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
