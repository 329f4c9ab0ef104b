"""Instructions are counted in SASS, and their turns in Triton's IR."""

import pytest

from benchmarks.instructions import Code, Work, code_of, executed, work_of


def sass(*lines: str) -> str:
    """Returns the lines as cuobjdump prints them, each with its address and encoding."""
    return "\n".join(
        f"        /*{16 * at:04x}*/    {line} ;   /* 0x000e22 */\n    /* 0x00 */" for at, line in enumerate(lines)
    )


PRODUCTS = "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0"
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R0"


def test_a_loop_its_tail_and_what_only_waits():
    text = sass(
        "LDC R1, c[0x0][0x28]",
        "IMAD R2, R2, R3, R4",  # 0x10: the loop
        "@!P0 BRA 0xc0",
        PRODUCTS,
        PRODUCTS,
        "@P1 BRA 0x80",
        "STG.E.128 [R2.64], R4",  # once a tile
        "FADD R5, R5, R6",
        "IADD3 R2, R2, 0x1, RZ",  # 0x80
        "@P2 BRA 0x10",
        "EXIT",
        "NOP",
        WAIT,  # 0xc0: behind the last EXIT
        "@!P0 BRA 0xc0",
        "BRA 0x30",
    )
    flops = 2 * (2 * 64 * 128 * 16) * 2  # two products of each four of eight warps
    code = Code(inner=7, jumped=2, around=0, outside=2, inner_flops=flops, outside_flops=0, loops=1)
    assert code_of(text, warps=8) == code
    walks = Work(flops=12 * flops, steps=12, tiles=3)
    assert executed(code, walks) == 2 + 12 * 7 + 3 * 2
    assert executed(code, Work(flops=12 * flops, steps=12)) == 2 + 12 * (7 + 2)
    assert executed(code, Work(flops=24 * flops, steps=12)) == 2 + 24 * (7 + 2)  # half a step each


def test_loops_in_loops_and_loops_that_multiply_nothing():
    body = ["FADD R1, R1, R2"] * 4
    nested = sass("MOV R1, R2", *body, "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x10", "FMUL R1, R1, R1",
                  "@P1 BRA 0x0", *body, "@P2 BRA 0x90", WAIT, "@!P0 BRA 0xe0", "EXIT")  # fmt: skip
    multiplies = code_of(nested, warps=2)
    assert multiplies == Code(6, 0, 3, 8, inner_flops=2 * 16 * 8 * 16 * 2, outside_flops=0, loops=1)
    assert executed(multiplies, Work(flops=10 * 8192, steps=10, tiles=5)) == 8 + 5 * 3 + 10 * 6
    plain = code_of(nested.replace("HMMA.16816.F32", "FFMA"), warps=2)
    assert plain == Code(inner=11, jumped=0, around=3, outside=3, inner_flops=0, outside_flops=0, loops=2)


TTIR = """#loc = loc("kernel.py":1:0)
module {
  tt.func public @kernel(%x: !tt.ptr<f16> loc("x"(#loc)), %C: i32 loc("C"(#loc))) attributes {noinline = false} {
    %cst = arith.constant dense<0.000000e+00> : tensor<64x128xf32> loc(#loc1)
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %c32 = arith.constant 32 : i32 loc(#loc)
    %row = tt.get_program_id y : i32 loc(#loc1)
    %up = arith.addi %C, %c32 : i32 loc(#loc1)
    %steps = arith.divsi %up, %c32 : i32 loc(#loc1)
    %some = arith.cmpi eq, %row, %c0 : i32 loc(#loc1)
    %tiles = arith.select %some, %c32, %c1 : i32 loc(#loc1)
    %r = scf.for %tile = %c0 to %tiles step %c1 iter_args(%a = %cst) -> (tensor<64x128xf32>)  : i32 {
      %s = scf.for %k = %c0 to %steps step %c1 iter_args(%b = %a) -> (tensor<64x128xf32>)  : i32 {
        %l = tt.load %p, %m : tensor<64x32x!tt.ptr<f16>> loc(#loc3)
        %w = tt.descriptor_load %d[%c0, %k] : !tt.tensordesc<tensor<32x1x1x128xf16>> -> tensor<32x128xf16> loc(#loc3)
        %n = tt.dot %l, %w, %b : tensor<64x32xf16> * tensor<32x128xf16> -> tensor<64x128xf32> loc(#loc3)
        scf.yield %n : tensor<64x128xf32> loc(#loc3)
      } loc(#loc3)
      %sum = "tt.reduce"(%s) <{axis = 0 : i32}> ({
      ^bb0(%one: f32, %two: f32):
        %add = arith.addf %one, %two : f32 loc(#loc3)
        tt.reduce.return %add : f32 loc(#loc3)
      }) : (tensor<64x128xf32>) -> tensor<128xf32> loc(#loc3)
      tt.store %q, %sum, %m : tensor<128x!tt.ptr<f32>> loc(#loc3)
      scf.yield %s : tensor<64x128xf32> loc(#loc3)
    } loc(#loc3)
    tt.return loc(#loc3)
  } loc(#loc)
} loc(#loc)
"""


@pytest.mark.parametrize(("row", "tiles"), [(0, 32), (1, 1)])
def test_turns_follow_from_sizes_and_the_programs_number(row, tiles):
    steps = (100 + 32) // 32  # C is 100
    assert work_of(TTIR, {"C": 100}, (7, row), (8, 2)) == Work(
        bytes=tiles * (steps * (64 * 32 + 32 * 128) * 2 + 128 * 4),
        flops=tiles * steps * 2 * 64 * 32 * 128,
        steps=tiles * steps,
        tiles=tiles,
    )


def test_a_loop_whose_bounds_are_not_known_is_an_error():
    with pytest.raises(ValueError, match=r"do not follow from the sizes: scf\.for %k"):
        work_of(TTIR, {}, (0, 0), (1,))
