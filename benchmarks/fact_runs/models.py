"""What is trained: a small GPT-2 from scratch, with a tokenizer of its own, or the last layers of SmolLM2-135M."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import offline_data
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
WORDS = r" ?[\p{L}\p{M}\p{N}'\-]+| ?[^\s\p{L}\p{M}\p{N}]|\s"


class Subject(Protocol):
    """A model before it is trained on a case's texts. Rows are of its blocks, as in the paper, which leaves out
    embeddings and the final norm."""

    @property
    def blocks(self) -> str:
        """Glob of the modules that have rows."""
        ...

    @property
    def context(self) -> int:
        """Tokens of a text at most."""
        ...

    def tokenizer(self, texts: Sequence[str]) -> PreTrainedTokenizerBase:
        """That reads these texts."""
        ...

    def model(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
        """A new one, without dropout."""
        ...


@dataclass(frozen=True)
class FromScratch:
    """A GPT-2 of a token per word, the most frequent first; all words, or so many."""

    width: int
    layers: int
    context: int = 128
    vocabulary: int | None = None

    blocks = "transformer.h.*"

    def tokenizer(self, texts: Sequence[str]) -> PreTrainedTokenizerBase:
        """See :class:`Subject`."""
        split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
        counts = Counter(token for text in texts for token, _ in split.pre_tokenize_str(text))
        words = sorted(counts, key=lambda token: (-counts[token], token))[: self.vocabulary]
        numbers = {token: number for number, token in enumerate([*SPECIAL.values(), *words])}
        tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL["unk_token"]))
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=self.context, clean_up_tokenization_spaces=False, **SPECIAL
        )

    def model(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
        """See :class:`Subject`."""
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=self.context, n_embd=self.width, n_layer=self.layers, n_head=4,
            initializer_range=0.05, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=2, eos_token_id=3, pad_token_id=1,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # which its class name does not tell transformers
        return model


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M, of which the last layers are trained on."""

    layers: int
    context: int = 128

    blocks = "model.layers.*"

    def tokenizer(self, texts: Sequence[str]) -> PreTrainedTokenizerBase:
        """See :class:`Subject`."""
        folder, name = offline_data.smollm2()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def model(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
        """See :class:`Subject`."""
        folder, name = offline_data.smollm2()
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        model.is_quantized, model.hf_quantizer = False, None  # the file was; its weights are ordinary ones now
        model.requires_grad_(False)
        for layer in model.model.layers[-self.layers :]:
            layer.requires_grad_(True)
        return model
