"""What goes to the terminal, which the main process has for itself, and what to the file of each rank."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(levelname)s %(name)s: %(message)s"
OURS = ("train", "hybridlm")  # of others, warnings are enough


def to_terminal() -> None:
    """Warnings on stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(format=FORMAT, handlers=[handler])


@contextmanager
def to_file(path: Path, rank: int) -> Iterator[None]:
    """Appends to `path`, with the time, what this rank does and warns of, and what ended it, with the traceback. Meanwhile only
    the main process warns on the terminal too."""
    path.parent.mkdir(parents=True, exist_ok=True)  # where run_dir is not shared, only the main process has it
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {FORMAT}"))
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in OURS}
    silenced = {other: other.level for other in root.handlers} if rank else {}
    for other in silenced:
        other.setLevel(logging.CRITICAL)
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
        for other, level in silenced.items():
            other.setLevel(level)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
