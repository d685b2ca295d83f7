"""Number formats: what codes stand for, and the ops that a converted graph writes them with."""

from torchquant.formats.integer import (
    FLOAT8,
    INT2,
    INT3,
    INT4,
    INT7_NARROW,
    INT8,
    INT8_NARROW,
    TERNARY,
    UINT7,
    UINT8,
    broadcast,
    decode,
    encode,
)

__all__ = [
    "FLOAT8",
    "INT2",
    "INT3",
    "INT4",
    "INT7_NARROW",
    "INT8",
    "INT8_NARROW",
    "TERNARY",
    "UINT7",
    "UINT8",
    "broadcast",
    "decode",
    "encode",
]
