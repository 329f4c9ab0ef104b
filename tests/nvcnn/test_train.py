"""A run does what the flags say, and goes on where it stopped."""

import signal
import threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from nvcnn import checkpoint, plot
from nvcnn.distributed import Transport
from nvcnn.kernel_choices import Choices
from nvcnn.meta import places
from nvcnn.metrics import Metrics
from nvcnn.models import MODELS, Model, Preprocessing, constant
from nvcnn.plan import find_training_data, find_validation_data
from nvcnn.program import SAVED_AND_STOPPED, InputError, Launch, Signals
from nvcnn.settings import Settings
from nvcnn.step import Step
from nvcnn.train import Run, train
from tests.end_to_end.conftest import assert_same_bits
from tests.nvcnn.test_step import CLASSES, SIZE, Net
from tests.samples import write_folders


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Keeps the number of threads that this process has: a run would set its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(rank: int = 0, **settings) -> Run:
    """Returns the run of one of two ranks. The other is not there, so they cannot agree on convolutions by time."""
    settings = {"model": "lenet", "conv": "torch", "batch_size": 2, "num_batches": 10, "num_classes": 9} | settings
    return Run(Settings(**settings), None, Transport(Launch(2, rank, rank)), None)


def test_flags_reach_the_step():
    flags = {"larc_mode": "scale", "larc_eta": 0.01, "larc_exclude": "1d", "loss_scale": 64.0, "learning_rate": 0.5}
    flags |= {"momentum": 0.8, "weight_decay": 5e-5, "no_decay": "1d", "clip_norm": 2.0, "ema": 0.99, "cutmix": 0.5}
    flags |= {"accumulate": 2}
    whole = run(label_smoothing=0.1, normalize="imagenet", momentum_dtype="bf16", bf16=True, **flags)
    step, mixing = whole.train_step, whole.mixing
    optimizer, arena = step.optimizer, step.arena
    assert (mixing.mixup, mixing.cutmix, mixing.seed, mixing.rank) == (0.0, 0.5, 1, 0)
    assert (step.label_smoothing, step.prepare_input.keywords["normalize"]) == (0.1, "imagenet")
    assert (arena.momentum.dtype, step.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (optimizer.mode, optimizer.eta, optimizer.excluded_from) == ("scale", 0.01, arena.matrices)
    assert (step.accumulate, optimizer.ranks) == (2, 4)
    mixes = [batch.mix.tolist() for batch in whole.batches(Signals())]
    assert mixes == [pytest.approx(mixing.draw(number, 28, 28)) for number in (0, 1)]
    assert run(schedule="onecycle", warmup_epochs=0.5).schedule.argmax() == 5
    assert (optimizer.clip_norm, optimizer.square_sums.shape[0]) == (2.0, 3)
    assert (optimizer.ema_decay, arena.ema_weight is None) == (0.99, False)
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.decay_vectors) == (0.8, 5e-5, False)
    assert (float(optimizer.schedule[0]), optimizer.loss_scale.item()) == (0.5, 64.0)


def test_weights_are_those_of_the_seed_and_images_of_the_rank_too():
    first, second, other = run(), run(rank=1), run(seed=2)
    assert torch.equal(first.train_step.arena.weight, second.train_step.arena.weight)
    assert not torch.equal(first.train_step.arena.weight, other.train_step.arena.weight)
    images = [next(each.data).images for each in (first, second, other)]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("backend", [None, "torch"], ids=["synthetic", "torch"])
