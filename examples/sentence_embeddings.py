"""Train sentence embeddings to 80% zeros with the trainer of sentence-transformers and `--optim adamw_lp`.

    python examples/sentence_embeddings.py --output_dir out
    python examples/sentence_embeddings.py --model MODEL --train_file pairs.jsonl --output_dir out

Rows of the file hold `anchor` and `positive`. Without a model and a file a small BERT learns to find the second half of
a paragraph of Python's help from its first half. All flags of the trainer's arguments work.
"""

import pydoc_data.topics
import tempfile
from dataclasses import dataclass

from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, HfArgumentParser, PreTrainedTokenizerFast, set_seed

import hf_pdecay


@dataclass
class Options:  # noqa: D101
    model: str = ""
    train_file: str = ""


def small(data: Dataset) -> SentenceTransformer:
    """Return a BERT of about 2 M parameters with mean pooling, and a tokenizer made from the data."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(data["positive"], trainers.BpeTrainer(vocab_size=2000, special_tokens=["<pad>"]))
    set_seed(0)
    config = BertConfig(vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", model_max_length=512).save_pretrained(folder)
        return SentenceTransformer(folder)


def main() -> None:
    """Train and save."""
    hf_pdecay.register()  # before the arguments are parsed
    parser = HfArgumentParser([Options, SentenceTransformerTrainingArguments])  # type: ignore[list-item]
    parser.set_defaults(optim="adamw_lp", optim_args="target_sparsity=0.8", max_steps=200, learning_rate=1e-3)
    options, args = parser.parse_args_into_dataclasses()
    texts = [text for topic in pydoc_data.topics.topics.values() for text in topic.split("\n\n") if len(text) > 80]
    rows = [{"anchor": text[: len(text) // 2], "positive": text[len(text) // 2 :]} for text in texts]
    file = options.train_file
    data = load_dataset("json", data_files=file, split="train") if file else Dataset.from_list(rows)
    model = SentenceTransformer(options.model) if options.model else small(data)
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
