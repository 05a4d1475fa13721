"""`python -m eval …`: exit 0 done, 2 usage or bad input (one line on stderr), 1 failure, 130 stopped by Ctrl-C."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridlm.arguments import HelpFormatter, json_file, memory, names, seed, size, sizes

RESULTS = "perplexity, accuracy, longcontext, throughput"

# What each command does is imported when it is called: torch takes seconds, and --help and a typo should not.


def perplexity(args: argparse.Namespace) -> None:
    from eval.perplexity import COLUMNS, evaluate

    rows = evaluate(
        args.model, args.data, args.window, stride=args.stride, carry=args.carry, batch_size=args.batch,
        max_bytes=args.max_bytes, seed=args.seed, json_path=args.json,
    )  # fmt: skip
    output(rows[0] if len(rows) == 1 else rows, rows, COLUMNS, args.json)


def accuracy(args: argparse.Namespace) -> None:
    from eval.accuracy import COLUMNS, evaluate, table_rows

    objects = evaluate(
        args.model, args.tasks, limit=args.limit, shots=args.shots, batch_size=args.batch, seed=args.seed,
        run_code=args.run_code, json_path=args.json,
    )  # fmt: skip
    output(objects[0] if len(objects) == 1 else objects, table_rows(objects), COLUMNS, args.json)


def throughput(args: argparse.Namespace) -> None:
    from eval.roofline import Assumptions
    from eval.throughput import COLUMNS, OutOfMemory, beside_twin, estimates_table, evaluate

    if args.gpu is None and args.gpus != 1:
        raise ValueError("--gpus is for the estimate of --gpu; give both.")
    assumed = None if args.gpu is None else Assumptions(gpu=args.gpu, gpus=args.gpus)
    fault = None
    try:
        rows = evaluate(
            args.model, args.prompt, args.new, args.batch, repeats=args.repeats, twin=not args.no_twin, memory=args.memory,
            assumed=assumed, seed=args.seed, json_path=args.json,
        )  # fmt: skip
    except OutOfMemory as error:
        rows, fault = error.rows, error
    output(rows, beside_twin(rows), COLUMNS, args.json, finished=fault is None)
    if assumed is not None and args.json != "-":
        print(f"\n{estimates_table(rows, assumed)}")
    if fault is not None:
        raise fault


def longcontext(args: argparse.Namespace) -> None:
    from eval.longcontext import COLUMNS, draw, evaluate

    rows = evaluate(
        args.model, args.tasks, args.lengths, args.depths, args.questions, batch_size=args.batch, seed=args.seed,
        json_path=args.json,
    )  # fmt: skip
    if args.plot is not None:
        draw(rows, args.plot)
    output(rows, rows, COLUMNS, args.json)


def recall_texts(args: argparse.Namespace) -> None:
    from eval.longcontext import write_documents

    write_documents(args.out, args.tasks, args.length, args.documents, args.tokenizer, args.seed)


def roofline(args: argparse.Namespace) -> None:
    from eval.roofline import PAPER_COLUMNS, beside_the_paper

    rows = beside_the_paper()
    output(rows, rows, PAPER_COLUMNS, args.json)


def report(args: argparse.Namespace) -> None:
    from eval.report import report

    print(report([Path(run) for run in args.run], args.model, args.results, args.prompt, args.out))


def compare(args: argparse.Namespace) -> None:
    from eval.compare import COLUMNS, compare, measure, notes, table_rows
    from eval.results import read_results

    if args.results:
        results = read_results(args.results)
    else:
        results = measure(args.a, args.b, args.data, args.window, args.max_bytes, args.prompt, args.new, args.json)
    content = compare(args.a, args.b, results, args.seed)
    output(content, table_rows(content["rows"]), COLUMNS, args.json)
    if args.json != "-":
        print("\n" + notes(content))


def bench(args: argparse.Namespace) -> None:
    from eval.bench import command

    command(args.json, args.only, args.repeats, args.long)


def gpu_check(args: argparse.Namespace) -> None:
    from eval.gpu_check import COLUMNS, FP8_COLUMNS, check
    from eval.output import rows_table

    content = check()
    output(content, content["rows"], COLUMNS, args.json)
    if args.json != "-":
        fp8 = content["fp8"]
        print("\n" + (fp8.get("refused") or f"fp8: {fp8['layers']}\n{rows_table(fp8['rows'], FP8_COLUMNS)}"))


def output(content: object, rows: list[dict], columns: dict[str, str], json_path: str | None, *, finished: bool = True) -> None:
    from eval.output import rows_table
    from hybridlm.output import write_json

    if json_path is not None:
        write_json(content, json_path)
        if finished:
            Path(f"{json_path}.partial.jsonl").unlink(missing_ok=True)  # nothing is left to go on with
    if json_path != "-":
        print(rows_table(rows, columns))


def depths(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= depth <= 1 for depth in found):
        raise argparse.ArgumentTypeError(f"must be numbers from 0 to 1; got {text!r}")
    return found


def png_file(text: str) -> str:
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png; got {text!r}")
    return json_file(text)


def count(text: str) -> int:
    return 0 if text == "0" else size(text)


def window(text: str) -> int | None:
    return None if text == "document" else size(text)


def batches(text: str) -> list:
    return [text] if text == "fit" else sizes(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Evaluates models that `python -m train` wrote, or any.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", nargs="+", required=True, metavar="DIR", help="model folder(s), or names on the hub")
    model.add_argument(
        "--json", type=json_file, metavar="PATH",
        help="write the figures there; - prints them, and no table. A command with a PATH that was stopped goes on when repeated",
    )  # fmt: skip
    model.add_argument("--seed", type=seed, default=0, metavar="S", help="of whatever is drawn at random")

    def command(name: str, run: Callable, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        about: dict[str, Any] = {"help": text.split(":")[0], "description": text}
        sub = commands.add_parser(name, **about, parents=parents, formatter_class=HelpFormatter, allow_abbrev=False)
        sub.set_defaults(run_command=run)
        return sub

    sub = command(
        "perplexity",
        perplexity,
        "perplexity and bits per byte on text: each document is cut into windows of N predictions from N+1 tokens, N apart, or "
        "less with --stride; no special token is added. The standard error is a bootstrap's over documents. JSON: an object for "
        "one model, a list of such objects for several; in it the loss by length of context, too.",
        model,
    )
    sub.add_argument(
        "--data", required=True, metavar="SOURCE|FILE",
        help="stdlib, a text file, a folder of them, JSONL, Parquet, … or a dataset on the hub (column `text`); "
        "its validation split where it has one, else its training split",
    )  # fmt: skip
    sub.add_argument(
        "--window", type=window, default=1024, metavar="N", help="predictions in one window; document: each document is one"
    )
    sub.add_argument("--stride", type=size, metavar="N", help="slide the window by N, less than its length: each keeps a context")
    sub.add_argument("--carry", action="store_true", help="start each window from the state in which the one before it ended")
    sub.add_argument("--batch", type=size, default=8, metavar="N", help="windows in one pass; --carry runs one at a time")
    sub.add_argument("--max-bytes", type=size, metavar="N", help="take whole documents, in order, until they have N bytes")

    sub = command(
        "accuracy",
        accuracy,
        "share of questions answered right: on any task of lm-evaluation-harness (pip install '.[eval]'), with the scores of its "
        "own command. A model of this library reads the context of several answers once. JSON: an object for one model, a list "
        "of such objects for several; in it the outcome of each question, too.",
        model,
    )
    sub.add_argument(
        "--tasks", type=names, required=True, metavar="NAME,…",
        help="presets (base, smoke), tasks or groups of lm_eval, YAML files; smoke needs no network",
    )  # fmt: skip
    sub.add_argument("--limit", type=size, metavar="N", help="the first N questions of each task")
    sub.add_argument(
        "--shots", type=count, metavar="N", help="solved examples before each question; else the preset's or the task's"
    )
    sub.add_argument("--batch", type=size, default=8, metavar="N", help="questions in one pass")
    sub.add_argument("--run-code", action="store_true", help="let tasks such as humaneval execute what the model writes")

    sub = command(
        "throughput",
        throughput,
        "speed and memory of generation: greedy, with random tokens as the prompt; a hybrid beside a Transformer of the same "
        "width, depth and size with random weights. All models take turns; medians. fp32 on a CPU, bf16 on a GPU. Each model and "
        "shape has a process of its own; its peak memory is over what that process had before the model.",
        model,
    )
    sub.add_argument("--prompt", type=sizes, default="1024", metavar="N,…", help="prompt lengths, in tokens")
    sub.add_argument("--new", type=sizes, default="128", metavar="N,…", help="tokens to generate")
    sub.add_argument(
        "--batch", type=batches, default="1", metavar="N,…|fit", help="sequences at a time; fit: as many as --memory has room for"
    )
    sub.add_argument("--memory", type=memory, metavar="16G", help="bytes of each model with its caches, for --batch fit")
    sub.add_argument("--repeats", type=size, default=3, metavar="N", help="timed requests, after one untimed")
    sub.add_argument("--no-twin", action="store_true", help="leave the Transformer out")
    sub.add_argument("--gpu", metavar="H100", help="add what this GPU could do, by its data sheet (see roofline)")
    sub.add_argument("--gpus", type=size, default=1, metavar="N", help="GPUs of that estimate")

    sub = command(
        "longcontext",
        longcontext,
        "recall over length and depth: questions about texts that are made on the spot, the same for every model, answered "
        "greedily. Right is the answer itself and nothing that goes on; of variables, the share of the names that is found. "
        "Tasks: passkey, needle, variables, phonebook, mqar, copying.",
        model,
    )
    sub.add_argument("--tasks", type=names, default="passkey,phonebook", metavar="TASK,…", help="what is asked")
    sub.add_argument("--lengths", type=sizes, default="256,1024", metavar="N,…", help="tokens of a question with its answer")
    sub.add_argument(
        "--depths", type=depths, default="0,0.5,1", metavar="X,…",
        help="where the asked fact stands, from 0, the beginning, to 1; variables and copying have it everywhere",
    )  # fmt: skip
    sub.add_argument("--questions", type=size, default=20, metavar="N", help="for each length and depth")
    sub.add_argument("--batch", type=size, default=8, metavar="N", help="questions in one pass, all of one length")
    sub.add_argument("--plot", type=png_file, metavar="PATH", help="heat maps there, and the table beside them as .md")

    sub = command(
        "recall-texts",
        recall_texts,
        "texts of the tasks of longcontext, with their answers, for `python -m train` to train on: JSONL, a text a line. They "
        "are other ones than are asked there.",
    )
    sub.add_argument("--tasks", type=names, required=True, metavar="TASK,…", help="of longcontext, taken in turn")
    sub.add_argument("--out", type=json_file, required=True, metavar="PATH", help="the .jsonl file")
    sub.add_argument("--length", type=size, default=256, metavar="N", help="tokens that a text has at most")
    sub.add_argument("--documents", type=size, default=10000, metavar="N", help="texts")
    sub.add_argument("--tokenizer", default="bytes", metavar="DIR", help="bytes, or a folder or hub name")
    sub.add_argument("--seed", type=seed, default=0, metavar="S", help="of whatever is drawn at random")

    sub = command(
        "roofline",
        roofline,
        "the paper's throughput by arithmetic: what H100s could do with Nemotron-H and with the Transformers that it is compared "
        "with, by their data sheets, beside what was published. Nothing is run.",
    )
    sub.add_argument("--json", type=json_file, metavar="PATH", help="write the figures there; - prints them, and no table")

    sub = command(
        "report",
        report,
        "a page on runs, models and results: what was learned, accuracy and speed side by side, samples, settings. One file that "
        "opens without a network; its tables and pictures lie beside it.",
    )
    sub.add_argument("--run", nargs="+", default=[], metavar="RUN", help="run directories of `python -m train`")
    sub.add_argument("--model", nargs="+", default=[], metavar="DIR", help="model folders beside those of the runs")
    sub.add_argument("--results", nargs="+", default=[], metavar="FILE", help=f"what other commands wrote with --json: {RESULTS}")
    sub.add_argument("--out", metavar="DIR", help="where to; by default RUN/report of a single run, else runs/report")
    sub.add_argument(
        "--prompt", type=sizes, default="256,1024,4096", metavar="N,…",
        help="prompt lengths to time, in tokens, of models whose speed is not among the results",
    )  # fmt: skip

    sub = command(
        "compare",
        compare,
        "which of two models is better on what: paired tests with intervals, corrected together, of results written with --json; "
        "without --results, perplexity and speed are measured here, the two in turns.",
    )
    sub.add_argument("a", metavar="A", help="model folder, or the name that the results have")
    sub.add_argument("b", metavar="B", help="the other")
    sub.add_argument("--results", nargs="+", default=[], metavar="FILE", help=f"files of: {RESULTS}")
    sub.add_argument("--data", default="stdlib", metavar="SOURCE", help="text to score, as of perplexity, without --results")
    sub.add_argument("--window", type=window, default=1024, metavar="N", help="predictions in one window, as of perplexity")
    sub.add_argument("--max-bytes", type=size, default=2**20, metavar="N", help="of text to score: whole documents")
    sub.add_argument("--prompt", type=sizes, default="256,1024,4096", metavar="N,…", help="prompt lengths to time, in tokens")
    sub.add_argument("--new", type=size, default=32, metavar="N", help="tokens to generate after each")
    sub.add_argument("--seed", type=seed, default=0, metavar="S", help="of the draws of bootstrap and tests")
    sub.add_argument("--json", type=json_file, metavar="PATH", help="write the figures there; - prints them, and no table")

    sub = command(
        "bench",
        bench,
        "the yardstick: training, prefill and decode of one hybrid on the CPU, beside stock transformers with the same weights, "
        "two Transformers of its size, and what the machine can do. Shapes are frozen; each contender has a process of its own, "
        "all take turns; medians.",
    )
    sub.add_argument(
        "--only",
        type=names,
        metavar="ROW,…",
        help="these rows alone: train-fp32, train-bf16, prefill-4096, prefill-16384, decode-fp32, decode-bf16, request-65536",
    )
    sub.add_argument("--repeats", type=size, default=3, metavar="N", help="timed turns, after one untimed")
    sub.add_argument("--long", action="store_true", help="also a prompt of 65,536 and 1,024 tokens after it")
    sub.add_argument(
        "--json", type=json_file, metavar="PATH", help="write the figures there; by default a new file in runs/bench"
    )

    sub = command(
        "gpu-check",
        gpu_check,
        "speed of the fused operators on a CUDA device: a hybrid of 1B parameters beside its Transformer twin and beside stock "
        "transformers, in training (4 x 4,096 tokens, bf16 autocast) and generation, in turns; medians. Then it is trained in "
        "FP8 beside bf16, where FP8 runs.",
    )
    sub.add_argument("--json", type=json_file, metavar="PATH", help="write the figures there; - prints them, and no table")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from hybridlm.auto import register_hybridlm  # before transformers: it filters out what torchao says when that imports it

    register_hybridlm()
    try:
        args.run_command(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ArithmeticError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        if (saved := Path(f"{getattr(args, 'json', None)}.partial.jsonl")).exists():
            print(f"The results so far are in {saved}; the same command goes on from there.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
