"""python -m train prepare --source SOURCE --out DIR: tokens on disk, once for many runs."""

import argparse
import sys
import time
from pathlib import Path

from hybridlm.checkpoint import load_tokenizer
from hybridlm.data.preparation import prepare_folder
from hybridlm.data.shards import Shards
from hybridlm.data.sources import Source, split_source
from hybridlm.output import scaled, table
from hybridlm.tokenizer import byte_tokenizer

PER_SECOND = (" B/s", " kB/s", " MB/s", " GB/s")


def main(argv: list[str]) -> int:
    parser = source_parser(
        "prepare", "Tokenise a source into a folder that data.source takes. Cut off, the same command goes on."
    )
    parser.add_argument("--tokenizer", metavar="T", default="bytes", help="folder or hub name of a tokenizer (default: bytes)")
    parser.add_argument("--val_source", metavar="S", help="validation; default: the source's own, else --val_fraction of it")
    parser.add_argument("--license", metavar="L", help="noted as the licence; default: what the dataset says of itself")
    parser.add_argument("--bad_documents", choices=("stop", "skip"), default="stop", help="what cannot be read (default: stop)")
    parser.add_argument("--workers", metavar="N", type=int, help="processes (default: one a core)")
    arguments = parser.parse_args(argv)
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1; got {arguments.workers}.")
    source, columns = source_of(arguments), {"text_column": arguments.text_column, "template": arguments.template}
    val_source = None if arguments.val_source is None else Source(arguments.val_source, **columns)
    tokenizer = byte_tokenizer() if arguments.tokenizer == "bytes" else load_tokenizer(arguments.tokenizer)
    begun = any(arguments.out.glob(".*-*/parts/*.json"))  # then the time is not that of all of it
    there = [split for split in ("train", "validation") if (arguments.out / split / "meta.json").exists()]
    begin = time.perf_counter()
    try:
        both = prepare_folder(
            split_source(source, val_source, arguments.val_fraction), tokenizer, arguments.out,
            arguments.bad_documents, arguments.workers,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, and the same command goes on", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - begin
    parts = dict(zip(("train", "validation"), both))
    new = sum(shards.meta["bytes"] for split, shards in parts.items() if split not in there)
    for split in there:
        parts[split].verify()
        print(f"{arguments.out / split} was there already: every file has the sha256 that it was written with")
    print(summary(parts))
    if new and not begun:
        print(f"\n{scaled(new / seconds, PER_SECOND)} over {seconds:.1f} s")
    print(f"next: python -m train --config CONFIG --data.source {arguments.out} --data.tokenizer {arguments.out / 'tokenizer'}")
    return 0


def source_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The flags of a command that makes a folder of a source."""
    parser = argparse.ArgumentParser(prog=f"python -m train {command}", description=description, allow_abbrev=False)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write")
    parser.add_argument("--source", metavar="S", required=True, help="as data.source: stdlib, a file, a folder, a hub dataset")
    parser.add_argument("--val_fraction", metavar="F", type=float, default=0.1, help="share held out of it (default: 0.1)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text_column", metavar="C", default="text", help="column of the text (default: text)")
    text.add_argument("--template", metavar="T", help="the text of several columns: '{question} {answer}'")
    parser.add_argument("--revision", metavar="R", help="commit, tag or branch of a hub dataset")
    return parser


def source_of(arguments: argparse.Namespace) -> Source:
    """
    Raises:
        ValueError: a share that is none.
    """
    if not 0 < arguments.val_fraction < 1:
        raise ValueError(f"--val_fraction must lie between 0 and 1; got {arguments.val_fraction}.")
    license = getattr(arguments, "license", None)
    return Source(arguments.source, arguments.revision, arguments.text_column, arguments.template, license)


def summary(parts: dict[str, Shards]) -> str:
    """A column for each split."""
    metas = [shards.meta for shards in parts.values()]
    rows = [
        ["", *parts],
        ["documents", *(f"{meta['documents']:,}" for meta in metas)],
        ["tokens", *(f"{meta['tokens']:,}" for meta in metas)],
        ["bytes", *(f"{meta['bytes']:,}" for meta in metas)],
        ["bytes per token", *(f"{meta['bytes'] / max(1, meta['tokens'] - 2 * meta['documents']):.3f}" for meta in metas)],
        ["skipped", *(", ".join(f"{n:,} {reason}" for reason, n in meta["skipped"].items()) or "0" for meta in metas)],
        ["licence", *(meta["license"] or "unknown" for meta in metas)],
        ["fingerprint", *(meta["fingerprint"] for meta in metas)],
    ]
    examples = [f"skipped: {example}" for meta in metas for example in meta["skipped_examples"]]
    return "\n".join([table(rows), *examples])
