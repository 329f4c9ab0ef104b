"""Training runs as users start it: loss falls, ranks agree, stopped runs resume to the same bits."""

import json
import re
import shutil
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch

from nvcnn.models import Preprocessing
from tests.samples import picture, write_split

from .conftest import Launcher, assert_same_bits, last_checkpoint, write_records

COMMON = ("--model=lenet", "--num_classes=10", "--crop_area=0.9,1", "--eval_crop=1", "--learning_rate=0.05")


def events(log_dir, kind):
    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


PRECISIONS = {
    "fp32": (),
    "fp16": ("--fp16", "--loss_scale=dynamic"),
    "bf16": ("--bf16", "--momentum_dtype=bf16"),
}


built = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built here")


@pytest.mark.parametrize(
    ("precision", "transport"),
    [
        pytest.param("fp32", "horovod", marks=[pytest.mark.full, built]),
        ("fp32", "torch"),
        *[pytest.param(precision, "horovod", marks=built) for precision in ("fp16", "bf16")],
        *[pytest.param(precision, "torch", marks=pytest.mark.full) for precision in ("fp16", "bf16")],
    ],
)
def test_loss_falls_and_ranks_agree(launch, records, tmp_path, precision, transport):
    text = launch.run(
        "tests/end_to_end/digest.py",
        *("--model=tiny", "--num_classes=10", "--crop_area=0.9,1", "--learning_rate=0.2"),
        *PRECISIONS[precision],
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
    assert staged == (transport == "horovod" and precision == "bf16")


def test_two_ranks_equal_one(launch, tmp_path):
    """2 ranks x batch 8 and 1 rank x batch 16 on the same fixed tensors are equal up to fp32 rounding."""
    launch.run("tests/end_to_end/fixed_tensors.py", tmp_path / "weights.pt", ranks=2)
    weights = torch.load(tmp_path / "weights.pt")
    for name, start in weights["start"].items():
        one, two = weights["one"][name], weights["all"][name]
        moved = (one - start).norm()
        assert moved > 0
        assert (one - two).norm() < 1e-4 * moved, name


STEPS = 40
UNTIL_THE_END = (*COMMON, "--batch_size=16", f"--num_batches={STEPS}")


@pytest.fixture(scope="module")
def undisturbed(records, tmp_path_factory):
    """Returns the log directory of two epochs on two ranks that nobody stopped, for tests that read it."""
    log_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    launcher = Launcher(log_dir.parent)
    launcher.train(*UNTIL_THE_END, f"--data_dir={records}", f"--log_dir={log_dir}", ranks=2)
    return log_dir


def test_a_run_stopped_in_every_way_ends_with_the_same_bits(launch, records, undisturbed, tmp_path):
    """It is killed while it saves after each step, stopped by a signal to one rank, as srun does, and by mpiexec."""
    log_dir, stopped_at = tmp_path / "run", 0
    arguments = (*UNTIL_THE_END, f"--data_dir={records}", f"--log_dir={log_dir}")
    often = ("--save_interval=0", "--keep=2")
    for how, step, options in (("SIGKILL", 9, often), ("SIGTERM", 22, ()), ("SIGUSR1", 30, ())):
        program = launch.start("tests/end_to_end/disturbed.py", how, step, *arguments, *options, ranks=2)
        code = program.wait()
        assert code not in (0, 2, 3) if how == "SIGKILL" else code == 3, program.text()
        assert (" has gone: " in program.text()) == (how == "SIGKILL")
        assert stopped_at == 0 or f"Restored checkpoint {log_dir}/checkpoint-{stopped_at:08d}.pt" in program.text()
        assert len(list(log_dir.glob("checkpoint-[0-9]*.pt"))) == (2 if how == "SIGKILL" else 3)
        stopped_at = int(last_checkpoint(log_dir)["optimizer"]["counters"][0])
        assert step - 1 <= stopped_at <= step + 3  # a rank hears of a signal a step later
    launch.train(*arguments, ranks=2)
    assert_same_bits(last_checkpoint(undisturbed), last_checkpoint(log_dir))
    # The losses of all steps are the undisturbed run's.
    whole, pieces = ({e["step"]: e["loss"] for e in events(d, "train")} for d in (undisturbed, log_dir))
    assert list(whole) == list(range(1, STEPS + 1))
    assert whole == pieces


def test_batchnorm_and_loss_scale_resume_to_the_same_bits(launch, records, tmp_path):
    arguments = (
        *("--model=resnet18", "--num_classes=10", "--learning_rate=0.02", "--larc_eta=0.01", "--loss_scale=dynamic"),
        *("--larc_exclude=1d", "--momentum_dtype=bf16", "--log_tensors"),
        *(f"--data_dir={records}", "--batch_size=2", "--num_batches=6"),
    )
    launch.train(*arguments, f"--log_dir={tmp_path}/whole")
    launch.run("tests/end_to_end/disturbed.py", "SIGTERM", 2, *arguments, f"--log_dir={tmp_path}/stopped", code=3)
    launch.train(*arguments, f"--log_dir={tmp_path}/stopped")
    assert_same_bits(last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "stopped"))
    files = {path: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert "is trained: all 6 steps are done" in launch.train(*arguments, f"--log_dir={tmp_path}/whole")
    assert files == {path: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    momenta = last_checkpoint(tmp_path / "whole")["optimizer"]["momentum"].values()
    assert {m.dtype for m in momenta} == {torch.bfloat16}
    whole, stopped = ([{**e, "time": 0} for e in events(tmp_path / d, "tensors")] for d in ("whole", "stopped"))
    assert [e["step"] for e in whole] == [1, 2, 3, 4, 5, 6]
    assert whole == stopped


def test_evaluation_counts_each_image_once(launch, records, undisturbed, tmp_path):
    log_dir = shutil.copytree(undisturbed, tmp_path / "run")
    results = []
    for ranks, batch_size in ((1, 2**40), (3, 7)):
        text = launch.run(
            *(
                "launch/eval.py",
                f"--data_dir={records}",
                f"--log_dir={log_dir}",
                f"--batch_size={batch_size}",
                "--json",
                "--per_class",
                f"--report={tmp_path}/{ranks}",
            ),
            ranks=ranks,
        )
        results.append(json.loads(text.splitlines()[-1]))
        assert re.search(rf"^Validation Top-1: {results[-1]['top1']:.3f} % \+/- \d", text, re.MULTILINE)
    assert results[0] == results[1]
    report = (tmp_path / "1/report.html").read_text()
    assert report == (tmp_path / "3/report.html").read_text()
    assert re.search(r"<td>Weights</td><td>[^<]*/checkpoint-\d+\.pt, nvcnn&#x27;s \w+</td>", report)
    classes = results[0].pop("classes")
    assert len(classes) == 10
    assert sum(row["top1"] * row["images"] for row in classes) / 101 == pytest.approx(results[0]["top1"])
    assert results[0].pop("top1") > 80
    assert results[0].pop("top5") > 80
    assert results[0] == {"images": 101, "step": STEPS, "checkpoint": f"{log_dir}/checkpoint-{STEPS:08d}.pt"}
    text = launch.train(*UNTIL_THE_END, f"--data_dir={records}", f"--log_dir={log_dir}", "--eval", ranks=2)
    assert f"Validation Top-1: {results[1]['top1']:.3f} %" in text
    during, at_the_end, *later = events(log_dir, "eval")
    assert (during["step"], during["epoch"], len(later)) == (STEPS // 2, 1, 3)
    assert {name: at_the_end[name] for name in ("top1", "top5", "images", "step")} == {
        name: later[0][name] for name in ("top1", "top5", "images", "step")
    }
    best = max(during["top1"], at_the_end["top1"])
    text = launch.run("launch/eval.py", f"--data_dir={records}", f"--checkpoint={log_dir}/checkpoint-best.pt")
    assert f"Validation Top-1: {best:.3f} %" in text


def test_a_run_of_more_ranks_is_not_resumed(launch, records, undisturbed):
    arguments = (*UNTIL_THE_END, f"--data_dir={records}", f"--log_dir={undisturbed}")
    assert "ranks: there 2, here 1" in launch.train(*arguments, code=2)


def test_what_a_log_directory_holds(undisturbed):
    names = sorted(re.sub(r"tfevents.*", "tfevents", path.name) for path in undisturbed.iterdir())
    checkpoints = [f"checkpoint-{STEPS // 2:08d}.pt", f"checkpoint-{STEPS:08d}.pt", "checkpoint-best.pt"]
    pictures, logs = ("curve.png", "input.png"), ("events.out.tfevents", "metrics.jsonl")
    assert names == sorted([".lock", *checkpoints, "config.json", *pictures, *logs])
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["settings"]["model"] == "lenet"
    assert {"nvcnn", "torch", "triton", "python"} <= config["versions"].keys()
    state = last_checkpoint(undisturbed)
    assert state["preprocessing"] == asdict(Preprocessing(28, "signed", 1.0, "stretch", "bilinear"))
    assert state["options"] == {}
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
CONVOLUTIONS |= {"partial_sums.sum_kernel"}
# These are done in the epilogues of convolutions, and in their prologues.
REPLACED = {
    "torch": set(),
    "triton": {"batch_norm_statistics.sums_kernel", "batch_norm.gradient_kernel"},
    "triton-materialized": {"batch_norm_statistics.sums_kernel"},
    "triton-gram": {"batch_norm_statistics.sums_kernel"},
}
GRAM = {
    "gram_matrix.kernel",
    "gram_norm.spread_kernel",
    "gram_norm.kernel",
    "gram_gradient.kernel",
    "gram_gradient.weights_kernel",
}


@pytest.mark.parametrize(
    ("precision", "conv", "steps"),
    [
        ("fp32", "torch", 4),
        pytest.param("fp32", "triton", 20, marks=pytest.mark.full),
        ("fp16", "triton", 3),  # of five seconds each
        pytest.param("fp16", "triton-materialized", 10, marks=pytest.mark.full),
        pytest.param("fp16", "triton-gram", 10, marks=pytest.mark.full),
    ],
)
def test_the_triton_kernels_follow_the_reference(launch, records, tmp_path, precision, conv, steps):
    """Real steps through Triton's interpreter are compared with those of the references."""
    losses, texts = {}, {}
    for kernels in ("reference", "triton"):
        texts[kernels] = launch.run(
            "tests/end_to_end/tiny.py",
            *("--model=tiny", "--num_classes=10", "--larc_eta=0.1", "--learning_rate=0.01", f"--conv={conv}"),
            *PRECISIONS[precision],
            *(f"--data_dir={records}", f"--log_dir={tmp_path}/{kernels}", "--batch_size=4", f"--num_batches={steps}"),
            "--eval_every=0",
            environment={"NVCNN_KERNELS": kernels} | ({"TRITON_INTERPRET": "1"} if kernels == "triton" else {}),
        )
        losses[kernels] = [e["loss"] for e in events(tmp_path / kernels, "train")]
    states = {kernels: last_checkpoint(tmp_path / kernels) for kernels in losses}
    assert [state["kernels"] for state in states.values()] == ["reference", "triton"]
    assert len(losses["triton"]) == steps
    assert len(set(losses["triton"])) == steps
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-4 if precision == "fp32" else 5e-3)
    one, other = (state["weights"] for state in states.values())
    expected = KERNELS - REPLACED[conv] | (set() if conv == "torch" else CONVOLUTIONS)
    expected |= GRAM if conv == "triton-gram" else set()
    assert set(re.search(r"^launched: (.*)$", texts["triton"], re.MULTILINE)[1].split()) == expected
    assert f"Convolution: 3 {conv} (--conv={conv})" in texts["triton"]
    if conv == "triton":
        check_evaluation(launch, tmp_path)
    for bn in ("bn1", "bn2", "bn3"):  # a mean differs on the scale of its channel's deviation
        deviation = one[f"{bn}.running_var"].sqrt()
        bound = 1e-3 if precision == "fp32" else 1e-2
        assert ((one[f"{bn}.running_mean"] - other[f"{bn}.running_mean"]).abs() < bound * deviation).all()
        assert ((deviation - other[f"{bn}.running_var"].sqrt()).abs() < bound * deviation).all()


def check_evaluation(launch, tmp_path):
    """Kernels evaluate as the references do, with BatchNorm in the convolutions: nothing else touches activations."""
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


@pytest.mark.parametrize(
    ("model", "learning_rate", "parameters", "batch_size"),
    [
        ("resnet50", 2.0, "25,557,032", 1),
        pytest.param("resnet50", 2.0, "25,557,032", 2, marks=pytest.mark.full),
        pytest.param("inception3", 1.0, "23,834,568", 2, marks=pytest.mark.full),
    ],
)
def test_the_originals_commands(launch, tmp_path, model, learning_rate, parameters, batch_size):
    """They run flag for flag on two ranks, with only data, log directory, batch and epochs replaced."""
    data, log_dir = tmp_path / "data", tmp_path / "run"
    for split, images in (("train", 2 * batch_size), ("validation", 2)):
        write_split(data, split, images, 2, lambda i: picture(i, "JPEG", "RGB", (64, 48)), lambda i: 250 * i + 250)
    command = (
        f"--model={model} --data_dir={data} --batch_size={batch_size} --fp16 --larc_mode=clip --larc_eta=0.003 "
        f"--loss_scale=128 --log_dir={log_dir} --save_interval=3600 --num_epochs=1 --display_every=100 "
        f"--learning_rate={learning_rate}"
    ).split()
    text = launch.train(*command, "--dry_run")
    assert "Steps:       2" in text.splitlines()  # of one rank
    assert f"Parameters:  {parameters}" in text.splitlines()
    assert not log_dir.exists()
    launch.train(*command, ranks=2)
    state = last_checkpoint(log_dir)
    assert state["num_classes"] == 1000
    assert state["optimizer"]["counters"].tolist() == [1, 1, 1]
    assert all(w.isfinite().all() for w in state["weights"].values())
    places = (f"--data_dir={data}", f"--log_dir={log_dir}")
    texts = (
        launch.train(f"--model={model}", *places, "--batch_size=256", "--eval"),
        launch.run("launch/eval.py", *places),
    )
    lines = [re.findall(r"^Validation Top-.*$", text, re.MULTILINE) for text in texts]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2
    assert [e["images"] for e in events(log_dir, "eval")] == [2, 2, 2]


def test_one_process_needs_torch_and_triton_alone(launch, tmp_path):
    arguments = ("--model=lenet", "--batch_size=8", "--num_batches=25", f"--log_dir={tmp_path}/run")
    text = launch.run("tests/end_to_end/blocked.py", *arguments, warm=False)
    assert "Images/sec:" in text
    assert "TensorBoard is not installed" in text
    assert "matplotlib is not installed" in text
    assert len(events(tmp_path / "run", "train")) == 25
