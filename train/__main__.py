"""python -m train --config FILE [--section.field V …] [--resume auto|never|PATH], and the jobs of COMMANDS"""

import os
import sys
from contextlib import suppress
from time import sleep
from typing import Any, TextIO

from transformers.utils import logging as transformers_logging

from hybridlm.allocator import keep_freed_memory
from train import compress, distill, merge, prepare, status, sweep, tokenizer
from train.command_line import parse_command_line
from train.config import dump
from train.logs import to_terminal
from train.loop import train
from train.ranks import RanksError
from train.settings import RunConfig

LAST_WORD = 5.0  # seconds after which a rank that failed speaks, should the first of its machine not have ended the launch

COMMANDS = {
    "compress": compress.main,
    "distill": distill.main,
    "merge": merge.main,
    "prepare": prepare.main,
    "status": status.main,
    "sweep": sweep.main,
    "tokenizer": tokenizer.main,
}


def main(argv: list[str]) -> int:
    """0: done, or stopped by a signal after saving; 2: bad input; 1: failure."""
    to_terminal()
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # the others of its machine fail for the same reason, as a rule
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        config, arguments = parse_command_line(argv, kind=RunConfig)
        if arguments.print_config:
            print(dump(config), end="")
            return 0
        train(config, arguments.resume, arguments.allow_config_change)
    except RanksError as error:  # each rank says what it knows
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except (ValueError, FloatingPointError, OSError) as error:
        if not first:  # a launcher ends all ranks once one has; what only this rank knows must not be lost
            sleep(LAST_WORD)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:  # before the first step, or a second time
        print("interrupted; the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
        return 1
    return 0


class Lasting:
    """Standard output that may be closed, as by the Ctrl-C that ends `tee` too: that must not cost the checkpoint."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)  # type: ignore[assignment]
    keep_freed_memory()
    sys.exit(main(sys.argv[1:]))
