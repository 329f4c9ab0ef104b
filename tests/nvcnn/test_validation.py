"""All ranks go through an evaluation together. What it leaves of training is tested where that is, in test_train.py."""

import pytest

from nvcnn.distributed import Transport
from nvcnn.program import Launch, Signals
from nvcnn.validation import UntilStopped


@pytest.mark.parametrize(("mine", "signal", "seen"), [(3, None, 3), (1, None, 1), (9, 1, 2), (0, 0, 0)])
def test_all_ranks_vote_until_the_one_with_most_batches_is_done_or_a_signal_comes(mine, signal, seen):
    """Each rank must vote as often as the others, whatever it has to read."""
    votes, signals = [], Signals()

    class Counting(Transport):
        def all_reduce(self, tensor, name):
            votes.append(name)
            return lambda: None

    batches = UntilStopped(range(mine), max(mine, 3), Counting(Launch()), signals)
    if signal == 0:
        signals.append(15)
    found = []
    for batch in batches:
        found.append(batch)
        if batch == (signal or 1) - 1 and signal:
            signals.append(15)
    assert (len(found), batches.stopped) == (seen, signal is not None)
    assert len(votes) == (max(mine, 3) if signal is None else 2)
