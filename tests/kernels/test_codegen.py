"""What the compiler makes of the kernels for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.codegen import CHIPS, access_widths, occupancy, variants


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All variants on all chips, compiled in a process of their own: the interpreter replaces the compiler in this."""
    file = tmp_path_factory.mktemp("codegen") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", f"--json={file}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(file.read_text())["rows"]


def test_nothing_spills_and_streams_move_16_bytes_at_a_time(rows):
    assert len(rows) == len(list(variants())) * len(CHIPS)
    for row in rows:
        assert (row["spills"], row["breach"]) == (0, ""), row
        if not row["name"].startswith("trust_ratio"):
            assert row["load"] >= 16, row


def test_refresh_sums_in_the_order_of_the_update(rows):
    layouts = {(row["name"], row["chip"]): row["layout"] for row in rows}
    for gradient, model in (("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
        for chip in CHIPS:
            update = layouts[f"larc_update: {gradient} gradient, {model} model", f"sm_{chip}"]
            assert update
            assert update == layouts[f"larc_update: refresh, {model} model", f"sm_{chip}"]


def test_access_widths():
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd2 ];
        ld.global.b16 { %rs1 }, [ %rd3 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
        st.global.v8.b32 [ %rd4 ], { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 };
    """
    assert access_widths(ptx, "ld") == [16, 16, 2]
    assert access_widths(ptx, "st") == [32]


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "expected"),
    [
        (90, 32, 0, 4, 1.0),
        (90, 64, 0, 4, 0.5),
        (90, 255, 0, 8, 0.125),
        (90, 32, 113 << 10, 4, 0.125),
        (80, 32, 113 << 10, 4, 0.0625),
    ],
)
def test_occupancy(chip, registers, shared, warps, expected):
    assert occupancy(chip, registers, shared, warps) == expected
