"""The step runs as a CUDA graph. Without a GPU a tape of operators is captured, which replay runs again.

As of a graph: no Python in between, and the same tensors at the same addresses.
"""

import gc
import os
import socket
import warnings
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.trace import meta_step
from nvcnn import checkpoint, plot
from nvcnn.cuda_graph import WARM_UP, Snapshot, capture, why_not
from nvcnn.data.batch import Batch, prepare_input
from nvcnn.distributed import Torch, Transport, connect
from nvcnn.kernel_choices import use
from nvcnn.meta import places
from nvcnn.models import MODELS
from nvcnn.plan import describe, plan
from nvcnn.program import InputError, Launch
from nvcnn.roofline import META, call_of
from nvcnn.settings import Settings
from nvcnn.step import Step
from nvcnn.train import Run
from tests.nvcnn.test_step import CLASSES, SIZE, Headed, Net, batch, make, mixed

HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tape(TorchDispatchMode):
    """Records a step, and checks that its operators neither read values back nor copy them from the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert HOST_READS.isdisjoint(func.tags), f"{func} waits for the device"
        result = func(*args, **kwargs)
        devices = {t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        assert len(devices) == 1, f"{func} copies between {devices}"
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def layouts(self):
        return [call_of(func, *args, outputs=result, **kwargs) for func, args, kwargs, result in self.calls]


def on_tape(functions):
    """Stands in for `capture` on a machine without a GPU."""
    tapes = [Tape() for _ in functions]
    for function in functions:
        for _ in range(WARM_UP):
            function()
    for tape, function in zip(tapes, functions, strict=True):
        with tape:
            function()
    return [torch.no_grad()(tape.replay) for tape in tapes]


@pytest.fixture
def capturing(device, monkeypatch):
    """Sets cuDNN up as `use_device` does: the fastest deterministic algorithm is chosen once a thread."""
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, True)
    if device.type == "cpu":
        monkeypatch.setattr("nvcnn.step.capture", on_tape)


def bits(step):
    """Returns all state, and what the generators will draw next."""
    state = {name: tensor.clone() for name, tensor in step.state().items()}
    with torch.random.fork_rng():
        state["host"], state["device"] = torch.rand(2), torch.rand(2, device=step.arena.weight.device)
    return state


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)), name


OPTIONS = {
    "fp32": {},
    "fp16, fused": {"conv": "triton", "dtype": torch.float16},
    "bf16, no LARC": {"dtype": torch.bfloat16, "larc_eta": None, "momentum_dtype": torch.bfloat16}
    | {"clip_norm": 0.1, "no_decay": "1d", "ema": 0.5},
    "fp16, cudnn": {"conv": "cudnn", "dtype": torch.float16},
    "auxiliary heads": {"net": Headed},
    "auxiliary heads, mixed": {"net": Headed},
    "fp16, accumulated, mixed": {"conv": "triton", "dtype": torch.float16, "accumulate": 2},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_graph_has_the_bits_of_a_step(device, capturing, case, monkeypatch):
    """The run overflows and resumes in the middle. The model has a dropout, so the generators matter."""
    options = OPTIONS[case]
    padded = options.get("dtype") == torch.float16  # as a GPU's images are
    monkeypatch.setattr("nvcnn.step.image_channels", lambda model, device: 4 if padded else 3)
    batches = [batch(seed, device) for seed in range(6)]
    batches[2] = batches[2]._replace(labels=torch.full_like(batches[2].labels, CLASSES))  # no such class: NaN
    mixes = case.endswith("mixed")
    if mixes:
        batches = [mixed(data) for data in batches]
        batches[3].mix[:2] = 1
    more = [batch(number, device) for number in range(6, 5 + options.get("accumulate", 1))]
    more = [mixed(data) for data in more] if mixes else more
    eager, graph = make(device, **options), make(device, **options)
    torch.manual_seed(3)
    start = bits(graph)
    graph.capture(4, mixed=mixes)
    assert_same(bits(graph), start)
    states = []
    for step in (eager, graph):
        torch.manual_seed(3)
        step.optimizer.loss_scale.fill_(4.0)
        states.append([])
        for number, data in enumerate(batches):
            if step.replay and number == 4:
                saved = step.state_dict()
                step.load_state_dict(saved)  # what is captured reads it
                step = make(device, **options)
                step.load_state_dict(saved)
                step.capture(4, mixed=mixes)
            latest = step(data, *more)
            states[-1].append(bits(step) | {"returned": latest.clone(), "read": torch.tensor(step.read())})
    for one, other in zip(*states, strict=True):
        assert_same(one, other)
    assert [int(state["optimizer.counters"][1]) for state in states[0]] == [1, 2, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="images must be"):
        step(Batch(*(t[:3] for t in batches[0][:3])), *more)


def test_each_size_has_its_graph_and_algorithms(device, capturing):
    """Phases may come back to a size. What is the input of one graph is where that of another is."""
    sizes, names = (SIZE, 12, 12, SIZE, 6), places(Net(), 4, SIZE, torch.float32)
    algorithms = {size: dict.fromkeys(names, how) for size, how in ((SIZE, "torch"), (12, "triton"), (6, "torch"))}
    eager, graph = (make(device, algorithms=algorithms) for _ in range(2))
    plain = make(device)
    torch.manual_seed(3)
    start = bits(graph)
    graph.capture(4, [SIZE, 12, 6])
    assert_same(bits(graph), start)
    states = []
    for step in (plain, eager, graph):
        torch.manual_seed(3)
        states.append([])
        for number, size in enumerate(sizes):
            if step is plain:
                use(step.model, algorithms[size])
            step(batch(number, device, size))
            assert step.model.conv.algorithm == algorithms[size]["conv"]
            states[-1].append(bits(step))
    for expected, one, other in zip(*states, strict=True):
        assert_same(expected, one)
        assert_same(expected, other)
    assert len({inputs[0][0].data_ptr() for inputs, _ in graph.captured.values()}) == 1
    with pytest.raises(ValueError, match="images of 10: steps were captured for 12, 8, 6"):
        graph(batch(0, device, 10))


def test_a_run_is_the_same_with_a_graph(tmp_path, capturing, monkeypatch, device):
    """The loop around the graph prints the same lines, saves the same checkpoint, and ends."""
    lines, weights = [], []
    taken, whole = [], Step.capture
    monkeypatch.setattr(Step, "capture", lambda *given, **mixed: taken.append(given[1:]) or whole(*given, **mixed))
    for name, reason in (("eager", "--cuda_graph=off"), ("graph", "")):
        monkeypatch.setattr("nvcnn.plan.why_not", lambda *_, reason=reason, **__: reason)
        settings = Settings(model="lenet", batch_size=4, num_batches=4, num_classes=9, log_dir=str(tmp_path / name))
        run = Run(settings, None, connect("torch"), None)
        assert run.loop() == 0
        assert taken == ([(4, [28])] if name == "graph" else [])
        assert run.train_step.replay is None  # a graph must end before the transport
        weights.append(checkpoint.newest(tmp_path / name)[1]["weights"])
        events = [event for event in plot.read(tmp_path / name) if event["event"] == "train"]
        lines.append([{k: v for k, v in e.items() if k not in ("time", "images_per_second")} for e in events])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4
    assert_same(*weights)


def test_steps_are_alike_and_leave_state_where_it_is(device):
    step = make(device, "triton", dtype=torch.float16)
    tapes = []
    for number in range(3):
        before = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in step.state().items()}
        data = batch(number, device)
        images = prepare_input(data.images, data.flip, dtype=torch.float16, normalize="signed")
        with Tape() as tape:
            step.train([(images, data.labels)])
        tapes.append(tape.layouts())
        assert {name: (tensor.data_ptr(), tensor.shape) for name, tensor in step.state().items()} == before
        assert all(p.grad is None for p in step.model.parameters())
    assert tapes[1] == tapes[2]


@pytest.mark.parametrize(
    ("model", "conv", "dtype", "aux"),
    [
        ("resnet50", "triton", torch.float16, False),
        ("resnet18", "cudnn", torch.bfloat16, False),
        ("lenet", "torch", torch.float32, False),
        ("alexnet", "triton", torch.float16, False),
        ("googlenet", "triton", torch.float16, True),
        ("inception3", "cudnn", torch.bfloat16, True),
    ],
)
def test_a_gpus_step_takes_nothing_from_the_host(model, conv, dtype, aux):
    """On the meta device an op does what it does on a GPU, and has no values to read."""
    step, size = meta_step(model, 2, dtype, conv=conv, aux=aux), MODELS[model].image_size
    images = torch.empty(2, step.channels, size, size, dtype=dtype, device=META)
    with mock.patch.dict(os.environ, NVCNN_KERNELS="triton"), Tape() as tape:
        images = images.to(memory_format=torch.channels_last)
        step.train([(images, torch.empty(2, dtype=torch.int64, device=META))])
    assert "nvcnn::larc_update" in {call.name for call in tape.layouts()}


@pytest.mark.parametrize(
    "read", [lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t[t > 0], lambda t: int(t[0]), torch.nonzero]
)
def test_a_tape_refuses_what_waits_for_the_device(read):
    with pytest.raises(AssertionError, match="waits for the device"), Tape():
        read(torch.ones(3))


def test_a_tape_refuses_what_comes_from_the_host():
    with pytest.raises(AssertionError, match="copies between"), Tape():
        torch.empty(2, device=META).copy_(torch.tensor([1.0, 2.0]))


def test_a_snapshot_brings_back_everything(device):
    """The three steps between leave no trace: the bits are the same now, and after the next step."""
    one, other = make(device, dtype=torch.float16), make(device, dtype=torch.float16)
    for step in (one, other):
        torch.manual_seed(3)
        step(batch(0, device))
    torch.manual_seed(4)
    start = bits(one)
    before = Snapshot(one.state().values(), device)
    for number in range(3):
        one(batch(number, device))
    assert bits(one)["host"].ne(start["host"]).any() or device.type == "cuda"
    before.restore()
    assert_same(bits(one), start)
    for step in (one, other):
        torch.manual_seed(5)
        step(batch(1, device))
    assert_same(bits(one), bits(other))


WHERE = {"gpu": True, "kernels": "triton", "ranks": 1, "transport": "horovod"}


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({}, ""),
        ({"ranks": 8, "transport": "torch"}, ""),
        ({"ranks": 8}, "Horovod's allreduces cannot be captured"),
        ({"gpu": False, "kernels": "reference"}, "there is no GPU"),
        ({"kernels": "reference"}, "NVCNN_KERNELS=reference"),
    ],
)
def test_where_the_step_is_a_graph(where, reason):
    where = WHERE | where
    assert why_not("auto", **where).startswith(reason)
    assert bool(why_not("auto", **where)) == bool(reason)
    assert why_not("off", **where) == "--cuda_graph=off"
    with pytest.raises(InputError, match=f"--cuda_graph=on: {reason}") if reason else nullcontext():
        assert why_not("on", **where) == ""


def test_a_run_says_it_at_its_start(device):
    def line(cuda_graph):
        settings = Settings(model="lenet", cuda_graph=cuda_graph)
        return next(text for text in describe(settings, plan(settings, None, 1)) if text.startswith("CUDA graph"))

    assert line("off") == "CUDA graph:  none: --cuda_graph=off"
    assert line("auto") == "CUDA graph:  " + ("the whole step" if device.type == "cuda" else "none: there is no GPU")
    with (
        nullcontext() if device.type == "cuda" else pytest.raises(InputError, match="--cuda_graph=on: there is no GPU")
    ):
        assert line("on") == "CUDA graph:  the whole step"


class Fake:
    """Stands in for torch.cuda's streams, events and graphs, and notes what is done with them, in order."""

    def __init__(self, monkeypatch):
        self.done, self.streams, self.fails = [], [], False
        for name in ("CUDAGraph", "Stream", "Event", "current_stream", "stream", "graph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def CUDAGraph(self):
        return mock.Mock(replay=lambda: self.done.append("replay"))

    def Stream(self):
        return mock.Mock(wait_stream=lambda other: self.done.append("the side stream waits"))

    def current_stream(self):
        return mock.Mock(wait_stream=lambda other: self.done.append("the first stream waits"))

    def Event(self, blocking):
        number = self.done.count("event")
        self.done.append("event")
        wait, record = ("wait", number), ("record", number)
        return mock.Mock(synchronize=lambda: self.done.append(wait), record=lambda: self.done.append(record))

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        yield
        self.streams.pop()

    def graph_pool_handle(self):
        assert not self.done, "all graphs share one"
        return "pool"

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert pool == "pool"
        assert stream is self.streams[-1], "warm-up and capture are on one stream"
        self.done.append(capture_error_mode)
        yield
        self.done.append("captured")

    def step(self):
        self.done.append("step, with garbage collection" if gc.isenabled() else "step")
        assert self.streams
        if self.fails:
            warnings.warn("The AccumulateGrad node's stream does not match the stream of the node", stacklevel=1)


def test_the_order_of_a_capture(monkeypatch):
    fake = Fake(monkeypatch)
    replays = capture([fake.step, fake.step])
    captured = [*["step"] * 2 * WARM_UP, *["thread_local", "step", "captured"] * 2]
    assert fake.done == ["the side stream waits", *captured, "the first stream waits", "event", "event"]
    assert gc.isenabled()
    assert not fake.streams
    fake.done.clear()
    for replay in (*replays, replays[0]):
        replay()
    # Never more than two steps ahead: a step waits for the end of the one before the last.
    assert fake.done == [x for n in (0, 1, 0) for x in (("wait", n), "replay", ("record", n))]


def test_a_leaf_on_another_stream_ends_the_capture(monkeypatch):
    """PyTorch warns where a graph of an earlier step is alive, as its leaves would pull in their own stream."""
    fake = Fake(monkeypatch)
    fake.fails = True
    with pytest.raises(UserWarning, match="AccumulateGrad") as error:
        capture([fake.step])
    assert error.value.__notes__ == ["This was a CUDA graph in the making: --cuda_graph=off goes without."]
    assert gc.isenabled()


def nccl_group(monkeypatch):
    """Makes a process group of this process alone."""
    with socket.socket() as free:
        free.bind(("", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    return Torch(Launch(launcher="the environment"))


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("group", ["none", pytest.param("nccl", marks=GPU)])
def test_allreduces_are_in_the_graph(device, capturing, monkeypatch, group):
    """The transport doubles what it sums, once it is waited for: a sum that is left out would show."""
    transport = nccl_group(monkeypatch) if group == "nccl" else Transport(Launch())
    all_reduce = transport.all_reduce

    def doubling(tensor, name):
        wait = all_reduce(tensor, name)

        def wait_and_double():
            wait()
            tensor.mul_(2)

        return wait_and_double

    plain, eager, graph = (make(device, transport=transport, dtype=torch.bfloat16) for _ in range(3))
    torch.manual_seed(0)
    plain(batch(0, device))
    monkeypatch.setattr(transport, "all_reduce", doubling)
    try:
        graph.capture(4)
        for number in range(3):
            for step in (eager, graph):
                torch.manual_seed(number)
                step(batch(number, device))
            assert_same(bits(eager), bits(graph))
            if number == 0:
                assert torch.equal(graph.arena.matrix_gradient, 2 * plain.arena.matrix_gradient)
                assert torch.equal(graph.arena.vector_gradient, 2 * plain.arena.vector_gradient)
    finally:
        graph.close()
        transport.close()