def test_a_run_goes_on_with_the_dropout_of_its_next_step(tmp_path, monkeypatch, small_dataset, backend):
    """The generators' state is in the checkpoint: bits are those of a run that nobody stopped. So are mixed batches."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    stop_at, whole = -1, Step.__call__

    def stopped(step, *batches):
        if int(step.optimizer.counters[0]) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return whole(step, *batches)

    def trained(name) -> int:
        options = {"conv": "torch", "batch_size": 4, "num_batches": 4, "num_classes": CLASSES, "ema": 0.5}
        options |= {"mixup": 0.2, "cutmix": 1.0, "accumulate": 2}
        data = {"data_dir": str(small_dataset), "data_backend": backend} if backend else {}
        settings = Settings(model="net", log_dir=str(tmp_path / name), **options, **data)
        dataset = find_training_data(settings)
        return Run(settings, dataset, Transport(Launch()), checkpoint.resume(settings, 1)).loop()

    monkeypatch.setattr(Step, "__call__", stopped)
    assert trained("whole") == 0
    stop_at = 1
    assert trained("stopped") == SAVED_AND_STOPPED
    assert trained("stopped") == 0
    one, other = (checkpoint.newest(tmp_path / name)[1] for name in ("whole", "stopped"))
    assert torch.equal(one["ranks"][0]["torch_rng"], other["ranks"][0]["torch_rng"])
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
        assert torch.equal(one["ema"][name], other["ema"][name]), name


def test_the_first_input_is_shown_and_changes_nothing(tmp_path, monkeypatch):
    """As the network sees it: mirrored, and what normalising made of it undone."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    shown, weights = [], []
    monkeypatch.setattr(Metrics, "input", lambda _, pictures, names: shown.append((pictures, names)))
    for steps, log_dir in ((2, ""), (1, f"{tmp_path}/run"), (2, f"{tmp_path}/run")):
        options = {"conv": "torch", "batch_size": 20, "num_classes": CLASSES, "normalize": "imagenet"}
        settings = Settings(model="net", num_batches=2, log_dir=log_dir, **options)
        run = Run(settings, None, Transport(Launch()), checkpoint.resume(settings, 1))
        run.plan = replace(run.plan, steps=steps)
        batch = run.data.batch
        assert run.loop() == 0
        weights.append(run.train_step.arena.weight)
    ((pictures, names),) = shown
    seen = torch.where(batch.flip[:, None, None, None], batch.images.flip(2), batch.images)[:16]
    assert torch.equal(pictures, seen.cpu())
    assert names == [f"class {label}" for label in batch.labels[:16].tolist()]
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("backend", "stop_at"), [("torch", 4), ("torch", 6), ("dali_cpu", 5)])
def test_a_run_whose_images_grow_goes_on(tmp_path, monkeypatch, small_dataset, backend, stop_at):
    """In the middle of a size, and where one begins; with the algorithms that were chosen for each."""
    if backend == "dali_cpu":
        pytest.importorskip("nvidia.dali")
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1), least_size=4))
    algorithms = {8: "torch", 12: "triton", 6: "torch"}
    whole, seen, stored = Step.__call__, [], []

    def chosen(model, asked, images, dtype, device, transport, of_checkpoint):
        stored.append(of_checkpoint)
        return Choices(dict.fromkeys(places(model, *images, dtype), algorithms[images[1]]), "as the test says")

    def watched(step, batch):
        seen.append(batch.images.shape[1])
        if len(seen) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return whole(step, batch)

    def trained(name) -> int:
        options = {"batch_size": 10, "num_epochs": 4, "num_classes": CLASSES, "train_size": "8:1,12:2,6"}
        data = {"data_dir": str(small_dataset), "data_backend": backend}
        settings = Settings(model="net", log_dir=str(tmp_path / name), **options, **data)
        dataset = find_training_data(settings)
        return Run(settings, dataset, Transport(Launch()), checkpoint.resume(settings, 1)).loop()

    monkeypatch.setattr(Step, "__call__", watched)
    monkeypatch.setattr("nvcnn.train.choose_algorithms", chosen)
    assert trained("stopped") == SAVED_AND_STOPPED
    assert stored == [{}, {}, {}]
    stored.clear()
    assert trained("stopped") == 0
    _, state = checkpoint.newest(tmp_path / "stopped")
    assert seen == [8] * 3 + [12] * 6 + [6] * 3
    assert stored == [state["convolutions"][size] for size in algorithms]
    assert {size: set(names.values()) for size, names in state["convolutions"].items()} == {
        size: {algorithm} for size, algorithm in algorithms.items()
    }
    assert state["preprocessing"] == asdict(Preprocessing(SIZE, train_size=6))
    stop_at = -1
    assert trained("whole") == 0
    expected = checkpoint.newest(tmp_path / "whole")[1]["weights"]
    for name, weight in state["weights"].items():
        assert torch.equal(weight, expected[name]), name


