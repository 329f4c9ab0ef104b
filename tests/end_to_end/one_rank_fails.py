"""launch/train.py, but rank 1 raises in its eleventh step."""

from nvcnn import train
from nvcnn.program import run
from nvcnn.settings import parse


class Failing(train.Run):
    def train_step(self, batch):
        if self.transport.rank == 1 and self.step == 10:
            raise RuntimeError("the eleventh step")
        return super().train_step(batch)


if __name__ == "__main__":
    train.Run = Failing
    run(lambda: train.train(parse()))
