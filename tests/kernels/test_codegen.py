"""What the compiler makes of the kernels for GPUs that are not here."""

import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module

import pytest

import kernels
from benchmarks.codegen import CHIPS, MATRIX, PROLOGUES, UNALIGNED, accesses_of, chip_of, main, programs_an_sm, streams


def test_the_short_list_for_all_chips(tmp_path):
    """It is one test, as compiling takes half a minute of all cores: of several workers one does."""
    file = tmp_path / "rows.json"
    compiling("benchmarks.codegen", "--list=short", f"--json={file}")
    rows = json.loads(file.read_text())["rows"]
    for check in (
        nothing_spills_and_streams_move_16_bytes_at_a_time,
        convolutions_multiply_with_the_chips_own_instruction,
        instructions_of_a_step_and_outside_of_it_are_counted,
        poolings_normalise,
        mixed_batches_are_compiled,
        tiles_of_convolutions_are_loaded_by_tma,
        every_kernel_is_compiled_for_every_chip_in_every_dtype_of_its_streams,
        both_gradients_in_one_kernel_fit_an_sm_of_hopper,
        a_profile_tells_kernels_apart,
    ):
        check(rows)


def compiling(*command: str) -> str:
    """Returns the output of the module in a process of its own, as the interpreter replaces the compiler in this."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def nothing_spills_and_streams_move_16_bytes_at_a_time(rows):
    for row in rows:
        assert (row["spills"], row["breach"]) == (0, ""), row
        streams_values = "norm_kernel" not in row["name"] and not UNALIGNED.search(row["name"])
        if streams_values and "images:u8" not in row["name"]:
            assert max(row["load"], row["store"]) >= 16, row


def test_wgmma_that_wait_for_each_other_are_found_and_those_that_do_not_wait():
    may_not_run, runs, mended = (line.split() for line in compiling("tests.kernels.serialised").splitlines()[:3])
    assert may_not_run[1].startswith("C75")
    assert runs == ["True"]
    assert mended == [str(PROLOGUES)]


def convolutions_multiply_with_the_chips_own_instruction(rows):
    convolutions = [row for row in rows if re.match(r"convolution\w*\.kernel ", row["name"])]
    wide = [row for row in convolutions if not re.search(r"warps=[12]\b", row["name"])]  # wgmma takes 4
    assert {(row["chip"], row["matrix"]) for row in wide} == {
        (f"sm_{chip}", instruction) for chip, instruction in MATRIX.items()
    }
    for op, tensors in {
        "convolution": ("residual", "joined"),
        "convolution_data_gradient": ("y", "skip", "z", "x", "branch"),
        "convolution_weight_gradient": ("y",),
    }.items():
        names = [row["name"] for row in convolutions if row["name"].startswith(f"{op}.")]
        for window in ("R=1 S=1", "R=3 S=3"):
            assert any(window in name for name in names), (op, window)
        assert any(all(f" {tensor}:fp16" in name for tensor in tensors) for name in names), op


def instructions_of_a_step_and_outside_of_it_are_counted(rows):
    assert all(row["serialised"] == "-" for row in rows)
    rows = [row for row in rows if row["outside"] != "-"]
    assert {row["name"].split()[0] for row in rows} >= {f"convolution{of}.kernel" for of in ("", "_data_gradient")}
    assert all(row["outside"] > 50 for row in rows)
    taps = [row for row in rows if re.match(r"convolution\w*\.kernel .*R=3 S=3", row["name"])]
    steps = [row["step"] for row in taps if row["step"] != "-"]  # some have their nine steps unrolled
    assert len(steps) > len(taps) / 2
    assert all(50 < step < 1500 for step in steps)


def poolings_normalise(rows):
    raw = {(row["function"], row["chip"], *re.findall(r" x:(\w+)", row["name"])) for row in rows}
    functions = ("max_pool_norm", "max_pool_backward_norm")
    expected = {(name, f"sm_{chip}", dtype) for name in functions for chip in CHIPS for dtype in ("fp16", "bf16")}
    assert {row for row in raw if row[0] in functions} == expected


def mixed_batches_are_compiled(rows):
    for op, tensor in (("prepare_input", "mix"), ("cross_entropy", "share")):
        names = [row["name"] for row in rows if row["name"].startswith(f"{op}.kernel ")]
        assert {f"{tensor}=None" in name for name in names} == {True, False}, op


def tiles_of_convolutions_are_loaded_by_tma(rows):
    names = [(row["name"], row["chip"]) for row in rows if row["tma"] == "yes" and " R=" in row["name"]]
    found = {(name.split()[0], re.findall(r"R=(\d)", name)[0], chip) for name, chip in names}
    ops = ("convolution", "convolution_data_gradient", "convolution_weight_gradient")
    assert found == {(f"{op}.kernel", taps, chip) for op in ops for taps in "13" for chip in ("sm_90", "sm_100")}
    walking = {"norm=None" in name for name, _ in names if "PERSISTENT=264" in name}  # over their tiles
    assert walking == ({True, False} if PROLOGUES else {True})


def every_kernel_is_compiled_for_every_chip_in_every_dtype_of_its_streams(rows):
    modules = [import_module(f"kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    kernel_names = {
        f"{module.__name__.split('.')[-1]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("kernel") and getattr(getattr(value, "fn", None), "__module__", "") == module.__name__
    }
    assert len(kernel_names) >= 16
    compiled = {(row["name"].split()[0], row["chip"]) for row in rows}
    chips = {"convolution_gradients.kernel": [90]}
    assert compiled == {(name, f"sm_{chip}") for name in kernel_names for chip in chips.get(name, CHIPS)}
    for dtype in ("fp16", "bf16"):
        assert {row["name"].split()[0] for row in rows if f":{dtype}" in row["name"]} >= {
            *("batch_norm.kernel", "batch_norm.sums_kernel", "batch_norm.gradient_kernel"),
            *("batch_norm_statistics.sums_kernel", "global_average.kernel", "max_pool.kernel", "prepare_input.kernel"),
            *("convolution.kernel", "convolution_data_gradient.kernel", "convolution_weight_gradient.kernel"),
            *("gradient_statistics.kernel", "larc_update.kernel", "larc_update.refresh_kernel"),
        }


def both_gradients_in_one_kernel_fit_an_sm_of_hopper(rows):
    own = [row for row in rows if row["name"].startswith("convolution_gradients.")]
    assert {row["function"] for row in own} == {"convolution_gradients_256_64", "convolution_gradients_64_256_skip"}
    for row in own:
        assert (row["tma"], row["matrix"], row["load"], row["store"], row["programs"]) == ("yes", "wgmma", 16, 16, 1)


def a_profile_tells_kernels_apart(rows):
    functions = {}
    for row in rows:
        python_name = row["name"].split()[0]
        functions.setdefault(row["function"], set()).add(python_name)
        assert row["function"].startswith(python_name.split(".")[0]) or row["function"] == "refresh"
    assert all(len(python_names) == 1 for python_names in functions.values())
    assert "convolution_3_3_1_128_64_32_norm_center" in functions


def test_a_tables_name_says_its_chip():
    assert chip_of("nvidia-h100-80gb-hbm3") == 90
    with pytest.raises(ValueError, match=r"kernels/configs/titan\.json"):
        chip_of("titan")


def test_no_row_by_that_name_is_bad_usage(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.codegen.INTERPRETED", False)
    monkeypatch.setattr("benchmarks.codegen.all_launches", lambda which: {})
    monkeypatch.setattr("sys.argv", ["codegen", "no_such_kernel"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no_such_kernel" in capsys.readouterr().err


def test_accesses_of():
    ptx = """
        .loc 1 20 30 // op.py:20:30
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd2 ];
        .loc 1 21 9 // op.py:21:9 @[ caller.py:5:7 @[ op.py:30:1 ] ]
        ld.global.b16 { %rs1 }, [ %rd3 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
        st.global.v8.b32 [ %rd4 ], { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 };
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        // begin inline asm
        .loc 1 22 5 // op.py:22:5
        mov.u32 %r1, 0x0;
        .loc 1 23 5 // op.py:23:5
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        // end inline asm
        .loc 1 24 9 // op.py:24:9
        ld.global.b16 { %rs1 }, [ %rd3 ];
        .loc 1 25 9, function_name $L__info_string0, inlined_at 1 40 1 // op.py:25:9
        .loc 2 7 3, function_name $L__info_string1, inlined_at 1 25 9 // blocks.py:7:3
        ld.global.b16 { %rs1 }, [ %rd3 ];
        .file 1 "/any/where/op.py"
    """
    first, second = "op.py:20:30", "op.py:21:9 in caller.py:5:7 in op.py:30:1"
    assert accesses_of(ptx) == [
        *(("ld", 16, first), ("ld", 16, first)),
        *(("ld", 2, second), ("st", 32, second), ("cp.async", 16, second)),
        *(("ld", 16, "op.py:22:5"), ("ld", 2, "op.py:24:9")),
        ("ld", 2, "blocks.py:7:3 in op.py:25:9 in op.py:40:1"),
    ]


def test_streams_are_tensors_of_16_bytes_a_thread():
    ttgir = """
#loc1 = loc("/any/where/op.py":20:30)
#loc2 = loc("/any/where/op.py":21:9)
#loc3 = loc("x"(#loc1))
#loc4 = loc(callsite(#loc3 at #loc2))
    %1 = tt.load %a, %m : tensor<32x64x!tt.ptr<f16>, #blocked> loc(#loc3)
    %2 = tt.load %b, %n : tensor<64x!tt.ptr<f32>, #ttg.slice<{dim = 0, parent = #blocked}>> loc(#loc2)
    tt.store %c, %d : tensor<32x64x!tt.ptr<i8>, #blocked> loc(#loc2)
    tt.store %e, %f : tensor<64x64x!tt.ptr<f16>, #blocked> loc(#loc4)
"""
    inlined = "op.py:20:30 in op.py:21:9"
    assert streams(ttgir, 128) == {"op.py:20:30", inlined}
    assert streams(ttgir, 16) == {"op.py:20:30", "op.py:21:9", inlined}


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "expected"),
    [
        (90, 32, 0, 4, 16),
        (90, 64, 0, 4, 8),
        (90, 255, 0, 8, 1),
        (90, 32, 113 << 10, 4, 2),
        (80, 32, 113 << 10, 4, 1),
        (90, 32, 228 << 10, 4, 0),
    ],
)
def test_programs_an_sm(chip, registers, shared, warps, expected):
    assert programs_an_sm(chip, registers, shared, warps) == expected
