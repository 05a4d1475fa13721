"""`python -m hybridlm …`: exit 0 done, 2 usage or bad input (`error: …` on stderr), 1 failure, 130 stopped by Ctrl-C."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from hybridlm.arguments import HelpFormatter, json_file, memory, positive, probability, seed, size

# What each command does is imported when it is called: torch takes seconds, and --help and a typo should not.


def inspect(args: argparse.Namespace) -> None:
    from hybridlm.cli.inspect import figures, page, read_config, read_plan
    from hybridlm.output import write_json

    config = read_config(args.source)
    given = {name: getattr(args, name) for name in ("precision", "sharding", "recompute", "micro_batch", "seq_len")}
    plan, steps = read_plan(args.source, args.gpus, given)
    content = figures(config, plan, memory=args.memory, steps=steps)
    if args.json is not None:
        write_json(content, args.json)
    if args.json != "-":
        print(page(content))


def generate(args: argparse.Namespace) -> None:
    from hybridlm.cli.generate import generate, read_prompt

    if args.temperature is None and (args.top_k or args.top_p):
        raise ValueError("--top-k and --top-p narrow what is sampled from; without --temperature nothing is. Give it, say 1.")
    generate(
        args.model, read_prompt(args.prompt), args.max_new,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, backend=args.backend, dtype=args.dtype,
    )  # fmt: skip


def verify(args: argparse.Namespace) -> int:
    from hybridlm.cli.verify import compare, page
    from hybridlm.output import write_json

    content = compare(args.model, args.tokens, args.tolerance)
    if args.json is not None:
        write_json(content, args.json)
    if args.json != "-":
        print(page(content))
    return 0 if content["same"] else 1


def doctor(args: argparse.Namespace) -> int:
    from hybridlm.cli.doctor import examine

    text, usable, can_fuse = examine()
    print(text)
    if args.fused and not can_fuse:
        print("error: ops.backend=fused cannot run here; the line `fused` above says why.", file=sys.stderr)
    return 0 if usable and (can_fuse or not args.fused) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hybridlm", description="Looks into a model, runs it, checks it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        about: dict[str, Any] = {"help": text.split(":")[0], "description": text}
        sub = commands.add_parser(name, **about, formatter_class=HelpFormatter, allow_abbrev=False)
        sub.set_defaults(run_command=run)
        return sub

    json_help = "write the figures there; - prints them, and no table"

    sub = command(
        "inspect", inspect,
        "what a model is made of and what it costs: layers, parameters, FLOPs, cache beside its Transformer twin, and memory "
        "in training. From the configuration alone; no weights are read.",
    )  # fmt: skip
    sub.add_argument(
        "source",
        metavar="DIR|CONFIG",
        help="model folder, a name on the hub, a shape file or the config of a run (.yaml), or a config.json",
    )
    whole = "a run's own, else"
    sub.add_argument("--gpus", type=size, default=1, metavar="N", help="GPUs that train together")
    sub.add_argument(
        "--memory", type=memory, metavar="80G",
        help="of one GPU: say whether training fits, and what would make it fit. G and GiB are 2^30 bytes, as in the names of "
        "GPUs (an 80 GB H100 shows 79.6 GiB); GB is 10^9",
    )  # fmt: skip
    sub.add_argument("--precision", choices=("bf16", "fp32", "fp8"), help=f"of the matrix products in training; {whole} bf16")
    sub.add_argument("--sharding", choices=("none", "fsdp2"), help=f"{whole} fsdp2 on several GPUs; none: each has all weights")
    sub.add_argument("--recompute", metavar="KINDS", help="layers, such as M*-, whose activations are computed again in backward")
    sub.add_argument("--seq-len", type=size, metavar="N", help=f"positions of a sequence; {whole} 8192")
    sub.add_argument("--micro-batch", type=size, metavar="N", help=f"sequences in one pass of a GPU; {whole} 1")
    sub.add_argument("--json", type=json_file, metavar="PATH", help=json_help)

    sub = command(
        "generate", generate,
        "continues a text: the continuation goes to stdout as it comes, its speed to stderr. Greedy without --temperature.",
    )  # fmt: skip
    sub.add_argument("model", metavar="DIR", help="model folder, or a name on the hub")
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads stdin")
    sub.add_argument("--max-new", type=size, default=128, metavar="N", help="tokens to generate at most")
    sub.add_argument("--temperature", type=positive, metavar="T", help="sample at this temperature")
    sub.add_argument("--top-k", type=size, metavar="K", help="sample among the K likeliest tokens")
    sub.add_argument("--top-p", type=probability, metavar="P", help="sample among the likeliest tokens that make up P")
    sub.add_argument("--seed", type=seed, metavar="S", help="makes sampling repeatable")
    sub.add_argument("--backend", default="auto", help="operators: auto, eager, fused or naive")
    sub.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on a GPU, fp32 on a CPU")

    sub = command(
        "verify", verify,
        "whether stock transformers gives our logits: both open the folder in fp32 on the CPU, one after the other, and read the "
        "same random tokens and, where there is a tokenizer, a text. Figures are max|ours - stock's| / max|stock's|, with the "
        "lower bound that stock puts on dt lifted; what that bound changes is told apart. Exit 1 past the tolerance.",
    )  # fmt: skip
    sub.add_argument("model", metavar="DIR", help="model folder")
    sub.add_argument("--tokens", type=size, default=512, metavar="N", help="random tokens to read, at least 32")
    sub.add_argument("--tolerance", type=positive, default=1e-4, metavar="X", help="greatest difference that passes")
    sub.add_argument("--json", type=json_file, metavar="PATH", help=json_help)

    sub = command("doctor", doctor, "what this machine has, what is missing, and the command that installs it.")
    sub.add_argument("--fused", action="store_true", help="exit 1 where ops.backend=fused cannot run")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        status = args.run_command(args) or 0
        sys.stdout.flush()
        return status
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head`: nothing more to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
