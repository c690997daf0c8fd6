"""A tokenizer and models small enough to be made in every test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(
    chat_template: str | None = CHATML, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte: ids 0-2 are SPECIAL, then 256 bytes. Pad and end of sequence coincide."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(
    vocab: int = 259,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = False,
    context: int = 512,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Random float32 Llama with 4 query and 2 key-value heads, in eval mode."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # far from uniform predictions, so that errors show
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def save_sampled_model(folder: Path) -> None:
    """Save a model whose random completions end, with its tokenizer.

    Many tokens end a completion, and the head is scaled up: else it could not tell tokens apart,
    whatever is learnt.
    """
    model = tiny_llama()
    model.lm_head.weight.data *= 4
    model.generation_config.eos_token_id = [2, *range(40, 60)]
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
