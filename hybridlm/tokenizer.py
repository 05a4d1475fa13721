"""The byte tokenizer: 256 bytes and two specials, as an ordinary fast tokenizer that AutoTokenizer loads anywhere."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END, PAD = "<|endoftext|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i; 256 ends a document, 257 pads. No merges, so no training and any text at all."""
    backend = Tokenizer(models.BPE(vocab={character: byte for byte, character in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return with_specials(backend)


def with_specials(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with its decoder, and behind its tokens the one that ends a document and the one that pads."""
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
