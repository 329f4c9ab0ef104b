"""Bad input ends in exit code 2 and one clear line, with nothing written. A rank that fails ends the whole job."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.samples import record, write_shard

from .conftest import ROOT, assert_same_bits, last_checkpoint, picture, write_records

LENET = ("--model=lenet", "--num_classes=10")


def refused(launch, *arguments, names, script="launch/train.py", ranks=1, **options) -> str:
    """Runs to exit code 2 and one line on standard error that holds each of `names`; returns it."""
    text = launch.run(script, *arguments, ranks=ranks, code=2, **options)
    program = Path(script).name
    # mpiexec mixes what ranks print and what it prints itself, by pieces of lines.
    lines = [line for line in text.splitlines() if re.match(rf"\s*{program}: ", line)]
    assert len(lines) == 1, text
    if ranks == 1:  # mpiexec adds words of its own
        assert [line for line in text.splitlines() if "building it" not in line] == lines, text
    assert "Traceback" not in text
    for name in names:
        assert name in lines[0]
    return lines[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Returns a small data set that a test may break."""
    return write_records(tmp_path / "data", train=32, validation=8)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model=lenet", "--frobnicate=1"], ["--frobnicate"]),
        (["--model=resnet51"], ["--model=resnet51", "resnet50"]),
        (["--model=lenet", "--resnet_v1"], ["--resnet_v1", "resnet50"]),
        (["--model=lenet", "--batch_size=0"], ["--batch_size=0"]),
        (["--model=lenet", "--learning_rate=nan"], ["--learning_rate=nan"]),
        (["--model=lenet", "--data_dir=absent"], ["--data_dir=absent"]),
        (["--model=lenet", "--freeze=backbone"], ["--freeze=backbone needs --init"]),
        (["--model=lenet", "--init=absent.pth"], ["--init=absent.pth", "no such file"]),
    ],
)
def test_bad_flags(launch, tmp_path, arguments, names):
    refused(launch, *arguments, f"--log_dir={tmp_path}/run", names=names)
    assert not (tmp_path / "run").exists()


def no_train(data):
    for shard in data.glob("train-*"):
        shard.unlink()


def empty(data):
    shutil.rmtree(data)
    data.mkdir()


def label_outside(data):
    write_shard(
        data / "train-00000-of-00002",
        (record(picture(i, 0), 11) for i in range(16)),
    )


def truncated_shard(data):
    shard = data / "train-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:-20])


def not_a_record(data):
    (data / "train-00001-of-00002").write_bytes(b"hello, I am not a TFRecord file" * 10)
    (data / "train-00001-of-00002.idx").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (no_train, ["no train-*"]),
        (empty, ["is empty"]),
        (label_outside, ["label 11", "1 .. 10"]),
        (truncated_shard, ["train-00001-of-00002"]),
        (not_a_record, ["train-00001-of-00002"]),
    ],
)
def test_bad_data(launch, data, tmp_path, damage, names):
    damage(data)
    refused(launch, *LENET, f"--data_dir={data}", f"--log_dir={tmp_path}/run", "--batch_size=4", names=names)
    assert not (tmp_path / "run").exists()


def test_a_label_outside_deep_in_the_data(launch, tmp_path):
    """Only reading finds it: the run ends with the same line, on both ranks, and keeps what it had saved."""
    labels = [i % 10 + 1 for i in range(32)]
    labels[20] = 4711
    data = tmp_path / "data"
    data.mkdir()
    examples = (record(picture(i, 0), n) for i, n in enumerate(labels))
    write_shard(data / "train-00000-of-00001", examples)
    refused(launch, *LENET, f"--data_dir={data}", "--batch_size=4", "--num_epochs=9", names=["label 4711"], ranks=2)


def test_a_data_set_smaller_than_one_total_batch(launch, data, tmp_path):
    arguments = (*LENET, f"--data_dir={data}", f"--log_dir={tmp_path}/run", "--batch_size=17")
    refused(launch, *arguments, names=["32", "34", "--batch_size=17"], ranks=2)
    refused(launch, *arguments, "--batch_size=33", "--dry_run", names=["--batch_size=33"])
    assert not (tmp_path / "run").exists()


