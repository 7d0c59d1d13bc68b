"""bf16 for Triton's interpreter, in tests alone.

The interpreter keeps bf16 numbers as uint16: it multiplies their bit patterns, and it rounds towards zero. Here
they are widened to fp32 for every operation and rounded to nearest even on the way back, as a GPU does.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits):
    """bf16 as uint16 to fp32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(numbers):
    """fp32 to bf16 as uint16, to nearest even; NaN stays NaN."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle):
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


_original = {
    name: getattr(InterpreterBuilder, name)
    for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op")
}


def _cast_impl(self, source, to):
    if to.scalar == tl.bfloat16:
        return source if _is_bf16(source) else TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
    return _original["cast_impl"](self, _wide(source), to) if to.scalar != tl.float32 else _to_fp32(self, source, to)


def _to_fp32(self, source, to):
    return _wide(source) if _is_bf16(source) else _original["cast_impl"](self, source, to)


def _create_fp_to_fp(self, source, to, rounding):
    if _is_bf16(source) or to.scalar == tl.bfloat16:
        return _cast_impl(self, source, to)
    return _original["create_fp_to_fp"](self, source, to, rounding)


def _create_dot(self, a, b, acc, *options):
    return _original["create_dot"](self, _wide(a), _wide(b), acc, *options)


def _binary_op(self, left, right, op):
    if not (_is_bf16(left) or _is_bf16(right)):
        return _original["binary_op"](self, left, right, op)
    result = op(_wide(left).data, _wide(right).data)
    if result.dtype == np.bool_:
        return TensorHandle(result, tl.int1)
    return TensorHandle(narrow(result), tl.bfloat16)


def _unary_op(self, operand, op):
    if not _is_bf16(operand):
        return _original["unary_op"](self, operand, op)
    return TensorHandle(narrow(op(widen(operand.data))), tl.bfloat16)


@contextmanager
def installed():
    with patch.multiple(
        InterpreterBuilder,
        cast_impl=_cast_impl,
        create_fp_to_fp=_create_fp_to_fp,
        create_dot=_create_dot,
        binary_op=_binary_op,
        unary_op=_unary_op,
    ):
        yield interpreter
