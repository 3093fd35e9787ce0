"""Stop strings over a byte-level tokenizer, one token or several at a time."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxgrpo.samplers.native.stops import StopFinder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 single bytes, then tokens of several: `</`, `call`, `>\\n`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {
        "</": 256,
        "ca": 257,
        "ll": 258,
        "call": 259,
        ">Ċ": 260,
    }
    merges = [("<", "/"), ("c", "a"), ("l", "l"), ("ca", "ll"), (">", "Ċ")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = byte_tokenizer()


def _bytes_of_alphabet() -> dict[int, int]:
    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # the byte-level alphabet of GPT-2
    others = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return {b: TOKENIZER.convert_tokens_to_ids(s) for b, s in symbol.items()}


BYTE_OF = _bytes_of_alphabet()


@pytest.mark.parametrize("width", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("ids", "stop", "end"),
    [
        (
            [BYTE_OF[b] for b in b"ab"] + [256, 259, 260] + [BYTE_OF[b] for b in b"xy"],
            "</call>",
            5,
        ),  # `</` `call` `>\n`
        (
            [BYTE_OF[b] for b in "né→x→é.".encode()],
            "→é",
            12,
        ),  # characters of two and three bytes, one token a byte
        (
            [BYTE_OF[b] for b in "aé".encode()[:2]] + [BYTE_OF[b] for b in b"stop!"],
            "stop",
            6,
        ),  # a broken character before it
        ([BYTE_OF[b] for b in b"ststop"], "stop", 6),
        ([BYTE_OF[b] for b in b"a"], "a", 1),
        ([BYTE_OF[b] for b in b"nothing of it"], "stop", None),
    ],
)
def test_stop_strings_over_tokens_and_split_characters(
    ids: list[int], stop: str, end: int | None, width: int
):
    finder, taken = StopFinder(TOKENIZER, ("unused", stop)), 0
    for start in range(0, len(ids), width):
        found = finder.push(ids[start : start + width])
        if found is not None:
            taken += found
            break
        taken += len(ids[start : start + width])
    assert (taken if found is not None else None) == end
