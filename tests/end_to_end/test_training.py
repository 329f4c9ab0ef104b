"""Training as users start it: loss falls, ranks agree, stopped runs resume to the same bits."""

import json
import os
import re
import signal

import pytest
import torch

from .conftest import Launcher, assert_same_bits, last_checkpoint, write_records

COMMON = ("--model=lenet", "--num_classes=10", "--crop_area=0.9,1", "--eval_crop=1", "--learning_rate=0.05")


def events(log_dir, kind):
    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


@pytest.mark.parametrize("transport", ["horovod", "torch"])
@pytest.mark.parametrize("precision", [(), ("--bf16", "--momentum_dtype=bf16"), ("--fp16", "--loss_scale=dynamic")])
def test_loss_falls_and_ranks_agree(launch, records, tmp_path, transport, precision):
    text = launch.run(
        "tests/end_to_end/digest.py",
        *("--model=tiny", "--num_classes=10", "--crop_area=0.9,1", "--learning_rate=0.2"),
        *precision,
        f"--data_dir={records}",
        f"--log_dir={tmp_path}/run",
        f"--transport={transport}",
        "--batch_size=16",
        "--num_batches=40",
        "--display_every=10",
        ranks=2,
    )
    losses = [e["loss"] for e in events(tmp_path / "run", "train")]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 2, text
    digests = dict(re.findall(r"rank (\d) holds ([0-9a-f]{64})", text))
    assert len(digests) == 2
    assert digests["0"] == digests["1"]
    staged = "horovod has no bfloat16: gradients travel in fp32" in text
    assert staged == (transport == "horovod" and "--bf16" in precision)


def test_two_ranks_equal_one(launch, tmp_path):
    """2 ranks x batch 8 and 1 rank x batch 16 on the same fixed tensors: equal up to fp32 rounding."""
    for ranks in (1, 2):
        launch.run("tests/end_to_end/fixed_tensors.py", tmp_path / f"{ranks}.pt", ranks=ranks)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        start, a, b = one[name]["start"], one[name]["end"], two[name]["end"]
        moved = (a - start).norm()
        assert moved > 0
        assert (a - b).norm() < 1e-4 * moved, name


UNTIL_60 = (*COMMON, "--batch_size=16", "--num_batches=60", "--display_every=1")


@pytest.fixture(scope="module")
def undisturbed(records, tmp_path_factory):
    """The log directory of 60 steps on two ranks, three epochs, that nobody stopped."""
    log_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    launcher = Launcher(log_dir.parent)
    launcher.train(*UNTIL_60, f"--data_dir={records}", f"--log_dir={log_dir}", ranks=2)
    return log_dir


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_stopped_run_resumes_to_the_same_bits(launch, records, undisturbed, tmp_path, how):
    arguments = (*UNTIL_60, f"--data_dir={records}", f"--log_dir={tmp_path}/run")
    interval = ["--save_interval=0"] if how == signal.SIGKILL else []
    program = launch.start("launch/train.py", *arguments, *interval, ranks=2)
    program.until(r"^ +25 ")  # in the second epoch: 20 steps are one
    if how == signal.SIGTERM:  # as srun and torchrun do: to the ranks; here to one of them, and both must stop
        os.kill(program.ranks()[1], how)
        assert program.wait() == 3, program.text()
    elif how == signal.SIGUSR1:  # through mpiexec
        program.process.send_signal(how)
        assert program.wait() == 3, program.text()
    else:
        for pid in program.ranks():
            os.kill(pid, how)
        assert program.wait() not in (0, 3)
    stopped_at = int(last_checkpoint(tmp_path / "run")["optimizer"]["counters"][0])
    assert 20 < stopped_at < 60
    text = launch.train(*arguments, ranks=2)
    assert f"Restored checkpoint {tmp_path}/run/checkpoint-{stopped_at:08d}.pt" in text
    assert_same_bits(last_checkpoint(undisturbed), last_checkpoint(tmp_path / "run"))
    # The printed losses of the steps after the stop are the undisturbed run's.
    whole, stopped = ({e["step"]: e["loss"] for e in events(d, "train")} for d in (undisturbed, tmp_path / "run"))
    assert whole == stopped


def test_a_finished_run_says_so(launch, records, undisturbed):
    before = {p.name for p in undisturbed.iterdir()}
    text = launch.train(*UNTIL_60, f"--data_dir={records}", f"--log_dir={undisturbed}", ranks=2)
    assert "is trained: all 60 steps are done" in text
    assert before == {p.name for p in undisturbed.iterdir()}


def test_saving_does_not_change_training(launch, records, undisturbed, tmp_path):
    arguments = (*UNTIL_60, f"--data_dir={records}", f"--log_dir={tmp_path}/run", "--save_interval=0", "--keep=2")
    launch.train(*arguments, ranks=2)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    assert_same_bits(last_checkpoint(undisturbed), last_checkpoint(tmp_path / "run"))


