"""Reads a pickled NumPy array, and nothing else, without unpickling.

A small interpreter of the pickle opcodes that NumPy writes (protocols 0 to 5, Python 2 and 3, NumPy 1 and 2, C and
Fortran order). No name is ever imported and no object is ever called: the constructors of `ndarray` and `dtype` become
records, and the array is made at the end from checked facts. (`pickle.Unpickler` with a filter would still hand hostile
states to NumPy's C code, and its memo can be made to allocate without bound.) Memory stays within a small multiple of
the file.
"""

from __future__ import annotations

import io
import math
import pickletools
from typing import Any, NamedTuple

import numpy as np

SIZE_LIMIT = 1 << 28
"""Bytes of the largest pickle that is read: 65,536 frames of 64x64."""
_OPCODE_LIMIT = 10_000  # an array takes fewer than a hundred
_LENGTH_LIMIT = 1 << 31  # of one axis, so that an empty array cannot claim an absurd shape


class PickleError(ValueError):
    """The bytes are not a pickled NumPy array; the message says why, without naming a file."""


class _Name(NamedTuple):
    """A global, by name only."""

    module: str
    name: str


class _DType:
    """What a pickle says about a dtype."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "|"

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "|", "=")):
            raise PickleError("holds a dtype of an unknown form")
        if any(field is not None for field in state[2:5]):
            raise PickleError("holds a structured array; expected a plain one")
        self.order = state[1]


class _Array:
    """What a pickle says about an array: shape, dtype, order and raw bytes, once built."""

    def __init__(self, state: tuple | None = None) -> None:
        self.state = state

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise PickleError("holds an array of an unknown form")
        self.state = state[1:]


_CORE = ("numpy.core", "numpy._core")
_RECONSTRUCT = {_Name(f"{core}.multiarray", "_reconstruct") for core in _CORE}
_FROM_BUFFER = {_Name(f"{core}.numeric", "_frombuffer") for core in _CORE}
_NDARRAY, _DTYPE = _Name("numpy", "ndarray"), _Name("numpy", "dtype")
_ENCODE = _Name("_codecs", "encode")  # how protocols 0 to 2 spell bytes in Python 3
_EMPTY_BYTES = {_Name(module, "bytes") for module in ("builtins", "__builtin__")}  # and how they spell no bytes
_ADMITTED = {*_RECONSTRUCT, *_FROM_BUFFER, _NDARRAY, _DTYPE, _ENCODE, *_EMPTY_BYTES}


def _call(name: Any, arguments: Any) -> Any:
    """REDUCE, for the few callables an array needs."""
    if not (isinstance(name, _Name) and isinstance(arguments, tuple)):
        raise PickleError("calls something that is not a NumPy constructor")
    if name in _RECONSTRUCT and len(arguments) == 3 and arguments[0] == _NDARRAY:
        return _Array()
    if name == _DTYPE and len(arguments) == 3 and isinstance(arguments[0], str):
        return _DType(arguments[0])
    if name in _FROM_BUFFER and len(arguments) == 4:
        data, dtype, shape, order = arguments
        return _Array((shape, dtype, order == "F", data))
    if (
        name == _ENCODE
        and len(arguments) == 2
        and arguments[1] in ("latin1", "latin-1")
        and isinstance(arguments[0], str)
    ):
        return arguments[0].encode("latin1")
    if name in _EMPTY_BYTES and arguments == ():
        return b""
    raise PickleError(f"calls {name.module}.{name.name} in an unknown way")


def _global(module: Any, name: Any) -> _Name:
    found = _Name(module, name) if isinstance(module, str) and isinstance(name, str) else None
    if found not in _ADMITTED:
        raise PickleError(f"refers to {str(module)[:80]}.{str(name)[:80]}; only NumPy arrays are read")
    return found


_MARK = object()
_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(data: bytes) -> Any:
    """Execute the opcodes on records. PickleError, or a plain Python error for malformed bytes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        if not stack or stack[-1] is _MARK:
            raise PickleError("is malformed (stack underflow)")
        return stack.pop()

    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        name = opcode.name
        if count >= _OPCODE_LIMIT:
            raise PickleError("is too complicated for an array")
        if name in ("PROTO", "FRAME"):
            continue
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            stack.append(tuple(reversed([pop() for _ in range(_TUPLES[name])])))
        elif name == "TUPLE":
            items = []
            while stack and stack[-1] is not _MARK:
                items.append(stack.pop())
            if not stack:
                raise PickleError("is malformed (no mark)")
            stack[-1] = tuple(reversed(items))
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = pop(), pop()
            stack.append(_global(module, attribute))
        elif name == "REDUCE":
            arguments, callable_ = pop(), pop()
            stack.append(_call(callable_, arguments))
        elif name == "BUILD":
            state = pop()
            if not stack or not isinstance(stack[-1], (_Array, _DType)):
                raise PickleError("sets the state of something that is not an array")
            stack[-1].build(state)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STOP":
            return pop()
        else:
            raise PickleError(f"uses the opcode {name}; only NumPy arrays are read")
    raise PickleError("is truncated")


def loads(data: bytes) -> np.ndarray:
    """The array in the pickle `data`: of booleans, integers or floats, read-only. PickleError for anything else."""
    try:
        record = _run(data)
    except PickleError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise PickleError(f"is not a whole pickle ({type(error).__name__}: {str(error)[:100]})") from None
    if not isinstance(record, _Array) or record.state is None:
        raise PickleError("holds no NumPy array")
    shape, dtype, fortran, raw = record.state
    if not isinstance(dtype, _DType):
        raise PickleError("holds an array without a dtype")
    if isinstance(raw, str):  # a Python 2 pickle: bytes were strings
        try:
            raw = raw.encode("latin1")
        except UnicodeEncodeError:
            raise PickleError("holds an array whose content is not bytes") from None
    if not isinstance(raw, (bytes, bytearray)):
        raise PickleError(f"holds an array of dtype {dtype.code[:20]}; only booleans and numbers are read")
    if dtype.code not in ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"):
        raise PickleError(f"holds an array of dtype {dtype.code[:20]}; only booleans and numbers are read")
    sane = isinstance(shape, tuple) and len(shape) <= 8
    if not sane or not all(type(n) is int and 0 <= n < _LENGTH_LIMIT for n in shape):
        raise PickleError(f"holds an array of {len(raw)} bytes and an impossible shape")
    kind = np.dtype(("=" if dtype.order == "|" else dtype.order) + dtype.code)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise PickleError(
            f"holds {len(raw)} bytes where shape {shape} of {kind} needs {math.prod(shape) * kind.itemsize}"
        )
    array = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
    array.flags.writeable = False
    return array