def test_an_older_checkpoint_has_the_algorithms_of_one_size(monkeypatch):
    one, older = run(), {"conv1": "cudnn"}
    monkeypatch.setattr("nvcnn.train.choose_algorithms", lambda *given: given[-1])
    for stored in (older, {28: older}):
        assert one.choose_algorithms(one.train_step.model, stored) == {28: older}


def test_a_run_does_not_go_on_with_other_classes(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    write_folders(tmp_path / "data", "train", images=CLASSES)
    options = {"data_dir": str(tmp_path / "data"), "batch_size": 2, "num_batches": 1, "log_dir": str(tmp_path / "run")}
    settings = Settings(model="net", conv="torch", data_backend="torch", **options)
    assert train(settings) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "data/train/n00000").rename(tmp_path / "data/train/n99999")
    with pytest.raises(InputError, match=r"its class 0 is 'n00001', but in .*run that is 'n00000': give its data"):
        train(settings)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.fixture
def evaluated_run(tmp_path, monkeypatch):
    """Returns a function that trains three epochs of a net with dropout and BatchNorm, and what the run left."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    for split, images in (("train", 8), ("validation", 6)):
        write_folders(tmp_path / "data", split, images=images, label=lambda i: i % 2)

    def trained(name, code=0, **options):
        options = {"data_backend": "torch", "num_epochs": 3, "batch_size": 4} | options
        options |= {"data_dir": str(tmp_path / "data"), "log_dir": str(tmp_path / name)}
        settings = Settings(model="net", conv="torch", **options)
        datasets = find_training_data(settings), find_validation_data(settings)
        state = checkpoint.resume(settings, 1)
        assert Run(settings, datasets[0], Transport(Launch()), state, None, datasets[1]).loop() == code
        events = [event for event in plot.read(tmp_path / name) if event["event"] == "eval"]
        return checkpoint.newest(tmp_path / name)[1], events

    return trained


@pytest.mark.parametrize("backend", ["dali_cpu", "torch"])
def test_training_goes_on_as_if_it_had_not_been_evaluated(evaluated_run, tmp_path, backend):
    if backend == "dali_cpu":
        pytest.importorskip("nvidia.dali")
    one, _ = evaluated_run("without", eval_every=0, data_backend=backend)
    other, events = evaluated_run("with", data_backend=backend)
    for state in (one, other):
        del state["settings"]
    assert_same_bits(one, other)
    assert [(e["step"], e["epoch"], e["images"]) for e in events] == [(2, 1, 6), (4, 2, 6), (6, 3, 6)]
    assert not (tmp_path / "without" / checkpoint.BEST).exists()


def test_the_best_is_kept_by_a_run_that_goes_on(evaluated_run, tmp_path, monkeypatch):
    """It does not take the second best for the best."""
    hits = iter([2, 4, 3])

    def count_hits(*_):
        if (top1 := next(hits)) == 4:
            signal.raise_signal(signal.SIGTERM)
        return torch.tensor([6, top1, 6])

    monkeypatch.setattr("nvcnn.validation.count_hits", count_hits)
    evaluated_run("run", SAVED_AND_STOPPED, num_epochs=6, eval_every=2)
    _, events = evaluated_run("run", num_epochs=6, eval_every=4)
    assert [e["step"] for e in events] == [4, 8, 12]
    best = checkpoint.load(tmp_path / "run" / checkpoint.BEST)
    assert (int(best["optimizer"]["counters"][0]), best["evaluation"]["top1"]) == (8, 100 * 4 / 6)


def test_averages_are_evaluated_too_and_decide_the_best(evaluated_run, tmp_path, monkeypatch):
    """The trained weights and the averages take turns, and come back to the same bits."""
    hits, seen = iter([5, 2, 2, 4, 3, 3]), []

    def count_hits(model, *_):
        seen.append(model.bn.running_mean.clone().cpu())
        return torch.tensor([6, next(hits), 6])

    monkeypatch.setattr("nvcnn.validation.count_hits", count_hits)
    state, events = evaluated_run("run", ema=0.5)
    assert [(e["step"], e["ema"]) for e in events] == [
        (step, average) for step in (2, 4, 6) for average in (False, True)
    ]
    assert torch.equal(seen[-2], state["weights"]["bn.running_mean"])
    assert torch.equal(seen[-1], state["ema"]["bn.running_mean"])
    assert not torch.equal(*seen[-2:])
    assert checkpoint.load(tmp_path / "run" / checkpoint.BEST)["evaluation"]["top1"] == 100 * 4 / 6
    before, _ = evaluated_run("without", ema=0.5, eval_every=0)
    for each in (state, before):
        del each["settings"]
    assert_same_bits(state, before)


def test_a_signal_ends_an_evaluation_with_everything_saved(evaluated_run, monkeypatch):
    def stopped(model, batches, *_):
        signal.raise_signal(signal.SIGTERM)
        batches.most = 9
        assert len(list(batches)) < 9
        return torch.tensor([6, 6, 6])

    monkeypatch.setattr("nvcnn.validation.count_hits", stopped)
    state, events = evaluated_run("run", code=SAVED_AND_STOPPED)
    assert int(state["optimizer"]["counters"][0]) == 2
    assert events == []
    monkeypatch.undo()
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    _, events = evaluated_run("run")
    assert [e["step"] for e in events] == [2, 4, 6]  # the one that was stopped, too


def test_a_run_goes_on_with_its_learning_rate_or_not_at_all(evaluated_run, monkeypatch):
    evaluated_run("run", num_batches=2, num_epochs=None)
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.2)))
    with pytest.raises(InputError, match=r"has a learning rate of 0.1: give --learning_rate=0.1$"):
        evaluated_run("run", num_batches=2, num_epochs=None)


@pytest.mark.parametrize(("save_every", "steps"), [(1, [6, 4, 2]), (2, [6, 4]), (0, [6])])
def test_the_end_of_an_epoch_is_saved(evaluated_run, tmp_path, save_every, steps):
    evaluated_run("run", save_every=save_every, eval_every=0)
    assert [checkpoint.step_of(path) for path in checkpoint.in_directory(tmp_path / "run")] == steps


def test_without_validation_images_there_is_no_evaluation_unless_it_is_asked_for(small_dataset):
    settings = {"model": "lenet", "data_dir": str(small_dataset)}
    assert find_validation_data(Settings(**settings)) is None
    with pytest.raises(InputError, match=r"no .*validation-\* .*files.*; or give --eval_every=0"):
        find_validation_data(Settings(**settings, eval_every=1))


@pytest.mark.parametrize("max_skipped", [4, 30])
def test_a_run_that_diverges_stops_and_keeps_its_good_checkpoints(tmp_path, monkeypatch, capsys, max_skipped):
    """Also while it is not known yet, although each step saves, and no line of the table is due."""
    whole = Step.__call__

    def poisoned(step, batch):
        bad = int(step.optimizer.counters[0]) >= 7
        return whole(step, batch._replace(labels=torch.full_like(batch.labels, 9)) if bad else batch)  # no such class

    monkeypatch.setattr(Step, "__call__", poisoned)
    options = {"num_batches": 99, "save_interval": 0, "keep": 2, "display_every": 1000, "max_skipped": max_skipped}
    settings = Settings(
        model="lenet", conv="torch", batch_size=2, num_classes=9, log_dir=str(tmp_path), learning_rate=0.01, **options
    )
    assert Run(settings, None, Transport(Launch()), None).loop() == 1
    assert [checkpoint.step_of(path) for path in checkpoint.in_directory(tmp_path)] == [7, 6]
    said = capsys.readouterr().out
    assert f"{max_skipped} steps in a row were skipped, since gradients were not finite: give a --learning_rate" in said
    assert f"the last good checkpoint is {checkpoint.path_of(tmp_path, 7)}" in said
    (event,) = [event for event in plot.read(tmp_path) if event["event"] == "diverged"]
    assert event["step"] == 7 + max_skipped


@pytest.mark.parametrize(
    ("flags", "scale"), [({}, ""), ({"loss_scale": 64.0}, "--loss_scale=dynamic, or "), ({"loss_scale": "dynamic"}, "")]
)
def test_a_loss_scale_that_cannot_fall_is_part_of_the_remedy(flags, scale):
    assert run(learning_rate=0.5, **flags).remedy(ranks_differ=False) == f"give {scale}a --learning_rate below 0.5"


@pytest.mark.parametrize("ends", ["saved", "full", "stopped"])
def test_a_run_goes_on_with_a_disk_that_is_full(tmp_path, monkeypatch, capsys, ends):
    """Each step is to be saved: it says the first that is not, and is quiet for a while; what it must save it tries."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    step, write, tried = Step.__call__, checkpoint.write, []

    def watched(self, *batches):
        if int(self.optimizer.counters[0]) == 7 and ends == "stopped":
            signal.raise_signal(signal.SIGTERM)
        return step(self, *batches)

    def written(content, file):
        tried.append(int(content["optimizer"]["counters"][0]))
        write(content, file)
        if tried[-1] > 3 and (ends != "saved" or tried[-1] < 10):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Step, "__call__", watched)
    monkeypatch.setattr(checkpoint, "write", written)
    options = {"conv": "torch", "batch_size": 4, "num_batches": 10, "num_classes": CLASSES, "save_interval": 0}
    settings = Settings(model="net", log_dir=str(tmp_path), keep=2, on_save_error="continue", **options)
    whole = Run(settings, None, Transport(Launch()), None)
    last = 9 if ends == "stopped" else 10
    paths = {number: checkpoint.path_of(tmp_path, number) for number in (3, 4, last)}
    failed = "{}: cannot be written (No space left on device); the last good checkpoint is {}"
    if ends == "saved":
        assert whole.loop() == 0
    else:
        with pytest.raises(InputError) as error:
            whole.loop()
        assert str(error.value) == failed.format(paths[last], paths[3])
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("Not saved")]
    first = f"Not saved after step 4: {failed.format(paths[4], paths[3])}; training goes on, and tries again in 60 s"
    assert lines[0] == first
    assert (
        lines[1:] == [] if ends == "saved" else [f"Not saved after step {last}: {failed.format(paths[last], paths[3])}"]
    )
    assert ("Stopped by a signal after step 9: not saved" in said) == (ends == "stopped")
    assert tried == [2, 3, 4, last]
    kept = [checkpoint.step_of(path) for path in checkpoint.in_directory(tmp_path)]
    assert kept == ([10, 3] if ends == "saved" else [3, 2])
    assert all(checkpoint.load(path) for path in checkpoint.in_directory(tmp_path))


