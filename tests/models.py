"""Tiny models of many architectures, built from configs: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn


def tiny_gpt2(**overrides: object) -> nn.Module:
    """GPT-2 of 2 layers × 32 over 64 tokens."""
    torch.manual_seed(0)
    config = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "vocab_size": 64,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **overrides,
    }
    return tf.GPT2LMHeadModel(tf.GPT2Config(**config))


_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_BERT_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def build(name: str) -> nn.Module:
    """Return a tiny model of the named architecture."""
    torch.manual_seed(0)
    match name:
        case "gpt2":
            return tiny_gpt2()
        case "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=False))
        case "qwen3":
            return tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA_LIKE, head_dim=8, tie_word_embeddings=True))
        case "mixtral":
            return tf.MixtralForCausalLM(tf.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4))
        case "bert":
            return tf.BertForMaskedLM(tf.BertConfig(**_BERT_LIKE))
        case "bert-classifier":
            return tf.BertForSequenceClassification(tf.BertConfig(**_BERT_LIKE, num_labels=2))
        case "t5":
            return tf.T5ForConditionalGeneration(
                tf.T5Config(
                    d_model=32,
                    d_kv=8,
                    d_ff=48,
                    num_layers=1,
                    num_heads=2,
                    vocab_size=64,
                    feed_forward_proj="gated-gelu",
                    tie_word_embeddings=False,
                    decoder_start_token_id=0,
                )
            )
        case "modernbert":
            return tf.ModernBertForMaskedLM(
                tf.ModernBertConfig(
                    **{**_BERT_LIKE, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
                    attn_implementation="sdpa",
                )
            )
        case "vit":
            return tf.ViTForImageClassification(
                tf.ViTConfig(
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=16,
                    patch_size=4,
                    num_channels=1,
                )
            )
    raise ValueError(name)


ARCHITECTURES = ("gpt2", "llama", "qwen3", "mixtral", "bert", "bert-classifier", "t5", "modernbert", "vit")