def test_batchnorm_and_loss_scale_resume_to_the_same_bits(launch, records, tmp_path):
    arguments = (
        *("--model=resnet18", "--num_classes=10", "--learning_rate=0.02", "--larc_eta=0.01", "--loss_scale=dynamic"),
        *("--larc_exclude=1d", "--momentum_dtype=bf16", "--log_tensors"),
        *(f"--data_dir={records}", "--batch_size=2", "--num_batches=6"),
    )
    launch.train(*arguments, f"--log_dir={tmp_path}/whole")
    program = launch.start("launch/train.py", *arguments, f"--log_dir={tmp_path}/stopped")
    program.until(r"^ +2 ")
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 3, program.text()
    launch.train(*arguments, f"--log_dir={tmp_path}/stopped")
    assert_same_bits(last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "stopped"))
    momenta = last_checkpoint(tmp_path / "whole")["optimizer"]["momentum"].values()
    assert {m.dtype for m in momenta} == {torch.bfloat16}
    whole, stopped = ([{**e, "time": 0} for e in events(tmp_path / d, "tensors")] for d in ("whole", "stopped"))
    assert [e["step"] for e in whole] == [1, 2, 3, 4, 5, 6]
    assert whole == stopped


def test_evaluation_counts_each_image_once(launch, tmp_path):
    data = write_records(tmp_path / "data", train=320, validation=101)
    arguments = (*COMMON, f"--data_dir={data}", f"--log_dir={tmp_path}/run", "--batch_size=32")
    launch.train(*arguments, "--num_batches=30", "--display_every=30")
    results = []
    for ranks in (1, 2, 3):
        text = launch.run(
            "launch/eval.py",
            f"--data_dir={data}",
            f"--log_dir={tmp_path}/run",
            "--batch_size=7",
            "--json",
            ranks=ranks,
        )
        results.append(json.loads(text.splitlines()[-1]))
        top1, images = results[-1]["top1"], results[-1]["images"]
        assert re.search(rf"^Validation Top-1: {top1:.3f} % \+/- \d", text, re.MULTILINE)
        assert images == 101
    assert results[0] == results[1] == results[2]
    assert results[0]["top1"] > 80
    assert results[0] | {"top1": 0, "top5": 0} == {
        "top1": 0,
        "top5": 0,
        "images": 101,
        "step": 30,
        "checkpoint": f"{tmp_path}/run/checkpoint-00000030.pt",
    }
    text = launch.train(*arguments, "--num_batches=30", "--eval")
    assert f"Validation Top-1: {results[0]['top1']:.3f} %" in text
    assert len(events(tmp_path / "run", "eval")) == 4


def test_what_a_log_directory_holds(launch, records, tmp_path):
    launch.train(*COMMON, f"--data_dir={records}", f"--log_dir={tmp_path}/run", "--batch_size=16", "--num_batches=25")
    names = sorted(re.sub(r"tfevents.*", "tfevents", p.name) for p in (tmp_path / "run").iterdir())
    assert names == [
        "checkpoint-00000025.pt",
        "config.json",
        "curve.png",
        "events.out.tfevents",
        "metrics.jsonl",
    ]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["model"] == "lenet"
    assert {"nvcnn", "torch", "triton", "python"} <= config["versions"].keys()
    state = last_checkpoint(tmp_path / "run")
    assert state["preprocessing"] == {"image_size": 28, "normalize": "signed", "eval_crop": 1.0}
    assert state["kernels"] == "reference"
    assert state["num_classes"] == 10


KERNELS = {
    *("prepare_input.kernel", "cross_entropy.kernel", "gradient_statistics.kernel", "trust_ratio.kernel"),
    *("larc_update.kernel", "larc_update.refresh_kernel"),
    *("batch_norm_statistics.sums_kernel", "batch_norm_statistics.norm_kernel", "batch_norm.kernel"),
    *("batch_norm.sums_kernel", "batch_norm.norm_kernel", "batch_norm.gradient_kernel"),
    *("max_pool.kernel", "max_pool.backward_kernel", "global_average.kernel", "global_average.backward_kernel"),
}
CONVOLUTIONS = {f"convolution{what}kernel" for what in (".", "_data_gradient.", "_weight_gradient.")}
CONVOLUTIONS |= {"convolution_weight_gradient.sum_kernel"}
# What convolutions do in their epilogues, and in their prologues.
REPLACED = {
    "torch": set(),
    "triton": {"batch_norm_statistics.sums_kernel", "batch_norm.gradient_kernel"},
    "triton-materialized": {"batch_norm_statistics.sums_kernel"},
}


