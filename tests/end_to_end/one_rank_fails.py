"""launch/train.py, but rank 1 raises in its eleventh step."""

from nvcnn import train
from nvcnn.program import run
from nvcnn.settings import Settings, parse
from nvcnn.step import Step


class Failing(Step):
    def __call__(self, batch):
        if self.transport.rank == 1 and int(self.optimizer.counters[0]) == 10:
            raise RuntimeError("the eleventh step")
        return super().__call__(batch)


if __name__ == "__main__":
    train.Step = Failing
    run(lambda: train.train(parse(Settings)))