def test_a_missing_index_is_built_and_said(launch, data):
    for index in data.glob("*.idx"):
        index.unlink()
    arguments = (*LENET, f"--data_dir={data}", "--batch_size=4", "--num_batches=2")
    text = launch.train(*arguments)
    assert "index" in text
    assert (data / "train-00000-of-00002.idx").exists()
    assert "index" not in launch.train(*arguments)


def test_no_validation_records(launch, data, tmp_path):
    launch.train(*LENET, f"--data_dir={data}", f"--log_dir={tmp_path}/run", "--batch_size=4", "--num_batches=1")
    for shard in data.glob("validation-*"):
        shard.unlink()
    evaluate = ("launch/eval.py", f"--data_dir={data}")
    refused(launch, evaluate[1], f"--log_dir={tmp_path}/run", names=["validation-*"], script=evaluate[0])
    refused(launch, evaluate[1], f"--log_dir={tmp_path}/absent", names=["no such directory"], script=evaluate[0])
    refused(launch, evaluate[1], f"--log_dir={data}", names=["no checkpoint"], script=evaluate[0])
    model = ["--model=resnet50", f"--log_dir={tmp_path}/run"]
    refused(launch, evaluate[1], *model, names=["--model=resnet50", "lenet"], script=evaluate[0])


def test_a_log_directory_of_another_run(launch, data, tmp_path):
    arguments = (f"--data_dir={data}", f"--log_dir={tmp_path}/run", "--batch_size=4", "--num_batches=2")
    launch.train(*LENET, *arguments)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    refused(launch, "--model=trivial", "--num_classes=10", *arguments, names=["there lenet, here trivial"])
    refused(launch, *LENET, *arguments, "--seed=2", names=["--seed: there 1, here 2"])
    refused(launch, *LENET, *arguments, names=["here it is 8 (on 2): give --batch_size=2"], ranks=2)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    blocker = tmp_path / "file"
    blocker.write_text("")
    refused(launch, *LENET, f"--log_dir={blocker}", "--num_batches=1", names=[f"--log_dir={blocker}"])


def test_a_bad_checkpoint_falls_back_to_the_one_before(launch, records, tmp_path):
    arguments = (*LENET, f"--data_dir={records}", "--batch_size=8", "--num_batches=12")
    launch.train(*arguments, f"--log_dir={tmp_path}/run", "--save_interval=0", "--keep=100")
    whole = last_checkpoint(tmp_path / "run")
    newest, second = sorted((tmp_path / "run").glob("checkpoint-[0-9]*.pt"), reverse=True)[:2]
    newest.write_bytes(newest.read_bytes()[:1000])
    torch.save({"state_dict": {}}, second)
    text = launch.train(*arguments, f"--log_dir={tmp_path}/run", "--keep=100")
    assert f"{newest}: is a zip archive that is cut short, not a checkpoint" in text
    assert f"{second}: not a checkpoint of nvcnn" in text
    assert "Restored checkpoint" in text
    assert f"{newest} is set aside as {newest.name}.damaged" in text
    assert [path.name for path in newest.parent.glob("*.damaged")] == [f"{newest.name}.damaged"]
    assert_same_bits(whole, last_checkpoint(tmp_path / "run"))
    for path in (tmp_path / "run").glob("checkpoint-[0-9]*.pt"):
        path.write_text("x")
    launch.run("launch/train.py", *arguments, f"--log_dir={tmp_path}/run", code=2)


def test_two_ranks_without_a_transport(launch):
    """Neither Horovod nor mpi4py can be imported; or the launcher is another MPI's, so that each would be alone."""
    blocked = ("tests/end_to_end/blocked.py", *LENET, "--num_batches=1")
    assert "2 ranks started by Open MPI need mpi4py to meet" in launch.run(*blocked, ranks=2, code=2)
    foreign = {"PMI_SIZE": "2", "PMI_RANK": "0"}
    for transport in ("auto", "horovod" if find_spec("horovod") else "torch"):
        arguments = (*LENET, "--num_batches=1", f"--transport={transport}")
        line = refused(launch, *arguments, names=["PMI_SIZE=2", "Open MPI", "sees 1"], environment=foreign)
        assert "mpiexec of that library" in line


