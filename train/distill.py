"""python -m train distill --config F [--section.field V …]: trains from a teacher; with --write_logits DIR, writes down what the
teacher says of the run's samples, for `distill.logits`."""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hybridlm.data.blend import Blend
from hybridlm.ops.distillation import largest
from train.command_line import argument_parser, parse_command_line
from train.config import dump
from train.distillation import Teacher, open_teacher
from train.loop import train
from train.optim import samples_by
from train.settings import RunConfig
from train.setup import open_data, open_tokenizer
from train.tensor_files import fingerprint, part
from train.top_logits import id_type, samples_per_file, write


def main(argv: list[str]) -> int:
    parser = argument_parser()
    parser.prog = "python -m train distill"
    parser.description = "Train a model from a teacher; all as in training, but for the loss."
    parser.add_argument(
        "--write_logits", metavar="DIR", type=Path,
        help="train nothing: write the distill.top_k largest logits of distill.teacher for every sample of the run into DIR,\n"
        "from which distill.logits then trains",
    )  # fmt: skip
    config, arguments = parse_command_line(argv, parser, RunConfig)
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    if arguments.write_logits is not None:
        return write_logits(config, arguments.write_logits)
    if config.distill.teacher is None and config.distill.logits is None:
        raise ValueError(
            "there is nothing to distil from: set distill.teacher (a model folder or hub name), or distill.logits (a folder that "
            "--write_logits made), in the file or as --distill.teacher."
        )
    train(config, arguments.resume, arguments.allow_config_change)
    return 0


def write_logits(config: RunConfig, folder: Path) -> int:
    """
    Raises:
        ValueError: no teacher, data without sample numbers, more than one process, or a folder of something else.
    """
    distill, wanted = config.distill, samples_by(config, config.train.steps)
    if distill.teacher is None:
        raise ValueError("--write_logits needs the model that makes them; set distill.teacher.")
    if config.data.streaming:
        raise ValueError("--write_logits: of a stream (data.streaming) no sample is found again by its number; prepare the data.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--write_logits works in one process; start it without a launcher.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = open_tokenizer(config, None)
    teacher = open_teacher(config, None, tokenizer, device)
    vocab_size, seq_len = len(teacher.weight), config.data.seq_len
    k, rows = min(distill.top_k, vocab_size), config.train.micro_batch or config.train.global_batch
    stream, _ = open_data(config, tokenizer, vocab_size, quiet=False)
    assert isinstance(stream, Blend)
    plan = {
        "samples": wanted, "samples_per_file": samples_per_file(seq_len, k, vocab_size), "seq_len": seq_len, "top_k": k,
        "temperature": distill.temperature, "vocab_size": vocab_size, "data": stream.identity(wanted), "teacher": distill.teacher,
        "fingerprint": weights_of(teacher), "precision": config.train.precision, "rows": rows,
    }  # fmt: skip

    try:
        write(folder, plan, partial(said, config, teacher, stream, k))
    except KeyboardInterrupt:
        print("interrupted; finished files are kept, and the same command goes on", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {k} logits of each of {wanted * config.data.seq_len:,} positions, {size:,} bytes")
    print(f"next: the same command with --distill.logits {folder} --distill.teacher null in the place of --write_logits")
    return 0


def said(config: RunConfig, teacher: Teacher, stream: Blend, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
    """The `k` largest log-probabilities of samples start … stop - 1, as they are kept."""
    device = teacher.weight.device
    batch = {name: torch.from_numpy(array).to(device) for name, array in stream.batch(start, stop).items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision != "fp32"):
        found = largest(teacher(batch)[0], k, config.distill.temperature)
    ids: np.ndarray = found.ids.cpu().numpy().astype(id_type(len(teacher.weight)))
    return {"ids": ids, "log_probs": found.log_probs.half().cpu().numpy()}


def weights_of(teacher: Teacher) -> str:
    tensors = teacher.model.state_dict() | {"head": teacher.weight}
    return fingerprint({name: part(tensor) for name, tensor in tensors.items()}, None)
