"""`python -m train`, but the rank DIES of the first start kills itself in step AT."""

import os
import signal
import sys

import train.__main__
from train.loop import train as run
from train.objective import next_token_loss

calls = 0


def loss(model, batch):
    global calls
    calls += 1
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ["RANK"] == os.environ["DIES"] and calls == int(os.environ["AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return next_token_loss(model, batch)


train.__main__.train = lambda *arguments: run(*arguments, loss=loss)
sys.exit(train.__main__.main(sys.argv[1:]))
