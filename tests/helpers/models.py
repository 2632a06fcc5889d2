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
        case "mistral":
            return tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA_LIKE, sliding_window=None))
        case "qwen2":
            return tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA_LIKE))
        case "gemma":
            return tf.GemmaForCausalLM(tf.GemmaConfig(**_LLAMA_LIKE, head_dim=8))
        case "gemma2":
            return tf.Gemma2ForCausalLM(tf.Gemma2Config(**_LLAMA_LIKE, head_dim=8))
        case "roberta":
            return tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT_LIKE))
        case "distilbert":
            return tf.DistilBertForMaskedLM(
                tf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=2, vocab_size=64)
            )
        case "gpt2-cross":
            return tiny_gpt2(add_cross_attention=True)
        case "t5-plain":
            return tf.T5ForConditionalGeneration(
                tf.T5Config(
                    d_model=32,
                    d_kv=8,
                    d_ff=48,
                    num_layers=2,
                    num_heads=4,
                    vocab_size=64,
                    feed_forward_proj="gelu",
                    decoder_start_token_id=0,
                )
            )
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
