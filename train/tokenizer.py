"""python -m train tokenizer --source SOURCE --out DIR --vocab_size N: a byte-level BPE of one's own."""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hybridlm.data.parts import batches, pieces
from hybridlm.data.shards import tokenize
from hybridlm.data.sources import Documents, split_source
from hybridlm.tokenizer import END, PAD, with_specials
from train.prepare import source_of, source_parser

SPECIALS = (END, PAD)
BYTES = 256
# What a token may lie within: a word with what is before it, one digit, signs, line ends, other white space. Digits alone make
# numbers of any length look alike to the model.
STRETCH = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main(argv: list[str]) -> int:
    parser = source_parser("tokenizer", "Train a byte-level BPE on the training documents of a source; AutoTokenizer opens it.")
    parser.add_argument("--vocab_size", metavar="N", type=int, required=True, help="tokens in all: bytes, merges, two specials")
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ValueError(f"--out {arguments.out} exists and is not an empty folder; give another.")
    training, held_out = split_source(source_of(arguments), None, arguments.val_fraction)
    tokenizer = train_tokenizer(training, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {len(tokenizer):,} tokens, {bytes_per_token(held_out, tokenizer):.3f} bytes per held-out token")
    if len(tokenizer) < arguments.vocab_size:
        print(f"{training.name} has no more pairs to merge, so there are fewer than --vocab_size {arguments.vocab_size:,}")
    print(f"next: python -m train prepare --source {arguments.source} --tokenizer {arguments.out} --out DIR")
    return 0


def train_tokenizer(documents: Documents, vocab_size: int) -> PreTrainedTokenizerFast:
    """The same for the same documents: the 256 bytes, then merges, most frequent first, then the specials of the byte tokenizer.

    Raises:
        ValueError: a vocabulary that has no room for the bytes.
    """
    if vocab_size < BYTES + len(SPECIALS):
        raise ValueError(f"--vocab_size must be at least {BYTES + len(SPECIALS)}, the bytes and two specials; got {vocab_size}.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(STRETCH), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for text in tqdm(documents, desc=f"reading {documents.name}", total=len(documents), unit=" documents"):
            yield from pieces(text)

    backend.train_from_iterator(texts(), trainer)
    return with_specials(backend)


def bytes_per_token(documents: Documents, tokenizer: PreTrainedTokenizerFast) -> float:
    size = tokens = 0
    for batch in batches((piece, 0) for text in documents for piece in pieces(text)):
        texts = [piece for piece, _ in batch]
        size += sum(len(text.encode()) for text in texts)
        tokens += sum(map(len, tokenize(texts, tokenizer)))
    return size / max(1, tokens)  # a held-out document may be empty
