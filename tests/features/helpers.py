"""Tiny encoders with tokenizers, and embeddings computed the plain way: text by text, by transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = [f"word{number}" for number in range(40)]
TEXTS = [
    "word1 word2 word3.",
    "word4",
    " ".join(WORDS),
    "word5 word6 unknown, word7 word8 word9word10.",
    "word11 word12",
    "word13 word14 word15 word16 word17 word18 word19 word20 word21",
]
SIZES = {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
LENGTH = 24  # tokens at most


def save_checkpoint(folder: Path, kind: str = "bert", layers: int = 5) -> Path:
    """A model of random weights with its tokenizer, as ``save_pretrained`` leaves them; ``kind``: a model_type of transformers."""
    special = ["<s>", "<pad>", "</s>", "[UNK]", "[MASK]"] if kind == "roberta" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *WORDS, ".", ",", *(f"##{word}" for word in WORDS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    torch.manual_seed(1)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(tokens), max_position_embeddings=LENGTH, **SIZES | {"num_hidden_layers": layers}
        )
        tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=LENGTH)
    else:
        cls, sep, pad = ("<s>", "</s>", "<pad>") if kind == "roberta" else ("[CLS]", "[SEP]", "[PAD]")
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ids = [(cls, vocabulary[cls]), (sep, vocabulary[sep])]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}", special_tokens=ids
        )
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, cls_token=cls, sep_token=sep, pad_token=pad, unk_token="[UNK]", mask_token="[MASK]",
            model_max_length=LENGTH, model_input_names=["input_ids", "attention_mask"],
        )  # fmt: skip
        if kind == "roberta":
            config = transformers.RobertaConfig(
                vocab_size=len(tokens), max_position_embeddings=LENGTH + 2, pad_token_id=1, type_vocab_size=1, **SIZES
            )
        else:
            config = transformers.DistilBertConfig(
                vocab_size=len(tokens), max_position_embeddings=LENGTH, n_layers=5, dim=32, n_heads=2, hidden_dim=64
            )
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():  # random weights as they are drawn give texts that hardly differ
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_layers(folder: Path, text, pair=None, length: int = LENGTH) -> tuple[list[np.ndarray], transformers.BatchEncoding]:
    """The hidden states of one text, embeddings first, each (tokens, hidden), by transformers' own class in
    float64."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        text, pair, truncation=True, max_length=length, return_tensors="pt", is_split_into_words=not isinstance(text, str)
    )
    with torch.no_grad():
        return [state[0].numpy() for state in model(**encoded, output_hidden_states=True).hidden_states], encoded


def plain_embedding(layers: list[np.ndarray], pooling: str) -> np.ndarray:
    """What the documentation of ``pooling`` says, in numpy."""
    last = layers[-1]
    return {
        "cls": lambda: last[0],
        "mean": lambda: last.mean(0),
        "max": lambda: last.max(0),
        "last-4": lambda: np.concatenate(layers[-4:], axis=1).mean(0),
    }[pooling]()
