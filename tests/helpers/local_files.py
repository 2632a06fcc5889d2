"""Models with tokenizers and data sets as files, made here: what a script is pointed at in place of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file

from .warm import ROOT, python


WORDS = "the a small red green boat bird runs sings sees on under hill river and not".split()
_CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[number] for number in torch.randint(0, len(WORDS), (8,), generator=generator).tolist())
        for _ in range(count)
    ]


def tokenizer() -> Any:
    """A tokenizer of whole words, by the `tokenizers` library."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", "user", "assistant", *WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.chat_template = _CHAT
    return fast


def llama(folder: Path) -> Path:
    """A Llama of 2 layers × 32 with its tokenizer."""
    torch.manual_seed(0)
    tokens = tokenizer()
    config = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """A BERT of 2 layers × 32 with its tokenizer."""
    torch.manual_seed(0)
    tokens = tokenizer()
    config = tf.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=64,
        pad_token_id=0,
    )
    tf.BertModel(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def json_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def zeros_on_disk(folder: Path, *untrained: str) -> float:
    """Fraction of exact zeros in the matrices that decay, counted from the saved file: no embedding, no head.

    Parts of the names of matrices that get no gradient, which a target leaves alone, keep them out too.
    """
    kept_out = ("embed", "lm_head", *untrained)
    saved = load_file(folder / "model.safetensors").items()
    matrices = [each for name, each in saved if each.ndim == 2 and not any(part in name for part in kept_out)]
    assert len(matrices) >= 12 - len(untrained)
    return sum(int((each == 0).sum()) for each in matrices) / sum(each.numel() for each in matrices)


def run_example(name: str, folder: Path, sparsity: float, *untrained: str) -> None:
    """Run an example on its defaults, but for fewer steps, and check what it saved."""
    script = ROOT / "examples" / f"{name}.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60
    words = ["--output_dir", str(folder), "--max_steps", "20", "--use_cpu", "--report_to", "none"]
    done = python(script, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert abs(zeros_on_disk(folder, *untrained) - sparsity) < 1e-4
