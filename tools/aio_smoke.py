"""Linux AIO by raw system calls from ctypes: one O_DIRECT read, reaped both ways.

    python3 tools/aio_smoke.py [FOLDER]

Prints OK at the end.  Needs nothing but Python, not even rawaio: what it prints tells what a
machine's kernel does.  The file goes into FOLDER, by default $DATA or the current folder, which
must take O_DIRECT.
"""

import ctypes
import errno
import mmap
import os
import platform
import select
import struct
import sys

# io_setup, io_destroy, io_getevents, io_submit, io_cancel, io_pgetevents, membarrier, eventfd2
NUMBERS = {
    "x86_64": (206, 207, 208, 209, 210, 333, 324, 290),
    "aarch64": (0, 1, 4, 2, 3, 292, 283, 19),
    "i686": (245, 246, 247, 248, 249, 385, 375, 328),
    "armv7l": (243, 244, 245, 246, 247, 399, 389, 356),
}
# platform.machine() names the kernel, not the process: a 32-bit Python on a 64-bit kernel
# reads x86_64 or aarch64 there, whose numbers would be quite other calls in such a process.
machine = platform.machine()
if struct.calcsize("P") == 4:
    machine = {"x86_64": "i686", "aarch64": "armv7l", "armv8l": "armv7l"}.get(machine, machine)
SETUP, DESTROY, GETEVENTS, SUBMIT, CANCEL, PGETEVENTS, MEMBARRIER, EVENTFD2 = NUMBERS[machine]
PREAD, FLAG_RESFD = 0, 1

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def syscall(number, *arguments):
    # Each argument is a long: a bare Python int would go as a C int, with the upper half undefined.
    result = libc.syscall(ctypes.c_long(number), *(
        ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Iocb(ctypes.Structure):       # little-endian layout
    _fields_ = [
        ("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("rw_flags", ctypes.c_int32),
        ("opcode", ctypes.c_uint16), ("reqprio", ctypes.c_int16), ("fd", ctypes.c_uint32),
        ("buf", ctypes.c_uint64), ("nbytes", ctypes.c_uint64), ("offset", ctypes.c_int64),
        ("reserved2", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("resfd", ctypes.c_uint32),
    ]


class Event(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("obj", ctypes.c_uint64),
                ("res", ctypes.c_int64), ("res2", ctypes.c_int64)]


class Ring(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in (
        "id", "nr", "head", "tail",
        "magic", "compat_features", "incompat_features", "header_length")]


assert (ctypes.sizeof(Iocb), ctypes.sizeof(Event), ctypes.sizeof(Ring)) == (64, 32, 32)
print(platform.platform(), "Python", platform.python_version(), "page", mmap.PAGESIZE)

folder = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DATA", ".")
path = os.path.join(folder, "aio-smoke.dat")
with open(path, "wb") as file:
    file.write(bytes(i * 7 % 251 for i in range(65536)))
    os.fsync(file.fileno())
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 65536)
address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))

context = ctypes.c_ulong(0)
syscall(SETUP, 128, ctypes.byref(context))
print("context", hex(context.value))
with open("/proc/self/maps") as maps:
    print(*(line.strip() for line in maps if "[aio]" in line), sep="\n")
with open("/proc/sys/fs/aio-nr") as file:
    print("aio-nr", file.read().strip())
ring = Ring.from_address(context.value)
assert ring.magic == 0xA10A10A1, hex(ring.magic)
print({name: hex(getattr(ring, name)) for name, _ in Ring._fields_})
assert (ring.header_length, ring.compat_features & 1, ring.incompat_features) == (32, 1, 0)

# PRIVATE_EXPEDITED, registered first: with it a reader of the ring need not fence itself.
commands = syscall(MEMBARRIER, 0, 0, 0)
print("membarrier commands", hex(commands))
syscall(MEMBARRIER, 16, 0, 0)
syscall(MEMBARRIER, 8, 0, 0)

eventfd = syscall(EVENTFD2, 0, os.O_CLOEXEC | os.O_NONBLOCK)


def submit(offset, tag):
    iocb = Iocb(data=tag, opcode=PREAD, fd=fd, buf=address, nbytes=4096, offset=offset,
                flags=FLAG_RESFD, resfd=eventfd)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(iocb))
    assert syscall(SUBMIT, context.value, 1, pointers) == 1
    return iocb


def check(event, iocb, offset):
    assert (event.data, event.obj, event.res, event.res2) == (
        iocb.data, ctypes.addressof(iocb), 4096, 0), [getattr(event, n) for n, _ in Event._fields_]
    assert buffer[:4096] == bytes(i * 7 % 251 for i in range(offset, offset + 4096))
    buffer[:4096] = bytes(4096)


events = ctypes.cast(context.value + 32, ctypes.POINTER(Event))

iocb = submit(4096, 0x1122334455667788)
select.select([eventfd], [], [])
assert os.read(eventfd, 8) == struct.pack("Q", 1)
assert (ring.head, ring.tail) == (0, 1), (ring.head, ring.tail)
check(events[ring.head], iocb, 4096)
ring.head = (ring.head + 1) % ring.nr
print("reaped from the ring")

iocb = submit(8192, 2)
result = (Event * 4)()
assert syscall(GETEVENTS, context.value, 1, 4, result, 0) == 1
check(result[0], iocb, 8192)
print("reaped by io_getevents; head, tail", ring.head, ring.tail)

iocb = submit(12288, 3)
assert syscall(PGETEVENTS, context.value, 1, 4, result, 0, 0) == 1
check(result[0], iocb, 12288)
print("reaped by io_pgetevents")

try:
    syscall(CANCEL, context.value, ctypes.byref(iocb), result)
except OSError as error:
    print("io_cancel of what is done:", errno.errorcode[error.errno])

syscall(DESTROY, context.value)
try:
    syscall(DESTROY, context.value)
except OSError as error:
    print("io_destroy again:", errno.errorcode[error.errno])
os.unlink(path)
print("OK")
