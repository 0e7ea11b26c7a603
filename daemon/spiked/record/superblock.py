"""The first 48 bytes of an HDF5 file (superblock version 2 or 3): who has it open, where it ends.

A writer that died leaves its consistency flags set, and HDF5 then refuses the file. `h5clear -s` clears
them; it is not part of h5py's wheels, and what it does is small: two fields and a checksum.
Layout and checksum: HDF5 File Format Specification 3.0, section II.A and (Jenkins' lookup3) appendix.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from spiked.errors import RecordingError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SIZE = 48
WRITE_ACCESS, SWMR_ACCESS = 1, 4
MASK = 0xFFFFFFFF


def _rot(x: int, k: int) -> int:
    return ((x << k) | (x >> (32 - k))) & MASK


def lookup3(data: bytes) -> int:
    """Bob Jenkins' lookup3 hash (hashlittle with initial value 0), public domain, 2006."""
    a = b = c = (0xDEADBEEF + len(data)) & MASK
    if not data:
        return c
    blocks = (len(data) - 1) // 12
    for i in range(blocks):
        x, y, z = struct.unpack_from("<III", data, 12 * i)
        a, b, c = (a + x) & MASK, (b + y) & MASK, (c + z) & MASK
        for k, into in ((4, "a"), (6, "b"), (8, "c"), (16, "a"), (19, "b"), (4, "c")):
            if into == "a":
                a = ((a - c) & MASK) ^ _rot(c, k)
                c = (c + b) & MASK
            elif into == "b":
                b = ((b - a) & MASK) ^ _rot(a, k)
                a = (a + c) & MASK
            else:
                c = ((c - b) & MASK) ^ _rot(b, k)
                b = (b + a) & MASK
    x, y, z = struct.unpack("<III", data[12 * blocks :].ljust(12, b"\0"))
    a, b, c = (a + x) & MASK, (b + y) & MASK, (c + z) & MASK
    c = ((c ^ b) - _rot(b, 14)) & MASK
    a = ((a ^ c) - _rot(c, 11)) & MASK
    b = ((b ^ a) - _rot(a, 25)) & MASK
    c = ((c ^ b) - _rot(b, 16)) & MASK
    a = ((a ^ c) - _rot(c, 4)) & MASK
    b = ((b ^ a) - _rot(a, 14)) & MASK
    return ((c ^ b) - _rot(b, 24)) & MASK


@dataclass(frozen=True)
class Superblock:
    """`flags`: who marked the file as open; `eof`: where HDF5 believes it ends; `raw`: the 48 bytes."""

    flags: int
    eof: int
    raw: bytes

    @property
    def open_for_write(self) -> bool:
        return bool(self.flags & (WRITE_ACCESS | SWMR_ACCESS))

    def cleared(self, file_size: int) -> bytes:
        """The 48 bytes of a closed file.

        The end is moved to the file's if more was written than was noted.
        """
        head = bytearray(self.raw[:44])
        head[11] = 0
        head[28:36] = struct.pack("<Q", max(self.eof, file_size))
        return bytes(head) + struct.pack("<I", lookup3(bytes(head)))


def parse(head: bytes, path: Path) -> Superblock:
    """RecordingError where these are not the first bytes of a file that this daemon wrote."""
    if len(head) < SIZE or not head.startswith(SIGNATURE):
        raise RecordingError(f"{path} is not an HDF5 file; give a session file or folder")
    if head[8] not in (2, 3) or head[9] != 8 or head[10] != 8:
        raise RecordingError(
            f"{path} is an HDF5 file of another kind (superblock {head[8]}); it was not recorded by spiked"
        )
    if struct.unpack_from("<I", head, 44)[0] != lookup3(head[:44]):
        raise RecordingError(f"{path} is damaged in its first 48 bytes; restore it from a copy")
    return Superblock(head[11], struct.unpack_from("<Q", head, 28)[0], head[:SIZE])


def read(path: Path) -> Superblock:
    """RecordingError as in `parse`, or when the file cannot be read."""
    try:
        with open(path, "rb") as f:
            return parse(f.read(SIZE), path)
    except OSError as e:
        raise RecordingError(f"cannot read {path}: {e.strerror}") from e


def clear(path: Path) -> bool:
    """Clear the flags a dead writer left, in place; True when there were any.

    The caller holds the writer's lock.
    """
    block = read(path)
    if not block.open_for_write:
        return False
    fd = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(fd).st_size
        os.ftruncate(fd, max(size, block.eof))  # HDF5 may have reserved more than it came to write
        os.pwrite(fd, block.cleared(size), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    return True
