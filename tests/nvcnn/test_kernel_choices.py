"""Algorithms of convolutions are measured and kept, and every rank gets the same."""

import ast
import gc
import json
import threading
from math import inf
from pathlib import Path
from statistics import median

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import kernels
from kernels.implementation import INTERPRETED
from nvcnn import checkpoint, kernel_choices, timing
from nvcnn.distributed import Transport
from nvcnn.kernel_choices import (
    CANDIDATES,
    FEW,
    cache_file,
    candidates,
    choose,
    distances,
    exact,
    measure,
    sample,
    show,
    use,
)
from nvcnn.meta import GRAM_ADDS, GRAM_ALONE, GRAM_RELU, Place, places
from nvcnn.models import JOINT, build_model, functions
from nvcnn.models.functions import library_gradients
from nvcnn.models.layers import Conv2d
from nvcnn.program import InputError, Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRITON_IS_FASTER = {"triton": 10.0, "triton-materialized": 12.0, "cudnn": 20.0}
ONE = ((1, 1), (0, 0), 1)  # stride, padding, groups


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch):
    """Stands in for measurements: cuDNN is fastest for 3x3, triton for all else. Returns the places asked for."""
    asked: list[Place] = []

    def fake(place, device, say):
        asked.append(place)
        return dict.fromkeys(CANDIDATES, 30.0) | {"cudnn": 20.0} if place.weight[2] == 3 else TRITON_IS_FASTER

    stands_in(monkeypatch, fake)
    return asked


def stands_in(monkeypatch, measure) -> None:
    """Has this measure on a GPU that has not proved the kernel of both gradients, whatever is here."""
    monkeypatch.setattr(kernel_choices, "measure", measure)
    monkeypatch.setattr(kernel_choices, "machine", lambda: "a GPU, some versions")
    monkeypatch.setattr(kernel_choices, "passed", lambda *_: False)


def resnet(name="resnet50"):
    with torch.device("meta"):
        return build_model(name, num_classes=10, seed=1)


def choices(stored=None, transport=None, asked="auto", device=GPU, lines=None):
    say = [].append if lines is None else lines.append
    convolutions = places(resnet(), 256, 224, torch.float16)
    return choose(asked, convolutions, device, transport or Transport(Launch()), stored, say)


@pytest.mark.parametrize("folded", ["folded", "folded, adding"])
def test_the_candidates_of_an_evaluation_s_place_compute_the_same(folded):
    place = Place((2, 8, 5, 5), (6, 8, 3, 3), (2, 2), (1, 1), 1, torch.float32, "activation", False, folded)
    assert candidates(place) == ("triton", "cudnn")
    one = sample(place, CPU)
    with torch.no_grad():
        results = [one.results(algorithm) for algorithm in candidates(place)]
    assert results[0].keys() == {"z"}
    assert results[0]["z"].shape == place.y == (2, 6, 3, 3)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reads", ["activation", "raw", "rectified", "join", "join of two"])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_candidates_of_a_place_compute_the_same(reads, gradient):
    """The whole of a place is timed, with every gradient; here in float32 through the references."""
    stride = 2 if reads in ("rectified", "join") else 1
    place = Place((2, 8, 5, 5), (6, 8, 1, 1), *ONE, torch.float32, reads, gradient, skip_stride=stride)
    one = sample(place, CPU)
    results = [one.results(algorithm) for algorithm in candidates(place)]
    read = {"activation": "x", "raw": "x x_norm", "join": "x x_norm b", "join of two": "x x_norm b b_norm"}
    read["rectified"] = read["raw"]
    gradients = {"weight", "gamma", "beta"} | (set(read[reads].split()) if gradient else set())
    joined = {"z"} if "join" in reads or reads == "rectified" else set()
    assert results[0].keys() == {"y", "norm"} | joined | {f"d_{name}" for name in gradients}
    assert not joined or results[0]["z"].shape[2] == 5 // stride + stride // 2
    assert not any(t.requires_grad for t in results[0].values())  # of the graph nothing is left
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("reads", "c", "k", "joined"),
    [("raw", 64, 256, True), ("rectified", 256, 64, True), ("join", 256, 64, False), ("raw", 64, 128, False)],
)
def test_both_gradients_in_one_kernel_are_those_of_two(monkeypatch, reads, c, k, joined):
    """Where there is no such kernel the two run. The one op's reference is that of the two."""
    place = Place((2, c, 3, 5), (k, c, 1, 1), *ONE, torch.float16, reads, True)
    one, calls = sample(place, CPU), []
    op = kernels.convolution_gradients
    monkeypatch.setattr(kernels, "convolution_gradients", lambda *arguments: calls.append(1) or op(*arguments))
    expected = one.results("triton")
    assert not calls
    found = one.results(JOINT)
    assert len(calls) == joined
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("reads", "gradient", "folded"),
    [("rectified", True, ""), ("activation", True, ""), ("activation", False, ""), ("activation", False, "folded")],
)
def test_the_candidates_of_a_place_with_bias_compute_the_same(reads, gradient, folded):
    place = Place((2, 8, 5, 5), (6, 8, 3, 3), (2, 2), (1, 1), 1, torch.float32, reads, gradient, folded, bias=True)
    assert candidates(place) == ("triton", "cudnn")
    one = sample(place, CPU)
    with torch.set_grad_enabled(not folded):
        results = [one.results(algorithm) for algorithm in candidates(place)]
    wanted = {"weight", "bias"} | ({"x"} if gradient else set()) | ({"x_norm"} if reads == "rectified" else set())
    assert results[0].keys() == ({"z"} if folded else {"y", "norm"} | {f"d_{name}" for name in wanted})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


