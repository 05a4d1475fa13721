"""What goes to the terminal, which the main process has for itself, and what to the file of each rank."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(levelname)s %(name)s: %(message)s"
OURS = ("train", "hybridlm")  # of others, warnings are enough


def to_terminal(rank: int) -> None:
    """Warnings on stderr, from the main process alone: the others have a file each."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING if rank == 0 else logging.CRITICAL)
    logging.basicConfig(format=FORMAT, handlers=[handler])


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Appends to `path`, with the time, what this rank does and warns of, and what ended it, with the traceback."""
    path.parent.mkdir(parents=True, exist_ok=True)  # where run_dir is not shared, only the main process has it
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {FORMAT}"))
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in OURS}
    root.addHandler(handler)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        logging.getLogger(__name__).info("ended by %s", type(error).__name__, exc_info=error)
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
