"""Device memory from and for other libraries, by DLPack (version 0.x capsules, which every library takes).

https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from promprune.errors import BackendError

__all__ = ["CPU", "CUDA", "BorrowedTensor", "capsule_of"]

CPU: Final = 1
CUDA: Final = 2

_NAME: Final = b"dltensor"
_USED: Final = b"used_dltensor"
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_CODES: Final[Mapping[str, tuple[int, int]]] = {  # numpy's name -> code and bits
    "float32": (_FLOAT, 32),
    "float16": (_FLOAT, 16),
    "bfloat16": (_BFLOAT, 16),
    "int64": (_INT, 64),
    "int32": (_INT, 32),
    "int8": (_INT, 8),
    "uint8": (_UINT, 8),
    "bool": (_BOOL, 8),
}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_ManagedTensor))
_ManagedTensor._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _Destructor]
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))

# What was handed out, by the address of its header: it lives until its taker calls the deleter.
_lent: dict[int, tuple[object, ...]] = {}


def _delete(header: Any) -> None:
    _lent.pop(ctypes.addressof(header.contents), None)


def _drop_unused(capsule: int) -> None:
    if _is_valid(capsule, _NAME):  # nobody took it
        _lent.pop(_pointer_of(capsule, _NAME), None)


_deleter = _Deleter(_delete)
_destructor = _Destructor(_drop_unused)


def capsule_of(owner: object, address: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int]) -> object:
    """Lend contiguous memory; ``owner`` lives until whoever takes the capsule is done with it.

    Raises:
        BackendError: DLPack has no name for the dtype.
    """
    if dtype not in _CODES:
        raise BackendError(f"received dtype {dtype} for DLPack", expected=f"one of {', '.join(_CODES)}")
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    header = _ManagedTensor()
    header.tensor.data = address
    header.tensor.device = _Device(*device)
    header.tensor.ndim = len(shape)
    header.tensor.dtype = _DataType(*_CODES[dtype], 1)
    header.tensor.shape = sizes
    header.deleter = _deleter
    _lent[ctypes.addressof(header)] = (header, sizes, owner)
    return _api.PyCapsule_New(ctypes.addressof(header), _NAME, _destructor)


class BorrowedTensor:
    """A tensor of another library, used where it lies; satisfies :class:`DeviceTensor`.

    Args:
        source: offers ``__dlpack__``; must be contiguous.
        device: DLPack's type and number of the device it has to be on.
        stream: on which it will be used; the source makes sure that it is complete there.

    Raises:
        BackendError: it is on another device, not contiguous, or of a dtype that no graph has.
    """

    def __init__(self, source: Any, device: tuple[int, int], stream: int | None) -> None:
        found = tuple(int(part) for part in source.__dlpack_device__())
        if found != device:
            raise BackendError(f"received a tensor on DLPack device {found}", expected=f"{device}", fix="move it there")
        capsule = source.__dlpack__() if stream is None else source.__dlpack__(stream=stream)
        pointer = _pointer_of(id(capsule), _NAME)
        _rename(capsule, _USED)  # from here on its deleter is ours to call
        header = ctypes.cast(pointer, ctypes.POINTER(_ManagedTensor))
        weakref.finalize(self, header.contents.deleter, header).atexit = False
        tensor = header.contents.tensor
        self.shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
        code = (tensor.dtype.code, tensor.dtype.bits)
        names = [name for name, known in _CODES.items() if known == code and tensor.dtype.lanes == 1]
        if not names or not _is_contiguous(tensor, self.shape):
            raise BackendError(
                f"received a tensor of shape {list(self.shape)} that no graph takes (DLPack dtype {code})",
                expected=f"a contiguous one of {', '.join(_CODES)}",
            )
        self.dtype = names[0]
        self.address = int(tensor.data or 0) + tensor.byte_offset
        self._source = source

    @property
    def nbytes(self) -> int:
        """Its size, in bytes."""
        return int(math.prod(self.shape) * np.dtype(self.dtype).itemsize)

    def numpy(self) -> Any:
        """Return its content as an array on the host; do not write to it."""
        source = self._source.cpu() if hasattr(self._source, "cpu") else self._source
        return np.from_dlpack(source)


def _is_contiguous(tensor: _Tensor, shape: tuple[int, ...]) -> bool:
    if not tensor.strides or 0 in shape:
        return True
    expected = 1
    for axis in range(tensor.ndim - 1, -1, -1):
        if shape[axis] != 1 and tensor.strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True
