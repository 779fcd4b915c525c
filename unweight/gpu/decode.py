"""Eight BF16 weights out of the three words of a tile that hold them, in registers.

Two ways to the same bits: inline PTX of about two integer instructions a weight, and plain Triton
operations, which the interpreter runs and which take five. Codes come out with the exponent field
`code + 112`: the kernels fold the row's `2 ** (base - 112)` into their epilogue, exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def _ptx() -> str:
    """For `pack=2`: two words of each plane in, eight pairs of weights out.

    Of each pair: `prmt` puts the sign-mantissa bytes of both words into the low bytes of two
    halves and again into the high ones, a shift and a mask put the codes where exponents are,
    `lop3` joins them, and `mul` by 2 ** 112 makes exponent fields code + 112 and code 0 a zero.
    """
    lines = [
        ".reg .b32 low, high, t, u, k;",
        "mov.b32 k, 0x77807780;",  # 2 ** 112, twice
        "prmt.b32 low, $12, $13, 0x5410;",  # codes of slots 0..3 of both words
        "prmt.b32 high, $12, $13, 0x7632;",  # of slots 4..7
    ]
    selects = ("0x4400", "0x5511", "0x6622", "0x7733")
    shifts = ("shl.b32 u, {}, 7;", "shl.b32 u, {}, 3;", "shr.b32 u, {}, 1;", "shr.b32 u, {}, 5;")
    for half, (first, second, codes) in enumerate((("$8", "$9", "low"), ("$10", "$11", "high"))):
        for j, (select, shift) in enumerate(zip(selects, shifts, strict=True)):
            lines += [
                f"prmt.b32 t, {first}, {second}, {select};",
                shift.format(codes),
                "and.b32 u, u, 0x07800780;",
                "lop3.b32 t, t, 0x807F807F, u, 0xEA;",
                f"mul.rn.bf16x2 ${4 * half + j}, t, k;",
            ]
    return "{\n" + "\n".join(lines) + "\n}\n"


# bf16x2 multiplication came with PTX 7.8 and sm_90; before it, fma with -0, which keeps every sign.
PTX = tl.constexpr(_ptx())
PTX_SM80 = tl.constexpr(
    _ptx()
    .replace(".reg .b32 low", ".reg .b32 z, low")
    .replace("mov.b32 k, 0x77807780;", "mov.b32 k, 0x77807780;\nmov.b32 z, 0x80008000;")
    .replace("mul.rn.bf16x2", "fma.rn.bf16x2")
    .replace(", t, k;", ", t, k, z;")
)
REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 6))


def how_to_decode(device: torch.device) -> int:
    """HOW of a kernel: 0 in plain operations, which the interpreter runs; 80 or 90, the PTX of
    that instruction set."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return 0
    return 90 if torch.cuda.get_device_capability(device) >= (9, 0) else 80


_B = tl.bfloat16
BF16_X8 = tl.constexpr((_B, _B, _B, _B, _B, _B, _B, _B))


@triton.jit
def _slot(word, codes, byte: tl.constexpr, slot: tl.constexpr):
    sm = word >> (8 * byte)
    code = (codes >> (4 * slot)) & 0xF
    bits = ((sm & 0x80) << 8) | tl.where(code > 0, (sm & 0x7F) | ((code + 112) << 7), 0)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode_words(first, second, codes, HOW: tl.constexpr):
    """The bf16 weights of slots 0 to 7, times 2 ** (112 - base), out of the int32 words of slots
    0..3, of slots 4..7 and of the codes: eight tensors of the shape of each."""
    if HOW == 90:
        return tl.inline_asm_elementwise(
            PTX,
            REGISTERS,
            [first, second, codes],
            dtype=BF16_X8,
            is_pure=True,
            pack=2,
        )
    elif HOW == 80:
        return tl.inline_asm_elementwise(
            PTX_SM80,
            REGISTERS,
            [first, second, codes],
            dtype=BF16_X8,
            is_pure=True,
            pack=2,
        )
    else:
        return (
            _slot(first, codes, 0, 0),
            _slot(first, codes, 1, 1),
            _slot(first, codes, 2, 2),
            _slot(first, codes, 3, 3),
            _slot(second, codes, 0, 4),
            _slot(second, codes, 1, 5),
            _slot(second, codes, 2, 6),
            _slot(second, codes, 3, 7),
        )


@triton.jit
def row_bases(base_ptr, rows, first_base, NIBBLES: tl.constexpr):
    """The bases of outputs `rows`, int32, from bytes or nibbles."""
    if NIBBLES:
        pairs = tl.load(base_ptr + rows // 2).to(tl.int32)
        return ((pairs >> ((rows % 2) * 4)) & 0xF) + first_base
    else:
        return tl.load(base_ptr + rows).to(tl.int32)