@pytest.mark.full
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("--transport=torch", "the ranks have different --transport (auto, torch)"),
        ("--num_batches=8", "rank 2 differs: --num_batches is 8, on rank 0 1"),
    ],
)
def test_ranks_with_other_flags(launch, tmp_path, other, said):
    """mpiexec starts the third with another command."""
    arguments = (*LENET, "--num_batches=1", f"--log_dir={tmp_path}/run")
    third = (":", "-np", 1, sys.executable, ROOT / "launch/train.py", *arguments, other)
    refused(launch, *arguments, *third, names=[said], ranks=2)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_raises_ends_the_job(launch, records):
    arguments = (*LENET, f"--data_dir={records}", "--batch_size=8", "--num_batches=100000")
    arguments += ("--transport=torch",)  # where rank 0's own sum fails then
    program = launch.start("tests/end_to_end/disturbed.py", "raise", 10, *arguments, ranks=2)
    assert program.wait() == 1
    assert "rank 1: Traceback" in program.text()
    assert program.text().count("Traceback") == 1
    assert "RuntimeError: step 10" in program.text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_the_end_of(ranks: list[int]) -> None:
    assert len(ranks) == 2
    end = time.monotonic() + 60
    while (left := [pid for pid in ranks if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_a_rank_that_stands_still_ends_the_job(launch):
    arguments = (*LENET, "--batch_size=8", "--num_batches=100000", "--rank_timeout=8")
    program = launch.start("tests/end_to_end/disturbed.py", "SIGSTOP", 5, *arguments, ranks=2)
    program.until("^ +1 ")
    ranks = program.ranks()
    assert program.wait() == 1
    (line,) = re.findall("disturbed.py: (.*)", program.text())
    assert re.match(r"rank 1 on \S+ \(process \d+; .*, after step \d+\) did not answer for 8 s ", line)
    wait_for_the_end_of(ranks)


def test_no_rank_outlives_its_launcher(launch, records):
    """Nor do the workers of a rank."""
    arguments = (*LENET, f"--data_dir={records}", "--data_backend=torch", "--batch_size=8", "--num_epochs=100000")
    program = launch.start("launch/train.py", *arguments, "--transport=torch", "--eval_every=0", ranks=2)
    program.until("^ +5 ")
    ranks = program.ranks()
    workers = [pid for rank in ranks for pid in subprocess.check_output(["pgrep", "-P", str(rank)], text=True).split()]
    program.process.kill()
    wait_for_the_end_of(ranks)
    wait_for_the_end_of([int(workers[0]), int(workers[-1])])


def test_low_precision_on_a_cpu_says_so_once(launch):
    for flag in ("--fp16", "--bf16"):
        text = launch.train(*LENET, flag, "--batch_size=4", "--num_batches=2")
        assert (
            len(re.findall(r"float16 on this CPU: a convolution takes \d+\.\d times as long as in float32", text)) == 1
        )


def test_an_unwritable_log_directory(launch, tmp_path):
    (tmp_path / "file").write_text("")
    refused(launch, *LENET, f"--log_dir={tmp_path}/file/run", "--num_batches=1", names=["cannot be written to"])


def test_a_wrong_kernel_choice(launch):
    for kernels, name in (("triton", "TRITON_INTERPRET=1"), ("cuda", "auto, reference or triton")):
        refused(launch, *LENET, "--num_batches=1", names=[name], environment={"NVCNN_KERNELS": kernels})


def test_other_kernels_than_the_checkpoints(launch, tmp_path):
    arguments = ("--model=lenet", "--batch_size=4", "--num_batches=2", f"--log_dir={tmp_path}/run")
    launch.train(*arguments)
    environment = {"NVCNN_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    names = ["checkpoint-00000002.pt", "NVCNN_KERNELS: there reference, here triton"]
    refused(launch, *arguments, names=names, environment=environment)


def test_interrupted_in_the_terminal_without_log_dir(launch):
    program = launch.start("launch/train.py", *LENET, "--batch_size=4", "--num_batches=100000")
    program.until("^ +5 ")
    os.kill(program.process.pid, signal.SIGINT)
    assert program.wait() == 1
    assert "nothing saved" in program.text()
    assert "Traceback" not in program.text()
