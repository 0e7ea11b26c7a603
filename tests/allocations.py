"""Counts array data that is allocated: numpy's allocator replaced while a stretch of code runs, torch's CPU allocator watched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types

SET_HANDLER = 304  # PyDataMem_SetHandler's place in numpy's table of C functions

_libc = ctypes.CDLL(None)
_malloc, _calloc, _realloc, _free = _libc.malloc, _libc.calloc, _libc.realloc, _libc.free
_malloc.argtypes, _malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
_calloc.argtypes, _calloc.restype = (ctypes.c_size_t, ctypes.c_size_t), ctypes.c_void_p
_realloc.argtypes, _realloc.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
_free.argtypes, _free.restype = (ctypes.c_void_p,), None

_COUNTS = types.CPointer(types.int64)


@cfunc(types.voidptr(_COUNTS, types.uintp))
def _counted_malloc(counts, size):  # type: ignore[no-untyped-def]
    c = carray(counts, 2)
    c[0] += 1
    c[1] += size
    return _malloc(size)


@cfunc(types.voidptr(_COUNTS, types.uintp, types.uintp))
def _counted_calloc(counts, n, size):  # type: ignore[no-untyped-def]
    c = carray(counts, 2)
    c[0] += 1
    c[1] += n * size
    return _calloc(n, size)


@cfunc(types.voidptr(_COUNTS, types.voidptr, types.uintp))
def _counted_realloc(counts, data, size):  # type: ignore[no-untyped-def]
    c = carray(counts, 2)
    c[0] += 1
    c[1] += size
    return _realloc(data, size)


@cfunc(types.void(_COUNTS, types.voidptr, types.uintp))
def _plain_free(counts, data, size):  # type: ignore[no-untyped-def]
    _free(data)


class _Handler(ctypes.Structure):
    """numpy's PyDataMem_Handler."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        *((name, ctypes.c_void_p) for name in ("ctx", "malloc", "calloc", "realloc", "free")),
    )


class Allocations:
    """What was counted so far: how many buffers of array data were allocated or resized, and their bytes."""

    def __init__(self) -> None:
        self._counts = (ctypes.c_int64 * 2)()

    @property
    def calls(self) -> int:
        return self._counts[0]

    @property
    def bytes(self) -> int:
        return self._counts[1]


# An array made while counting is freed by its handler, however much later: counters and handlers stay for good.
_kept: list[Any] = []


@contextmanager
def counted() -> Iterator[Allocations]:
    """Count numpy's data allocations of this thread."""
    found = Allocations()
    handler = _Handler(
        b"counting", 1, ctypes.addressof(found._counts),
        *(f.address for f in (_counted_malloc, _counted_calloc, _counted_realloc, _plain_free)),
    )  # fmt: skip
    api = ctypes.pythonapi
    api.PyCapsule_New.restype, api.PyCapsule_GetPointer.restype = ctypes.py_object, ctypes.c_void_p
    api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    name = ctypes.create_string_buffer(b"mem_handler")
    capsule = api.PyCapsule_New(ctypes.addressof(handler), ctypes.addressof(name), None)
    _kept.extend((found, handler, name, capsule))
    table = api.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)
    address = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[SET_HANDLER]
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(address)
    before = set_handler(capsule)
    try:
        yield found
    finally:
        set_handler(before)


def torch_allocations(work: Callable[[], object]) -> tuple[int, int]:
    """(tensors' data allocated on the CPU, their bytes) while `work` runs."""
    with torch.autograd.profiler.profile(profile_memory=True, use_cpu=True) as profile:
        work()
    sizes = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    return len(sizes), sum(sizes)
