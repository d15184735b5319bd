"""What is asked of the CUDA driver directly, so that loading a library needs no framework."""

import ctypes
import functools

# cuda.h: CUdevice_attribute
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """libcuda, initialised; None where there is no driver or no device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None
    return driver if count.value > 0 else None


def compute_capability(device: int = 0) -> tuple[int, int] | None:
    """(major, minor) of a device; None where there is no such device."""
    driver = _driver()
    handle = ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), device) != 0:
        return None
    values = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return None
        values.append(value.value)
    return values[0], values[1]


def device_name(device: int = 0) -> str | None:
    """The product name of a device; None where there is no such device."""
    driver = _driver()
    handle = ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), device) != 0:
        return None
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGetName(name, len(name), handle)
    return name.value.decode()


def driver_version() -> str | None:
    """The highest CUDA version the driver supports, ``"13.0"`` for instance."""
    driver = _driver()
    version = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