GRAM_PLACES = pytest.mark.parametrize(
    ("reads", "stride", "gram"),
    [("raw", (1, 1), GRAM_ADDS), ("activation", (2, 2), GRAM_ALONE), ("raw", (1, 1), GRAM_RELU)],
    ids=str,
)


@GRAM_PLACES
def test_a_gram_place_computes_what_others_compute(reads, stride, gram):
    """Its reference stores y, normalises it, and reads it again in backward."""
    place = Place((2, 8, 6, 5), (12, 8, 1, 1), stride, (0, 0), 1, torch.float32, reads, True, gram=gram)
    assert candidates(place) == ("triton-gram", "cudnn-gram")
    one = sample(place, CPU)
    expected, *results = (one.results(algorithm) for algorithm in ("cudnn", *candidates(place)))
    read = {"x"} | ({"x_norm"} if reads == "raw" else set()) | ({"b"} if gram == GRAM_ADDS else set())
    assert expected.keys() == {"z"} | {f"d_{name}" for name in read | {"weight", "gamma", "beta"}}
    for found in results:
        assert found.keys() == expected.keys() | {"norm"}
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


@GRAM_PLACES
def test_what_kernels_compute_is_right_at_a_gram_place(device, reads, stride, gram, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    lines: list[str] = []
    quickly(monkeypatch, times=0.25)
    place = Place((2, 16, 6, 6), (24, 16, 1, 1), stride, (0, 0), 1, torch.float16, reads, True, gram=gram)
    assert measure(place, device, lines.append) == {"triton-gram": 250.0, "cudnn-gram": 250.0}
    assert not lines


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_rounding_decides_on_a_gram_place(dtype, monkeypatch):
    lines: list[str] = []
    quickly(monkeypatch, times=0.25)
    place = Place((2, 64, 14, 14), (256, 64, 1, 1), *ONE, dtype, "raw", True, gram=GRAM_ADDS)
    assert measure(place, CPU, lines.append).keys() == set(candidates(place))
    assert not lines


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gram_place_rounds_no_more_than_one_that_stores_y(dtype):
    """y is not rounded before it is normalised, and there is no dy: but two matrices are, alike for all pixels.

    The median of nine draws counts: sums of roundings to few channels are as often 1.3 times as far off as 0.8 times.
    """
    place = Place((4, 64, 14, 14), (256, 64, 1, 1), *ONE, dtype, "raw", True, gram=GRAM_ADDS)
    ratios: dict[str, list[float]] = {}
    for seed in range(9):
        torch.manual_seed(seed)
        one = sample(place, CPU)
        with exact():
            expected = one.in_fp32().results("cudnn")
        found, stored = (distances(one.results(a), expected) for a in ("triton-gram", "triton-materialized"))
        for name in ("z", "d_weight", "d_gamma", "d_x", "d_x_norm"):  # d_beta and d_b are exact
            ratios.setdefault(name, []).append(found[name] / stored[name])
    assert all(median(values) <= 1.2 for values in ratios.values()), ratios


def test_a_gram_place_that_fails_is_left_out_with_a_line(monkeypatch):
    """There is another way to compute it."""
    lines: list[str] = []
    quickly(monkeypatch, times=0.25)
    right = kernels.gram_gradient
    monkeypatch.setattr(kernels, "gram_gradient", lambda *a: (right(*a)[0] * 1.01, *right(*a)[1:]))
    place = Place((2, 16, 6, 6), (24, 16, 1, 1), *ONE, torch.float32, "raw", True, gram=GRAM_ADDS)
    assert measure(place, CPU, lines.append) == dict.fromkeys(candidates(place), inf)
    assert lines == [
        f"{place}: {algorithm} fails here (d_gamma is off by 1.0e-02 of its norm, 2.0e-03 are allowed) and is not used"
        for algorithm in candidates(place)
    ]


@pytest.mark.parametrize("reads", ["rectified", "activation"])
def test_what_kernels_compute_is_right_at_a_place_with_bias(device, reads, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    lines: list[str] = []
    quickly(monkeypatch, times=0.25)
    place = Place((2, 16, 6, 6), (24, 16, 1, 1), *ONE, torch.float16, reads, True, bias=True)
    assert measure(place, device, lines.append).keys() == {"triton", "cudnn"}
    assert not lines


@pytest.mark.parametrize("reads", ["activation", "raw", "rectified", "join of two"])
def test_what_kernels_compute_is_right_at_a_place(device, reads, monkeypatch):
    """The kernels are within the tolerance of the reference in fp16, too."""
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    lines: list[str] = []
    quickly(monkeypatch, times=0.25)
    stride = 2 if reads in ("rectified", "join of two") else 1
    place = Place((2, 16, 6, 6), (24, 16, 1, 1), *ONE, torch.float16, reads, True, skip_stride=stride)
    assert measure(place, device, lines.append).keys() == set(candidates(place))
    assert not lines
    assert INTERPRETED or device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reads", ["raw", "join", "join of two"])
def test_no_rounding_decides_on_a_mask(dtype, reads, monkeypatch):
    """Makes small integers, as some of a hundred thousand sums would else be 0 in one order of roundings only."""
    lines: list[str] = []
    quickly(monkeypatch, times=0.25)
    place = Place((2, 256, 14, 14), (64, 256, 1, 1), *ONE, dtype, reads, True)
    assert measure(place, CPU, lines.append).keys() == set(candidates(place))
    assert not lines


def quickly(monkeypatch, times=None):
    """Measures one round without a load before it; `times` are what its clock says, in milliseconds."""
    for name, value in {"LOAD": 0.0, "ROUNDS": 1, "REPEAT": 1}.items():
        monkeypatch.setattr(kernel_choices, name, value)
    if times is not None:
        monkeypatch.setattr(timing, "milliseconds", lambda step, device: times)


def test_the_reference_is_in_full_precision(monkeypatch):
    """The reference is what Triton is compared with, and things are as before afterwards."""
    monkeypatch.setenv("NVCNN_KERNELS", "auto")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32
    with exact():
        assert not torch.backends.cudnn.allow_tf32
        assert kernels.implementation.runs_triton(GPU) is False
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == before
    assert kernels.implementation.runs_triton(GPU) is True
    monkeypatch.delenv("NVCNN_KERNELS")
    with exact():
        pass
    assert kernels.implementation.runs_triton(GPU) is True


def test_the_reference_adds_a_weight_s_gradient_up_in_double(monkeypatch):
    """Here products of ones follow a large one, beside which fp32 loses them, image by image and over all."""
    x = torch.ones(20, 2, 64, 64).to(memory_format=torch.channels_last)
    x[::FEW, :, 0, 0] = 2.0**25
    conv = Conv2d(2, 3, (1, 1), bias=False)
    weight, geometry = conv.weight, ((1, 1), (0, 0), 1)
    dy = torch.ones(20, 3, 64, 64).to(memory_format=torch.channels_last)
    with exact():
        dx, dw = functions.library_gradients(dy, x, weight, geometry, (True, True))
    assert torch.equal(dw, (x.double().sum((0, 2, 3)).view(1, 2, 1, 1).expand(3, 2, 1, 1)).float())
    assert torch.equal(dx, library_gradients(dy, x, weight, geometry, (True, False))[0])


def test_a_time_is_of_one_set_of_several(monkeypatch):
    """Each candidate does forward of all sets, then backward of all, so that nothing is in the cache any more."""
    done: list[str] = []
    for name in ("forward", "backward"):
        method = getattr(kernel_choices.Sample, name)

        def noted(self, argument, name=name, method=method):
            done.append(name)
            return method(self, argument)

        monkeypatch.setattr(kernel_choices.Sample, name, noted)
    quickly(monkeypatch)
    monkeypatch.setattr(timing, "sets", lambda size, device: 3)
    monkeypatch.setattr(timing, "captured", lambda step, device: done.clear() or step() or step)
    monkeypatch.setattr(timing, "alternate", lambda steps, device, **_: {name: [6.0, 9.0, 90.0] for name in steps})
    place = Place((1, 8, 2, 2), (8, 8, 1, 1), *ONE, torch.float32, "raw", True)
    assert measure(place, CPU, print) == dict.fromkeys(candidates(place), 3000.0)
    assert done == ["forward"] * 3 + ["backward"] * 3


def test_measures_each_place_once_and_takes_the_faster(measured):
    lines: list[str] = []
    found = choices(lines=lines)
    assert len(measured) == len(set(measured)) == 28
    assert found.algorithms["layer1.0.conv2"] == "cudnn"
    assert found.algorithms["layer1.0.conv1"] == found.algorithms["conv1"] == "triton"
    assert str(found).startswith("37 triton, 16 cudnn (28 places measured in ")
    measuring = "Measuring triton, triton-materialized, cudnn at 28 places of convolutions, once on this machine"
    assert lines == [measuring]
    again = choices()
    assert len(measured) == 28
    assert again.algorithms == found.algorithms
    assert str(again) == f"37 triton, 16 cudnn (measured before, {cache_file()})"


def gram_choices(monkeypatch, gram: dict[str, float], lines=None, name="resnet50") -> dict[str, str]:
    """Returns the algorithms, where the Gram matrix takes so long at the 1 x 1s of so many channels (of all: "")."""

    def fake(place, device, say):
        if not place.gram:
            return dict.fromkeys(CANDIDATES[:2], 12.0) | {"cudnn": 9.0 if place.reads == "rectified" else 10.0}
        time = gram.get(str(place.x[1]), gram[""])
        return {"triton-gram": time, "cudnn-gram": 2 * time}

    stands_in(monkeypatch, fake)
    model = resnet(name)
    found, with_gram = (places(model, 256, 224, torch.float16, gram=gram) for gram in (False, True))
    say = [].append if lines is None else lines.append
    return choose("auto", found, GPU, Transport(Launch()), None, say, with_gram).algorithms


def test_a_gram_matrix_is_chosen_where_all_that_it_changes_is_faster_together(monkeypatch):
    """10 + 10 (+ 10 of the skip connection) are compared with the Gram matrix's and 9 of who reads the sum."""
    lines: list[str] = []
    found = gram_choices(monkeypatch, {"": 10.5, "128": 12.0}, lines)
    measured = "Measuring triton, triton-materialized, cudnn, triton-gram, cudnn-gram at 43 places of convolutions"
    assert lines == [f"{measured}, once on this machine"]
    of = {stage: {name: found[name] for name in found if name.startswith(f"layer{stage}")} for stage in (1, 2)}
    gram = {"layer1.0.downsample.0", *(f"layer1.{i}.conv3" for i in range(3))}
    assert {name for name, algorithm in of[1].items() if algorithm == "triton-gram"} == gram - {
        "layer1.0.downsample.0",
        "layer1.0.conv3",
    }
    # Two of 10.5 and 9 are as long as three of 10: the first block stays, as does a stage where it takes longer.
    assert "triton-gram" not in of[2].values()
    assert found["layer2.0.conv1"] == "cudnn"
    # Nobody reads the last block's sum: it is computed as the block before.
    assert found["layer4.2.conv3"] == found["layer4.1.conv3"] == "triton-gram"


def test_a_gram_matrix_of_a_skip_connection_alone_is_compared_alone(monkeypatch):
    """Basic blocks add it to what is unnormalised: nobody reads anything else."""
    found = gram_choices(monkeypatch, {"": 9.5, "128": 11.0}, name="resnet18")
    gram = {name for name, algorithm in found.items() if algorithm == "triton-gram"}
    assert gram == {"layer2.0.downsample.0", "layer4.0.downsample.0"}


def test_a_gram_matrix_that_fails_is_not_chosen(monkeypatch):
    found = gram_choices(monkeypatch, {"": 1.0, "64": inf})
    gram = [name for name, algorithm in found.items() if algorithm == "triton-gram"]
    assert gram
    assert not [name for name in gram if name.startswith("layer1")]


def test_captures_of_measuring_collect_new_objects_alone(measured, monkeypatch):
    frozen = []
    monkeypatch.setattr(kernel_choices, "measure", lambda *_: frozen.append(gc.get_freeze_count()) or TRITON_IS_FASTER)
    choices()
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0


def test_another_machine_s_measurements_do_not_count(measured, monkeypatch):
    choices()
    monkeypatch.setattr(kernel_choices, "machine", lambda: "a GPU, other versions")
    choices()
    assert len(measured) == 56
    assert json.loads(cache_file().read_text()).keys() == {"a GPU, some versions", "a GPU, other versions"}


def test_measurements_are_of_these_kernels_and_versions(monkeypatch, tmp_path):
    """Other ops and other GPUs' tables, which no measured step reads, change nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(kernels.configurations, "table_name", lambda device: "nvidia-h100")
    monkeypatch.setattr(kernels.configurations, "TABLES", tmp_path)
    here = kernel_choices.machine()
    assert here.startswith(f"NVIDIA H100, torch {torch.__version__}, triton ")
    assert here.endswith("(triton)" if torch.cuda.is_available() else "(reference)")

    found = {file.name: file for file in kernel_choices.sources()}
    ops = "batch_norm batch_norm_statistics convolution convolution_data_gradient convolution_weight_gradient max_pool"
    ops += " convolution_gradients gram_gradient gram_matrix gram_norm"
    parts = "checks configurations conv_shape implementation launch norm_rows operators partial_sums tiles"
    assert found.keys() == {f"{name}.py" for name in f"fused functions layers {ops} {parts}".split()}

    read, folder = Path.read_bytes, Path(kernels.__file__).parent
    for changed in ("conv_shape", "configurations", "max_pool", "cross_entropy"):
        file = folder / f"{changed}.py"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, file=file: read(path) + b"#" * (path == file))
            assert (kernel_choices.machine() != here) == (file in found.values()), changed

    (tmp_path / "nvidia-h200.json").write_text("{}")
    assert kernel_choices.machine() == here
    (tmp_path / "nvidia-h100.json").write_text("{}")
    assert kernel_choices.machine() != here


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '{"a": {"b": {"triton": "fast"}}}', "\x00\xff"])
def test_a_corrupt_cache_is_discarded_with_a_line(measured, content):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_bytes(content.encode("latin-1"))
    lines: list[str] = []
    choices(lines=lines)
    assert len(measured) == 28
    assert lines[0].startswith(f"{cache_file()}: no measurements of kernels (")
    assert lines[0].endswith("): discarded")
    assert json.loads(cache_file().read_text()).keys() == {"a GPU, some versions"}


def test_a_place_without_times_is_measured_again(measured):
    choices()
    kept = json.loads(cache_file().read_text())
    first = next(iter(kept["a GPU, some versions"]))
    kept["a GPU, some versions"][first] = {}
    cache_file().write_text(json.dumps(kept))
    assert len(choices().algorithms) == 53
    assert [str(place) for place in measured[28:]] == [first]


def test_a_cache_that_cannot_be_written_is_said(measured, tmp_path):
    (tmp_path / "cache").write_text("a file")
    lines: list[str] = []
    found = choices(lines=lines)
    assert len(found.algorithms) == 53
    assert lines[-1].startswith(f"{cache_file()}: measurements of kernels are not kept (")


def test_a_checkpoint_s_choices_are_used_again(measured):
    stored = dict.fromkeys(places(resnet(), 256, 224, torch.float16), "cudnn")
    found = choices(stored)
    assert not measured
    assert str(found) == "53 cudnn (as in the checkpoint)"


def test_a_checkpoint_s_choice_of_one_kernel_needs_a_hopper(measured, monkeypatch):
    stored = dict.fromkeys(places(resnet(), 256, 224, torch.float16), "cudnn") | {"layer1.1.conv1": JOINT}
    monkeypatch.setattr(kernels.configurations, "capability", lambda device: 9)
    found = choices(stored)
    assert str(found) == "52 cudnn, 1 triton-joint (as in the checkpoint)"
    model = resnet()
    use(model, found.algorithms)
    assert model.layer1[1].conv1.algorithm == JOINT
    monkeypatch.setattr(kernels.configurations, "capability", lambda device: 8)
    with pytest.raises(InputError, match=r"as in the checkpoint: triton-joint is for GPUs of compute capability 9"):
        choices(stored)


def test_it_is_chosen_where_it_is_the_fastest(measured, monkeypatch):
    def joint_is_faster(place, device, say):
        return TRITON_IS_FASTER | ({JOINT: 9.0} if place.weight == (256, 64, 1, 1) and place.reads == "raw" else {})

    monkeypatch.setattr(kernel_choices, "measure", joint_is_faster)
    monkeypatch.setattr(kernels.configurations, "capability", lambda device: 9)
    found = choices().algorithms
    assert [name for name, algorithm in found.items() if algorithm == JOINT] == [f"layer1.{i}.conv3" for i in range(3)]


def test_off_a_gpu_it_is_pytorch(measured):
    assert str(choices(device=CPU)) == "53 torch (no GPU)"
    assert str(choices(device=CPU, asked="triton")) == "53 triton (--conv=triton)"
    assert str(choices(asked="torch")) == "53 torch (--conv=torch)"
    with pytest.raises(InputError, match=r"--conv=cudnn needs a GPU"):
        choices(device=CPU, asked="cudnn")
    assert not measured


def test_rank_0_measures_for_all(measured):
    """Runs ranks in threads: all get what rank 0 found."""
    meeting, values = threading.Barrier(2), [None, None]

    class Threads(Transport):
        def gather(self, value):
            values[self.rank] = value
            meeting.wait()
            return list(values)

    found = {}

    def rank(number):
        found[number] = choices(transport=Threads(Launch(size=2, rank=number)))

    other = threading.Thread(target=rank, args=(1,))
    other.start()
    rank(0)
    other.join()
    assert len(measured) == 28
    assert found[0] == found[1]


PLACE = Place((1, 8, 2, 2), (8, 8, 1, 1), *ONE, torch.float32, "raw", True)
COMPILER = CompilationError("def kernel(x):\n    tl.dot(x)", ast.parse("x").body[0], "K is too small\nfor this")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("GET was unable to find an engine\nand more"), "GET was unable to find an engine"),
        (OutOfResources(300, 227, "shared memory"), "out of resource: shared memory, Required: 300, Hardware limit"),
        (COMPILER, "K is too small"),
        (ValueError("BLOCK_ROWS is 512 in the table"), "BLOCK_ROWS is 512 in the table"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_fails_is_said_in_a_line_and_not_used(monkeypatch, error, words):
    def broken(*_):
        raise error

    quickly(monkeypatch, times=0.25)
    monkeypatch.setattr(kernels, "convolution", broken)
    lines: list[str] = []
    assert measure(PLACE, CPU, lines.append) == {"cudnn": 250.0}
    assert [line.split(" (")[0] for line in lines] == [f"{PLACE}: {a} fails here" for a in CANDIDATES[:2]]
    for line in lines:
        assert f" fails here ({words}" in line
        assert line.endswith(") and is not used")
        assert "\n" not in line


@pytest.mark.parametrize("off", [1.003, float("nan")])
def test_what_is_wrong_is_said_and_not_used(monkeypatch, off):
    right = kernels.convolution_weight_gradient

    def wrong(g, x, dw, *args):
        right(g, x, dw, *args)
        dw.mul_(off)

    quickly(monkeypatch, times=0.25)
    lines: list[str] = []
    monkeypatch.setattr(kernels, "convolution_weight_gradient", wrong)
    assert measure(PLACE, CPU, lines.append) == {"cudnn": 250.0}
    share = "nan" if off != off else "3.0e-03"
    assert lines == [
        f"{PLACE}: {a} fails here (d_weight is off by {share} of its norm, 2.0e-03 are allowed) and is not used"
        for a in CANDIDATES[:2]
    ]
    monkeypatch.setattr(kernels, "convolution_weight_gradient", right)
    assert measure(PLACE, CPU, lines.append).keys() == set(candidates(PLACE))


@pytest.mark.parametrize(
    ("off", "library", "allowed"),
    [
        (1.9e-3, 0.0, None),
        (4.3e-3, 4.3e-3, None),  # seen on a H200: what the library cannot do better is no fault
        (4.3e-3, 1e-3, "2.0e-03"),
        (9.0e-3, 4.0e-3, "8.0e-03"),
        (1.1e-2, 1.1e-2, "1.0e-02"),
        (float("nan"), float("nan"), "2.0e-03"),
        (4.3e-3, float("nan"), "2.0e-03"),
    ],
)
def test_what_the_library_is_off_measures_what_is_wrong(off, library, allowed):
    fault = kernel_choices.wrong({"y": 0.0, "d_weight": off}, {"d_weight": library}, torch.float16)
    assert fault == (allowed and f"d_weight is off by {off:.1e} of its norm, {allowed} are allowed")


def test_a_place_that_nothing_computes_is_an_error(monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(kernel_choices, "wrong", broken)
    with pytest.raises(
        RuntimeError, match="none of triton, triton-materialized, cudnn computes this here: give --conv"
    ):
        measure(PLACE, CPU, print)


def test_a_gpu_that_is_lost_is_an_error(monkeypatch):
    """After an illegal access nothing runs in this process, so other candidates are not blamed for it."""
    lines: list[str] = []

    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(*_):
        monkeypatch.setattr(kernel_choices, "lost", lambda device: lost(GPU))
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered\nmore")

    lost = kernel_choices.lost
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(kernels, "convolution", broken)
    assert not lost(CPU)
    line = r"triton broke the GPU for this process \(Triton Error \[CUDA\]: an illegal memory access was encountered\)"
    with pytest.raises(RuntimeError, match=line):
        measure(PLACE, CPU, lines.append)
    assert not lines


def test_what_was_measured_before_an_error_is_kept(measured, monkeypatch):
    fake = kernel_choices.measure

    def until_the_ninth(place, device, say):
        if len(measured) == 9:
            raise RuntimeError("broken")
        return fake(place, device, say)

    monkeypatch.setattr(kernel_choices, "measure", until_the_ninth)
    with pytest.raises(RuntimeError, match="broken"):
        choices()
    monkeypatch.setattr(kernel_choices, "measure", fake)
    choices()
    assert len(measured) == len(set(measured)) == 28


def test_use_sets_what_is_named():
    model = resnet("resnet18")
    use(model, {"layer1.0.conv1": "triton"})
    assert model.layer1[0].conv1.algorithm == "triton"
    assert model.layer1[0].conv2.algorithm == "torch"
    with pytest.raises(InputError, match=r"^fc: there is no algorithm 'cutlass' here, but torch, triton"):
        use(model, {"fc": "cutlass"})


def test_shows_what_was_measured(measured, capsys):
    assert show(None) == 0
    assert "nothing measured yet" in capsys.readouterr().out
    choices()
    assert show(None) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a GPU, some versions"
    assert len(out) == 29
    row = "triton 10 us triton 12 us triton-materialized - triton-gram 20 us cudnn - cudnn-gram"
    row += " - triton-joint x 256x3x224x224"
    assert out[1].split()[:17] == row.split()[:17]


def test_shows_what_a_run_computes_with(tmp_path, capsys):
    with pytest.raises(InputError, match="no checkpoint there"):
        show(str(tmp_path))
    checkpoint.save(checkpoint.path_of(tmp_path, 3), {"convolutions": {"conv1": "cudnn"}}, keep=1)
    assert show(str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["cudnn", "conv1"]
    of_sizes = {160: {"conv1": "cudnn"}, 192: {"conv1": "triton"}}
    checkpoint.save(checkpoint.path_of(tmp_path, 4), {"convolutions": of_sizes}, keep=1)
    assert show(str(tmp_path)) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == ["cudnn conv1, at 160 x 160", "triton conv1, at 192 x 192"]