@pytest.mark.parametrize(
    ("precision", "conv", "steps"),
    [
        ((), "torch", 20),
        pytest.param((), "triton", 20, marks=pytest.mark.full),
        (("--fp16", "--loss_scale=dynamic"), "triton", 10),  # of five seconds each
        pytest.param(("--fp16", "--loss_scale=dynamic"), "triton-materialized", 10, marks=pytest.mark.full),
    ],
    ids=["fp32-torch", "fp32-triton", "fp16-triton", "fp16-triton-materialized"],
)
def test_the_triton_kernels_follow_the_reference(launch, records, tmp_path, precision, conv, steps):
    """Real steps through Triton's interpreter, compared with those of the references."""
    losses, texts = {}, {}
    for kernels in ("reference", "triton"):
        texts[kernels] = launch.run(
            "tests/end_to_end/tiny.py",
            *(
                "--model=tiny",
                "--num_classes=10",
                "--larc_eta=0.1",
                "--learning_rate=0.01",
                *precision,
                f"--conv={conv}",
            ),
            *(f"--data_dir={records}", f"--log_dir={tmp_path}/{kernels}", "--batch_size=4", f"--num_batches={steps}"),
            environment={"NVCNN_KERNELS": kernels} | ({"TRITON_INTERPRET": "1"} if kernels == "triton" else {}),
        )
        losses[kernels] = [e["loss"] for e in events(tmp_path / kernels, "train")]
    states = {kernels: last_checkpoint(tmp_path / kernels) for kernels in losses}
    assert [state["kernels"] for state in states.values()] == ["reference", "triton"]
    assert len(losses["triton"]) == steps
    assert len(set(losses["triton"])) == steps
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-4 if not precision else 5e-3)
    one, other = (state["weights"] for state in states.values())
    expected = KERNELS - REPLACED[conv] | (set() if conv == "torch" else CONVOLUTIONS)
    assert set(re.search(r"^launched: (.*)$", texts["triton"], re.MULTILINE)[1].split()) == expected
    assert f"Convolution: 3 {conv} (--conv={conv})" in texts["triton"]
    if conv == "triton":
        check_evaluation(launch, tmp_path)
    for bn in ("bn1", "bn2", "bn3"):  # a mean differs on the scale of its channel's deviation
        deviation = one[f"{bn}.running_var"].sqrt()
        bound = 1e-3 if not precision else 1e-2
        assert ((one[f"{bn}.running_mean"] - other[f"{bn}.running_mean"]).abs() < bound * deviation).all()
        assert ((deviation - other[f"{bn}.running_var"].sqrt()).abs() < bound * deviation).all()


def check_evaluation(launch, tmp_path):
    """By the kernels as by the references, with BatchNorm in the convolutions: nothing else touches activations."""
    data, results = write_records(tmp_path / "few", train=2, validation=10), []
    for kernels in ("reference", "triton"):
        text = launch.run(
            "tests/end_to_end/tiny.py",
            *("--model=tiny", f"--data_dir={data}", f"--log_dir={tmp_path}/triton", "--eval", "--conv=triton"),
            environment={"NVCNN_KERNELS": kernels} | ({"TRITON_INTERPRET": "1"} if kernels == "triton" else {}),
        )
        assert "Convolution: 3 triton (--conv=triton)" in text
        results.append(events(tmp_path / "triton", "eval")[-1])
    assert abs(results[0]["top1"] - results[1]["top1"]) <= 10  # in percent: an image whose logits nearly tie
    assert set(re.search(r"^launched: (.*)$", text, re.MULTILINE)[1].split()) == {
        *("prepare_input.kernel", "convolution.kernel", "max_pool.kernel", "global_average.kernel")
    }


def test_the_originals_command(launch, records, tmp_path):
    """Flag for flag, on two ranks, with only data, log directory, batch and epochs replaced."""
    data = write_records(tmp_path / "data", train=4, validation=2, classes=2)
    command = (
        "--model=resnet50 --fp16 --larc_mode=clip --larc_eta=0.003 --loss_scale=128 --save_interval=3600 "
        f"--display_every=100 --learning_rate=2.0 --data_dir={data} --log_dir={tmp_path}/run "
        "--batch_size=1 --num_epochs=1"
    ).split()
    text = launch.train(*command, "--dry_run", ranks=2)
    assert text.count("Steps:       2") == 1
    assert "Parameters:  25,557,032" in text
    assert not (tmp_path / "run").exists()
    launch.train(*command, ranks=2)
    state = last_checkpoint(tmp_path / "run")
    assert state["optimizer"]["counters"].tolist() == [2, 2, 2]
    assert all(w.isfinite().all() for w in state["weights"].values())


def test_one_process_needs_torch_and_triton_alone(launch, tmp_path):
    arguments = ("--model=lenet", "--batch_size=8", "--num_batches=25", f"--log_dir={tmp_path}/run")
    text = launch.run("tests/end_to_end/blocked.py", *arguments)
    assert "Images/sec:" in text
    assert "TensorBoard is not installed" in text
    assert "matplotlib is not installed" in text
    assert len(events(tmp_path / "run", "train")) == 25
