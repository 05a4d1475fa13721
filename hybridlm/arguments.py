"""What the command lines of `python -m hybridlm` and `python -m eval` are made of."""

import argparse
import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def size(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def sizes(text: str) -> list[int]:
    return [size(part) for part in text.split(",")]


def memory(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(G|GiB|GB)", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be a number with G or GiB (2^30 bytes) or GB (10^9), such as 80G; got {text!r}")
    return float(found[1]) * (10**9 if found[2] == "GB" else 2**30)


def seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1; got {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def probability(text: str) -> float:
    if (value := positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got {text!r}")
    return value


def names(text: str) -> list[str]:
    return text.split(",")


def json_file(text: str) -> str:
    if text != "-" and (not Path(text).absolute().parent.is_dir() or Path(text).is_dir()):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, or - for stdout; got {text!r}")
    return text


def check_names(kind: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    """
    Raises:
        ValueError: one that is not known; the nearest that is known is named.
    """
    known = list(known)
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no {kind} {name!r}.{hint} There are: {', '.join(known)}.")
