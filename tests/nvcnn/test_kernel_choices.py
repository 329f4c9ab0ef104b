"""Which algorithm computes a convolution: what is measured, what is kept, what every rank gets."""

import json
import threading

import pytest
import torch

from nvcnn import checkpoint, kernel_choices
from nvcnn.distributed import Launch, Transport
from nvcnn.errors import InputError
from nvcnn.kernel_choices import Place, cache_file, choose, measure, places, show, step_of, use
from nvcnn.models import build_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRITON_IS_FASTER = {"triton": 10.0, "cudnn": 20.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch):
    """Measurements without a GPU: 3x3 is faster by cuDNN, all else by triton. Returns the places in question."""
    asked: list[Place] = []

    def fake(place, device, say):
        asked.append(place)
        return {"triton": 30.0, "cudnn": 20.0} if place.weight[2] == 3 else TRITON_IS_FASTER

    monkeypatch.setattr(kernel_choices, "measure", fake)
    monkeypatch.setattr(kernel_choices, "machine", lambda: "a GPU, some versions")
    return asked


def resnet(name="resnet50"):
    with torch.device("meta"):
        return build_model(name, num_classes=10, seed=1)


def choices(stored=None, transport=None, asked="auto", device=GPU, lines=None):
    say = [].append if lines is None else lines.append
    convolutions = places(resnet(), 256, 224, torch.float16)
    return choose(asked, convolutions, device, transport or Transport(Launch()), stored, say)


