"""Fine-tune to 50% zeros with TRL's SFTTrainer; `register()` adds `adamw_lp` to its `--optim`.

    python examples/sft_trl.py --output_dir out
    python examples/sft_trl.py --model_name_or_path MODEL --dataset_name DATASET --learning_rate 1e-4 --output_dir out

Without a model and a data set it trains a small Llama on the topics of Python's help, without a network. TRL's own
scripts need no change: `hf-pdecay run trl/scripts/sft.py --optim adamw_lp --optim_args target_sparsity=0.5 …`.
"""

import pydoc_data.topics
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

import hf_pdecay


def small(data: Dataset, seed: int) -> tuple[Any, Any]:
    """Return a Llama of about 0.5 M parameters, and a tokenizer of 1000 word pieces made from the data."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(data["text"], trainers.BpeTrainer(vocab_size=1000, special_tokens=["<pad>", "</s>"]))
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    """Train and save."""
    hf_pdecay.register()  # before the arguments are parsed
    parser = TrlParser([ScriptArguments, SFTConfig, ModelConfig])  # type: ignore[list-item]
    parser.set_defaults(optim="adamw_lp", optim_args="p_norm=0.8,target_sparsity=0.5", bf16=torch.cuda.is_available())
    parser.set_defaults(max_steps=200, learning_rate=1e-3, report_to="none")
    script, args, model_config = parser.parse_args_and_config()
    if script.dataset_name:
        data = load_dataset(script.dataset_name, name=script.dataset_config)[script.dataset_train_split]
    else:
        topics = pydoc_data.topics.topics.values()
        data = Dataset.from_dict({"text": [text for topic in topics for text in topic.split("\n\n") if len(text) > 40]})
    model, tokenizer = model_config.model_name_or_path, None
    if model is None:
        model, tokenizer = small(data, args.seed)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
