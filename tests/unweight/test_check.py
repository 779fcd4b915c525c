"""Strips that a hostile or truncated file could bring never get as far as a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from unweight.check import (
    BadPointers,
    BadStrips,
    BaseOutOfRange,
    Misaligned,
    OutOfOrder,
    OutsideMatrix,
    WrongSize,
    check,
)
from unweight.strips import EXCEPTION, U12Strips, pack_u12, u12_bytes

N, K = 37, 21  # three strips, the last with 5 outputs; three groups, the last with 5 inputs


def sound() -> U12Strips:
    """Strips with 2, 0 and 2 exceptions."""
    weights = np.full((N, K), 0x3F80, np.uint16)
    weights[3, 7] = weights[4, 7] = weights[33, 0] = weights[36, 20] = 0x7F80
    return pack_u12(weights, max_exception_share=1, max_size_share=2)


def with_exception(strips: U12Strips, index: int, **fields: int) -> U12Strips:
    exceptions = strips.exceptions.copy()
    for name, value in fields.items():
        exceptions[name][index] = value
    return replace(strips, exceptions=exceptions)


def with_ptr(strips: U12Strips, *ptr: int) -> U12Strips:
    return replace(strips, ptr=np.array(ptr, np.int32))


def with_byte(strips: U12Strips, at: int) -> U12Strips:
    data = strips.data.copy()
    data[at] = 1
    return replace(strips, data=data)


def shifted(strips: U12Strips) -> U12Strips:
    room = np.zeros(strips.ptr.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 8 + 2
    ptr = room[start : start + strips.ptr.nbytes].view(np.int32)
    ptr[:] = strips.ptr
    return replace(strips, ptr=ptr)


def base_240(strips: U12Strips) -> U12Strips:
    base = strips.base.copy()
    base[-1] = 240
    return replace(strips, base=base)


LAST_GROUP = 2 * 192  # of the first strip
LAST_STRIP = 3 * 3 * 192 - 3 * 192
BROKEN: list[tuple[type[BadStrips], Callable[[U12Strips], U12Strips]]] = [
    (WrongSize, lambda s: replace(s, num_outputs=0)),
    (WrongSize, lambda s: replace(s, num_inputs=-8)),
    (WrongSize, lambda s: replace(s, num_outputs=1 << 60)),
    (WrongSize, lambda s: replace(s, num_inputs=K + 8)),
    (WrongSize, lambda s: replace(s, data=s.data[:-1])),
    (WrongSize, lambda s: replace(s, data=s.data.reshape(3, -1))),
    (WrongSize, lambda s: replace(s, data=s.data.repeat(2)[::2])),
    (WrongSize, lambda s: replace(s, base=s.base[1:])),
    (WrongSize, lambda s: replace(s, base=s.base.astype(np.uint16))),
    (WrongSize, lambda s: replace(s, ptr=s.ptr[:-1])),
    (WrongSize, lambda s: replace(s, ptr=s.ptr.astype(np.int64))),
    (WrongSize, lambda s: replace(s, exceptions=s.exceptions.view(np.uint64))),
    (Misaligned, shifted),
    (BaseOutOfRange, base_240),
    (BadPointers, lambda s: with_ptr(s, 1, 2, 2, 4)),
    (BadPointers, lambda s: with_ptr(s, 0, 2, 2, 3)),
    (BadPointers, lambda s: with_ptr(s, 0, 2, 2, 5)),
    (BadPointers, lambda s: with_ptr(s, 0, 2, 1, 4)),
    (BadPointers, lambda s: with_ptr(s, 0, -2, 2, 4)),
    (BadPointers, lambda s: with_ptr(s, 0, 1 << 30, 2, 4)),
    (BadPointers, lambda s: replace(s, exceptions=s.exceptions[:-1])),
    (BadPointers, lambda s: replace(s, exceptions=np.empty(0, EXCEPTION))),
    (OutsideMatrix, lambda s: with_exception(s, 0, k=-1)),
    (OutsideMatrix, lambda s: with_exception(s, 3, k=K)),
    (OutsideMatrix, lambda s: with_exception(s, 1, row=16)),
    (OutsideMatrix, lambda s: with_exception(s, 1, row=0xFFFF)),
    (OutsideMatrix, lambda s: with_exception(s, 3, row=5)),  # output 37
    (OutOfOrder, lambda s: with_exception(s, 0, k=8)),
    (OutOfOrder, lambda s: with_exception(s, 0, row=5)),
    (OutOfOrder, lambda s: with_exception(s, 0, row=4)),  # the same weight twice
    (OutsideMatrix, lambda s: with_byte(s, LAST_GROUP + 2 * 32 + 1)),  # sm of k = 21
    (OutsideMatrix, lambda s: with_byte(s, LAST_GROUP + 3 * 32)),  # sm of k = 22
    (OutsideMatrix, lambda s: with_byte(s, LAST_GROUP + 128 + 2 * 9 + 1)),  # a code of k = 21
    (OutsideMatrix, lambda s: with_byte(s, LAST_STRIP + 32 + 2 * 5)),  # sm of output 37
    (OutsideMatrix, lambda s: with_byte(s, LAST_STRIP + 128 + 4 * 15)),  # a code of output 47
]


def test_packed_strips_are_sound() -> None:
    check(sound())
    check(pack_u12(np.full((32, 64), 0x3F80, np.uint16)))  # no exceptions and no padding


@pytest.mark.parametrize(("error", "broken"), BROKEN)
def test_what_is_wrong_is_named(
    error: type[BadStrips], broken: Callable[[U12Strips], U12Strips]
) -> None:
    with pytest.raises(error):
        check(broken(sound()))


def may_pass(strips: U12Strips) -> bool:
    """What a kernel relies on, said one exception at a time."""
    ptr, exceptions = strips.ptr.tolist(), strips.exceptions.tolist()
    if ptr[0] != 0 or ptr[-1] != len(exceptions) or ptr != sorted(ptr):
        return False
    for strip in range(len(ptr) - 1):
        places = [(k, row) for k, row, _ in exceptions[ptr[strip] : ptr[strip + 1]]]
        if places != sorted(set(places)):
            return False
        for k, row in places:
            if not (0 <= k < K and row < 16 and strip * 16 + row < N):
                return False
    return max(strips.base.tolist()) <= 239


def test_random_damage_passes_only_where_it_does_no_harm() -> None:
    random = np.random.default_rng(5)
    verdicts = set()
    whole = sound()
    for _ in range(1000):
        damaged = str(random.choice(["base", "ptr", "exceptions"]))
        array = getattr(whole, damaged).copy()
        raw = array.view(np.uint8)
        raw[random.integers(raw.size)] = random.choice([0, 1, 2, 3, 7, 20, 239, 240, 255])
        strips = replace(whole, **{damaged: array})
        try:
            check(strips)
            passed = True
        except BadStrips:
            passed = False
        assert passed == may_pass(strips), (damaged, array)
        verdicts.add((damaged, passed))
    assert len(verdicts) == 6, "every array was damaged to both ends"


def test_a_truncated_file_is_refused_wherever_it_ends() -> None:
    strips = sound()
    sizes = u12_bytes(N, K, strips.exceptions.size)
    whole = b"".join(
        array.tobytes() for array in (strips.data, strips.base, strips.ptr, strips.exceptions)
    )
    for length in range(0, sizes.total, 8):
        rest = np.zeros(sizes.total, np.uint8)  # as a file with a hole at its end reads
        rest[:length] = np.frombuffer(whole[:length], np.uint8)
        parts = np.split(rest, np.cumsum([sizes.data, sizes.base, sizes.ptr]))
        found = U12Strips(
            data=parts[0],
            base=parts[1],
            ptr=parts[2].view(np.int32),
            exceptions=parts[3].view(EXCEPTION),
            num_outputs=N,
            num_inputs=K,
        )
        with pytest.raises(BadStrips):
            check(found)