def test_the_places_of_a_resnet50():
    model = resnet()
    found = places(model, 256, 224, torch.float16)
    assert list(found) == [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(found) == 53
    assert len(set(found.values())) == 28
    stem, strided, joined = found["conv1"], found["layer2.0.conv2"], found["layer3.1.conv1"]
    assert str(stem) == (
        "x 256x3x224x224 weight 64x3x7x7 stride 2x2 padding 3x3 groups 1 float16 activation, without its gradient"
    )
    assert str(strided) == "x 256x128x56x56 weight 128x128x3x3 stride 2x2 padding 1x1 groups 1 float16 raw"
    assert joined.reads == "join of two"  # behind the block whose skip connection is a convolution
    assert found["layer3.2.conv1"].reads == "join"
    assert found["layer3.0.downsample.0"].reads == "activation"
    assert {m.algorithm for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {"torch"}  # as it was
    padded = places(model, 256, 224, torch.float16, channels=4)
    assert list(padded) == list(found)
    assert padded["conv1"].weight == (64, 4, 7, 7)


def test_the_places_of_an_evaluation():
    model = resnet().eval()
    found = places(model, 64, 224, torch.float16, channels=4)
    assert len(found) == 53
    assert str(found["conv1"]) == (
        "x 64x4x224x224 weight 64x4x7x7 stride 2x2 padding 3x3 groups 1 float16 activation, folded"
    )
    assert {place.folded for name, place in found.items() if name.endswith("conv3")} == {"folded, adding"}
    assert {place.folded for name, place in found.items() if not name.endswith("conv3")} == {"folded"}
    assert not any(place.gradient for place in found.values())


@pytest.mark.parametrize("folded", ["folded", "folded, adding"])
def test_both_algorithms_of_an_evaluation_s_place_compute_the_same(folded):
    place = Place((2, 8, 5, 5), (6, 8, 3, 3), (2, 2), (1, 1), 1, torch.float32, "activation", False, folded)
    results = []
    for algorithm in ("triton", "cudnn"):
        torch.manual_seed(0)
        results += step_of(place, algorithm, CPU)()
    assert results[0].shape == (2, 6, 3, 3)
    assert not results[0].requires_grad
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_model_without_blocks_has_no_places():
    assert places(build_model("lenet", num_classes=10, seed=1), 2, 28, torch.float32) == {}


@pytest.mark.parametrize("reads", ["activation", "raw", "join", "join of two"])
@pytest.mark.parametrize("gradient", [True, False])
def test_both_algorithms_of_a_place_compute_the_same(reads, gradient):
    """What is timed is the whole of a place: every gradient, in float32 through the references."""
    place = Place((2, 8, 5, 5), (6, 8, 1, 1), (1, 1), (0, 0), 1, torch.float32, reads, gradient)
    results = []
    for algorithm in ("triton", "cudnn"):
        torch.manual_seed(0)
        results.append(step_of(place, algorithm, CPU)())
    inputs = {"activation": 1, "raw": 2, "join": 3, "join of two": 4}[reads]  # raw ones with their vectors
    assert len(results[0]) == 3 + gradient * inputs
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_measures_each_place_once_and_takes_the_faster(measured):
    lines: list[str] = []
    found = choices(lines=lines)
    assert len(measured) == len(set(measured)) == 28
    assert found.algorithms["layer1.0.conv2"] == "cudnn"
    assert found.algorithms["layer1.0.conv1"] == found.algorithms["conv1"] == "triton"
    assert str(found).startswith("37 triton, 16 cudnn (28 places measured in ")
    assert lines == ["Measuring triton and cudnn at 28 places of convolutions, once on this machine"]
    again = choices()
    assert len(measured) == 28
    assert again.algorithms == found.algorithms
    assert str(again) == f"37 triton, 16 cudnn (measured before, {cache_file()})"


def test_another_machine_s_measurements_do_not_count(measured, monkeypatch):
    choices()
    monkeypatch.setattr(kernel_choices, "machine", lambda: "a GPU, other versions")
    choices()
    assert len(measured) == 56
    assert json.loads(cache_file().read_text()).keys() == {"a GPU, some versions", "a GPU, other versions"}


def test_measurements_are_of_these_kernels_and_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    here = kernel_choices.machine()
    assert here.startswith(f"NVIDIA H100, torch {torch.__version__}, triton ")
    assert here.endswith("(triton)" if torch.cuda.is_available() else "(reference)")
    monkeypatch.setattr(kernel_choices.Path, "read_bytes", lambda file: b"changed")
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


def test_off_a_gpu_it_is_pytorch(measured):
    assert str(choices(device=CPU)) == "53 torch (no GPU)"
    assert str(choices(device=CPU, asked="triton")) == "53 triton (--conv=triton)"
    assert str(choices(asked="torch")) == "53 torch (--conv=torch)"
    with pytest.raises(InputError, match=r"--conv=cudnn needs a GPU"):
        choices(device=CPU, asked="cudnn")
    assert not measured


def test_rank_0_measures_for_all(measured):
    """Ranks in threads: what rank 0 found is what all get."""
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


def test_what_fails_is_said_and_not_used(monkeypatch):
    def step(place, algorithm, device):
        if algorithm in broken:
            raise RuntimeError(f"{algorithm} is out of shared memory\nand more")
        return list

    monkeypatch.setattr(kernel_choices, "step_of", step)
    monkeypatch.setattr(kernel_choices.triton.testing, "do_bench", lambda step, **options: 0.25)
    place, lines = Place((1, 8, 2, 2), (8, 8, 1, 1), (1, 1), (0, 0), 1, torch.float16, "raw", True), []
    broken = {"triton"}
    assert measure(place, CPU, lines.append) == {"cudnn": 250.0}
    assert lines == [f"{place}: triton fails here (triton is out of shared memory) and is not used"]
    broken = {"triton", "cudnn"}
    with pytest.raises(RuntimeError, match="cudnn is out"):
        measure(place, CPU, lines.append)


def test_use_sets_what_is_named():
    model = resnet("resnet18")
    use(model, {"layer1.0.conv1": "triton"})
    assert model.layer1[0].conv1.algorithm == "triton"
    assert model.layer1[0].conv2.algorithm == "torch"


def test_shows_what_was_measured(measured, capsys):
    assert show(None) == 0
    assert "nothing measured yet" in capsys.readouterr().out
    choices()
    assert show(None) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a GPU, some versions"
    assert len(out) == 29
    assert out[1].split()[:6] == ["triton", "10", "us", "triton", "20", "us"]


def test_shows_what_a_run_computes_with(tmp_path, capsys):
    with pytest.raises(InputError, match="no checkpoint there"):
        show(str(tmp_path))
    checkpoint.save(checkpoint.path_of(tmp_path, 3), {"convolutions": {"conv1": "cudnn"}}, keep=1)
    assert show(str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[1] == "cudnn   conv1"