class Told(Transport):
    """Is rank 1, whose rank 0 says that its disk is full."""

    def gather(self, value):
        return ["full" if isinstance(value, str) else value, value]


def test_a_best_one_that_rank_0_cannot_save_is_no_ranks_best(tmp_path):
    """Were it rank 1's best, rank 1 would not come to the next save."""
    options = {"batch_size": 2, "num_classes": 9, "log_dir": str(tmp_path), "on_save_error": "continue"}
    one = Run(Settings(model="lenet", conv="torch", **options), None, Told(Launch(2, 1, 1)), None)
    result = {"top1": 60.0, "top5": 90.0, "images": 9}
    one.validation = SimpleNamespace(best=50.0, evaluate=lambda signals: [result])
    assert one.evaluate(Metrics("", steps=1, first_step=1, rank=1), Signals())
    assert one.validation.best == 50


def test_a_disk_that_takes_a_minute_is_no_part_of_the_throughput(tmp_path, monkeypatch):
    """Nor do intervals begin before it is done. A clock that is set meanwhile counts for nothing."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    now, step = [100.0], Step.__call__

    def fsync(file):
        now[0] += 60

    def timed(self, *batches):
        now[0] += 1
        return step(self, *batches)

    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0], time=lambda: 1e9 - 1000 * now[0])
    monkeypatch.setattr("nvcnn.metrics.time", clock)
    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Step, "__call__", timed)
    options = {"conv": "torch", "batch_size": 4, "num_batches": 12, "num_classes": CLASSES, "save_interval": 5}
    settings = Settings(model="net", log_dir=str(tmp_path), **options)
    assert Run(settings, None, Transport(Launch()), None).loop() == 0
    assert [checkpoint.step_of(path) for path in checkpoint.in_directory(tmp_path)] == [12, 7]
    assert now[0] > 400
    speeds = [event["images_per_second"] for event in plot.read(tmp_path) if event["event"] == "train"]
    assert speeds == [pytest.approx(4)] * 12


@pytest.mark.parametrize(("long", "times"), [(0.0, 1), (9999.0, 0)])
def test_a_long_run_that_keeps_nothing_says_so_once(monkeypatch, capsys, long, times):
    monkeypatch.setattr("nvcnn.train.LONG", long)
    Run(Settings(model="trivial", batch_size=2, num_batches=5, num_classes=9), None, Transport(Launch()), None).loop()
    assert capsys.readouterr().out.count("nothing will be kept: give --log_dir") == times


class Gathering(Transport):
    """Is one of two ranks of one process; rank 0 gathers what rank 1 handed over before."""

    handed_over = None

    def gather(self, value):
        Gathering.handed_over, there = value if self.rank else None, Gathering.handed_over
        return [value, there]


def test_each_rank_goes_on_with_its_own_statistics(tmp_path, monkeypatch):
    """Their sums are formed about the running mean: about another one, they are rounded otherwise.

    So is the mean of the ranks' average losses.
    """
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    options = {"model": "net", "conv": "torch", "batch_size": 4, "num_classes": CLASSES, "log_dir": str(tmp_path)}
    options["ema"] = 0.5
    settings = Settings(**options)

    def runs(state) -> list[Run]:
        return [Run(settings, None, Gathering(Launch(2, rank, rank)), state) for rank in range(2)]

    before = runs(None)
    for each in reversed(before):
        each.train_step(next(each.data))
        each.save(Metrics("", steps=1, first_step=1, rank=each.transport.rank), must=True)
    _, state = checkpoint.newest(tmp_path)
    running = [each.train_step.arena.running for each in before]
    assert not torch.equal(*running)
    assert torch.equal(state["weights"]["bn.running_mean"], before[0].train_step.model.bn.running_mean.cpu())
    for each, own, past in zip(runs(state), running, before, strict=True):
        assert torch.equal(each.train_step.arena.running, own)
        assert torch.equal(each.train_step.arena.ema_running, past.train_step.arena.ema_running)
        assert not torch.equal(each.train_step.arena.ema_running, own)
        assert torch.equal(each.train_step.optimizer.average, past.train_step.optimizer.average)
    assert not torch.equal(*(each.train_step.optimizer.average for each in before))
    generators = [torch.Generator().manual_seed(settings.seed).get_state()]
    for _ in range(2):
        alone = Run(replace(settings, batch_size=8), None, Transport(Launch()), state)  # goes on for both
        generators.append(torch.get_rng_state())
        assert torch.equal(alone.train_step.arena.running, torch.stack(running).mean(0))
        averages = [each.train_step.arena.ema_running for each in before]
        assert torch.equal(alone.train_step.arena.ema_running, torch.stack(averages).mean(0))
        losses = [each.train_step.optimizer.average for each in before]
        assert torch.equal(alone.train_step.optimizer.average, torch.stack(losses).mean(0))
    assert torch.equal(*generators[1:])
    assert not torch.equal(*generators[:2])
    for rank in state["ranks"]:
        del rank["running"]  # as an older one is, of which all ranks have rank 0's
    for each in runs(state):
        assert torch.equal(each.train_step.arena.running, running[0])


def test_a_run_that_waits_for_input_ends_at_a_signal(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr("nvcnn.program.PATIENCE", 0.1)
    monkeypatch.setattr("nvcnn.program.abort", lambda code: ended.set())

    class Never:
        def __next__(self):
            signal.raise_signal(signal.SIGTERM)
            assert ended.wait(60)
            raise EOFError

    waiting = Run(Settings(model="lenet", conv="torch", batch_size=2), None, Transport(Launch()), None)
    waiting.data = Never()
    with pytest.raises(EOFError):
        waiting.loop()
    assert "ended by a signal while it waited for input, without saving" in capsys.readouterr().err
