"""What the reader of a snippet has already: a checkpoint with its tokenizer, a model of his own."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_fx.cli.tiny import tiny_model

MY_MODEL = """\
import torch
from moe_fx.cli.tiny import tiny_model


def factory():
    return tiny_model("qwen3_moe"), [torch.arange(8)[None]]
"""


def save_checkpoint(folder: Path, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """A small Qwen3-MoE and its tokenizer; returns what it makes of each prompt.

    Its end of text is a token that comes early after the first prompt, and later or never after
    each other one: ranks that generate from these are not done at the same step.
    """
    letters = string.printable[:95]  # a token each
    tokenizer = _tokenizer(letters)
    model = tiny_model("qwen3_moe", vocab_size=len(letters))
    endless = [_continuation(model, tokenizer, prompt, new_tokens) for prompt in prompts]
    end = next(
        token
        for token in endless[0][: new_tokens // 2]
        if all(token not in other[: new_tokens // 2] for other in endless[1:])
    )
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ended = [_continuation(model, tokenizer, prompt, new_tokens) for prompt in prompts]
    assert all(len(ended[0]) < len(other) for other in ended[1:])
    return [tokenizer.decode(tokens) for tokens in ended]


def _tokenizer(letters: str) -> PreTrainedTokenizerFast:
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int
) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return whole[0, inputs["input_ids"].shape[1] :].tolist()
