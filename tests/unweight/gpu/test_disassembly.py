"""Listings short enough to count by hand."""

from __future__ import annotations

import pytest

from unweight.gpu.disassembly import (
    NotUnderstood,
    counted,
    instructions,
    main_loop,
    resources,
    spills,
    tensor_core,
    weights_of_hgmma,
)


def listing(*lines: str) -> str:
    """As `cuobjdump -sass` prints them, with the encoding beside and below each."""
    text = ["\tcode for sm_90a", "\t\tFunction : kernel", '\t.headerflags\t@"EF_CUDA_SM90"']
    for n, line in enumerate(lines):
        text += [
            f"        /*{16 * n:04x}*/ {line + ' ;':<60} /* 0x00000a00ff017b82 */",
            f"{'':<70}/* 0x000fe20000000800 */",
        ]
    return "\n".join(text)


LOOP = listing(
    "                  LDC R1, c[0x0][0x28]",  # 0
    "                  MOV R2, RZ",  # 10
    "                  LDGSTS.E.BYPASS.LTC128B.128 [R5+0x400], desc[UR8][R2.64]",  # 20
    "              @P0 LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R5], desc[UR8][R4.64], P1",  # 30
    "                  LDS.128 R8, [R5]",  # 40
    "                  PRMT R12, R8, 0x4400, R9",  # 50
    "                  SHF.L.U32 R13, R10, 0x7, RZ",  # 60
    "                  IMAD.SHL.U32 R13, R10, 0x8, RZ",  # 70
    "                  LOP3.LUT R12, R12, 0x807f807f, R13, 0xea, !PT",  # 80
    "                  HMUL2.BF16_V2 R12, R12, 0.0, R14",  # 90
    "                  WARPGROUP.ARRIVE",  # a0
    "                  HGMMA.64x16x16.F32.BF16 R24, R12, gdesc[UR20], R24",  # b0
    "                  HGMMA.64x16x16.F32.BF16 R24, R16, gdesc[UR20], R24, gsb0",  # c0
    "                  UIADD3 UR4, UR4, 0x1, URZ",  # d0
    "              @P2 BRA 0x20",  # e0
    "                  HGMMA.64x16x16.F32.BF16 R24, R16, gdesc[UR20].tnspB, R24",  # f0
    "             @!P3 BRA 0xf0",  # 100
    "              @P3 BRA 0x130",  # 110: forward
    "                  STG.E desc[UR8][R2.64], R24",  # 120
    "                  EXIT",  # 130
    "                  BRA 0x140",  # 140: what follows an end
)


def test_the_loop_with_most_products_is_counted() -> None:
    body = main_loop(instructions(LOOP))
    assert [hex(body[0].address), hex(body[-1].address)] == ["0x20", "0xe0"]
    loop = counted(body)
    assert loop.total == 13
    assert loop.alu == 3  # PRMT, SHF, LOP3
    assert loop.imad == 1
    assert loop.tensor == 2
    assert loop.load_bits == (128, 128)
    # Two products of 64 outputs by 16 inputs, by 128 threads: 16 weights each.
    assert weights_of_hgmma(body, 16) == 16
    # For 32 rows two products go to the same weights.
    assert weights_of_hgmma(body, 32) == 8


def test_the_inner_of_two_loops() -> None:
    code = instructions(
        listing("NOP", "HMMA.16816.F32.BF16 R4, R8, R10, R4", "@P0 BRA 0x10", "@P1 BRA 0x0")
    )
    assert [one.address for one in main_loop(code)] == [0x10, 0x20]
    assert counted(code).total == 3  # NOP is nothing


def test_kinds_of_tensor_cores() -> None:
    text = listing(
        "HMMA.16816.F32.BF16 R4, R8, R10, R4", "UTCHMMA gdesc[UR4], gdesc[UR6]", "HADD2 R1"
    )
    assert tensor_core(instructions(text)) == ["HMMA.16816.F32.BF16", "UTCHMMA"]


@pytest.mark.parametrize(
    ("load", "bits"),
    [
        ("LDG.E R4, desc[UR4][R2.64]", 32),
        ("LDG.E.64.CONSTANT R4, desc[UR4][R2.64]", 64),
        ("LDG.E.128 R4, desc[UR4][R2.64]", 128),
        ("LDG.E.U8 R4, desc[UR4][R2.64]", 8),
        ("LDGSTS.E.LTC128B.64 [R4], desc[UR4][R2.64]", 64),
    ],
)
def test_widths_of_loads(load: str, bits: int) -> None:
    assert counted(instructions(listing(load))).load_bits == (bits,)


def test_spills_are_accesses_to_local_memory() -> None:
    code = instructions(
        listing("STL.64 [R1], R4", "LDL.LU.64 R4, [R1]", "LDS R4, [R1]", "LDG.E R4")
    )
    assert spills(code) == 2


def test_resources_are_read() -> None:
    found = resources(
        " Function k:\n  REG:74 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:640 TEXTURE:0\n"
    )
    assert (found.registers, found.stack_bytes, found.local_bytes) == (74, 16, 8)


@pytest.mark.parametrize("text", ["", "no such file", "/*zz*/ NOP ;"])
def test_what_is_no_listing(text: str) -> None:
    with pytest.raises(NotUnderstood):
        instructions(text)
    with pytest.raises(NotUnderstood):
        resources(text)


def test_kernels_without_such_a_loop() -> None:
    with pytest.raises(NotUnderstood, match="no loop"):
        main_loop(instructions(listing("HMMA.16816.F32 R4", "EXIT", "BRA 0x20")))
    for body in (
        ("LOP3.LUT R1, R2",),
        ("HGMMA.64x16x8.F32 R1",),
        ("HGMMA.64x16x16.F32 R1", "HGMMA.64x32x16.F32 R1"),
    ):
        with pytest.raises(NotUnderstood, match="other instructions"):
            weights_of_hgmma(instructions(listing(*body)), 16)
