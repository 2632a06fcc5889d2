"""Fine-tune an encoder as a text classifier, or train one from scratch, and get a sparse model.

    python examples/finetune_classifier.py --train_file train.tsv --validation_file dev.tsv --test_file test.tsv \
        --output_dir out
    python examples/finetune_classifier.py --model_name_or_path answerdotai/ModernBERT-base \
        --dataset_name stanfordnlp/sst2 --lambda_p 1.0 --output_dir out

Tables may be TSV, CSV, JSON, JSON lines or Parquet; labels may be words or numbers. All options of `TrainingArguments`
work; `--help` lists them. With no model named, a small BERT over the words of the training text is trained from
scratch. The output folder loads with plain `AutoModelForSequenceClassification.from_pretrained`. The script needs
`train_clm.py` and `options.py` beside it.
"""

import csv
import io
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, classification_hooks
from options import arg, check_run, create_optimizer_early, parse_options
from train_clm import load_table, read_file


logger = logging.getLogger("finetune_classifier")

PRESETS = {
    "bert-tiny": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 128, "intermediate_size": 512},
    "bert-mini": {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 256, "intermediate_size": 1024},
}


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = arg(None, help="Encoder to fine-tune: a folder or a Hub id.")
    config_name: str | None = arg(None, help="Config to train from scratch: a folder, JSON file or Hub id.")
    preset: str | None = arg(None, help="Size to train from scratch, bert-tiny by default.", choices=list(PRESETS))
    tokenizer_name: str | None = arg(
        None, help="Tokenizer, a folder or Hub id; without one, the words of the training text."
    )
    vocabulary_size: int = arg(16384, help="Maximum number of words taken from the training text.")
    trust_remote_code: bool = arg(False, help="Run the code of a model on the Hub.")

    def __post_init__(self) -> None:
        """Check that at most one model is named."""
        named = [name for name in ("model_name_or_path", "config_name", "preset") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"--{named[0]} and --{named[1]} both name a model; give one of them")
        if self.vocabulary_size < 16:
            raise ValueError(f"--vocabulary_size {self.vocabulary_size} must be at least 16")


@dataclass
class DataArguments:
    """The texts and labels to learn."""

    dataset_name: str | None = arg(None, help="Data set: a Hub id or a folder.")
    dataset_config_name: str | None = arg(None, help="Configuration of that data set.")
    train_file: str | None = arg(None, help="Training data: .tsv, .csv, .json, .jsonl or .parquet.")
    validation_file: str | None = arg(None, help="Validation data in one of these formats.")
    test_file: str | None = arg(None, help="Test data in one of these formats, used once, at the end.")
    text_column: str | None = arg(None, help="Column of the text: sentence, text or the first by default.")
    label_column: str | None = arg(None, help="Column of the label: label or the second by default.")
    validation_fraction: float = arg(0.1, help="Last fraction of the training data, if no validation data are given.")
    max_length: int = arg(128, help="Maximum number of tokens of a text; a warning counts those that are cut.")
    max_train_samples: int | None = arg(None, help="Maximum number of training examples.")
    max_eval_samples: int | None = arg(None, help="Maximum number of validation and test examples.")

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("Give training data: --train_file, or --dataset_name, and not both")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction} must be at least 0 and below 1")
        for name, least in {"max_length": 3, "max_train_samples": 1, "max_eval_samples": 1}.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}")


@dataclass
class Examples:
    """Texts, their labels and their source."""

    texts: list[str]
    labels: list[str]
    source: str

    def __getitem__(self, span: slice) -> "Examples":
        """Return a span of the examples."""
        return Examples(self.texts[span], self.labels[span], self.source)


def default_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that suit the model, without those that are `given`."""
    defaults: dict[str, Any] = {"output_dir": "finetune_classifier_output", "logging_steps": 50, "report_to": "none"}
    defaults |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64}
    defaults |= {"warmup_steps": 50, "dataloader_pin_memory": torch.cuda.is_available()}
    if "save_steps" not in given:
        defaults["save_strategy"] = "no"
    if "model_name_or_path" not in given:
        defaults |= {"learning_rate": 1e-3, "num_train_epochs": 5.0}
    return defaults


def read_delimited(path: str, option: str, data: DataArguments, header: list[str] | None) -> Dataset:
    """Read a TSV or CSV file, whose first line may or may not name the columns.

    It does if it equals `header`, the header of the training file, if it holds a column that the user or convention
    names, or if no other line has its second field (labels recur).
    """
    tabs = path.endswith(".tsv")
    separator = "tab" if tabs else "comma"
    text = read_file(path, option, (".tsv", ".csv"))
    lines = io.StringIO(text, newline="")
    # In TSV files a quotation mark is just a character.
    cells = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    try:
        rows = [row for row in cells if row]
    except csv.Error as error:
        raise ValueError(f"--{option} {path!r} cannot be read: {error}") from error
    width = len(rows[0]) if header is None else len(header)
    if width < 2:
        raise ValueError(
            f"--{option} {path!r} has one column; it must have a text and a label, between them a {separator}"
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise ValueError(f"--{option} {path!r} has {len(row)} columns in row {number}, it must have {width}")
    if header is None:
        wanted = [name for name in (data.text_column, data.label_column) if name is not None]
        recurs = rows[0][1] in (row[1] for row in rows[1:])
        named = bool(wanted) or bool({"sentence", "text", "label"} & set(rows[0])) or not recurs
    else:
        named = rows[0] == header
    names = rows.pop(0) if named else header or [str(column) for column in range(width)]
    if not rows:
        raise ValueError(f"--{option} {path!r} has no rows below its header")
    return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def read_table(path: str, option: str, data: DataArguments, header: list[str] | None = None) -> Dataset:
    """Read a table of any format."""
    formats = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if Path(path).suffix in (".tsv", ".csv"):
        return read_delimited(path, option, data, header)
    read_file(path, option, (".tsv", ".csv", *formats))
    return load_table(option, path, formats[Path(path).suffix], data_files=path, split="train")


def examples_of(table: Dataset, data: DataArguments, source: str) -> Examples:
    """Return the texts and labels of a table."""
    columns = table.column_names
    if len(columns) < 2 or not len(table):
        raise ValueError(f"{source} has {len(columns)} columns and {len(table)} rows; it must hold texts with labels")
    chosen: dict[str, str | None] = {"text_column": data.text_column, "label_column": data.label_column}
    for option, names in (("text_column", ("sentence", "text")), ("label_column", ("label",))):
        asked = chosen[option]
        if asked is not None and asked not in columns:
            raise ValueError(f"--{option} {asked!r} is not in {source}; its columns are {', '.join(columns)}")
        free = [column for column in columns if column not in chosen.values()]
        chosen[option] = asked or next((name for name in names if name in free), free[0])
    texts, labels = list(table[chosen["text_column"]]), list(table[chosen["label_column"]])
    kind = table.features[chosen["label_column"]]
    if isinstance(kind, ClassLabel):
        labels = [None if label is None or label < 0 else kind.int2str(label) for label in labels]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"--text_column {chosen['text_column']!r} of {source} must hold text in every row")
    if any(label is None or isinstance(label, float | list | dict) for label in labels):
        raise ValueError(
            f"--label_column {chosen['label_column']!r} of {source} must hold a word or integer in every row"
        )
    return Examples(texts, [str(label) for label in labels], source)


def load_examples(data: DataArguments) -> tuple[Examples, dict[str, Examples | None]]:
    """Return the training examples, and the validation and test examples by name."""
    others: dict[str, Examples | None] = {"validation": None, "test": None}
    header: list[str] | None = None
    if data.dataset_name is not None:
        source = f"--dataset_name {data.dataset_name!r}"
        splits = load_table("dataset_name", data.dataset_name, data.dataset_name, data.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"{source} has no split named train; it has {', '.join(splits)}")
        train = examples_of(splits["train"], data, source)
        if "validation" in splits:
            others["validation"] = examples_of(splits["validation"], data, source)
    else:
        table = read_table(str(data.train_file), "train_file", data)
        header = table.column_names
        train = examples_of(table, data, f"--train_file {data.train_file!r}")
    for split in others:
        path = getattr(data, f"{split}_file")
        if path is not None:
            table = read_table(path, f"{split}_file", data, header)
            others[split] = examples_of(table, data, f"--{split}_file {path!r}")
    if others["validation"] is None and data.validation_fraction:
        end = int(len(train.texts) * (1 - data.validation_fraction))
        train, others["validation"] = train[:end], train[end:]
    if not train.texts:
        raise ValueError(
            f"{train.source} has too few rows to keep --validation_fraction {data.validation_fraction} back"
        )
    return train[: data.max_train_samples], {
        name: None if split is None else split[: data.max_eval_samples] for name, split in others.items()
    }


def label_names(train: Examples, others: Iterable[Examples | None]) -> list[str]:
    """Return the labels of the training examples in order, numbers by value; the others may not have more."""
    labels = set(train.labels)
    if len(labels) < 2:
        raise ValueError(f"{train.source} has one label, {train.labels[0]!r}; a classifier needs two at least")
    for split in others:
        if split is not None and (unknown := sorted(set(split.labels) - labels)):
            raise ValueError(f"{split.source} has the label {unknown[0]!r}, which no training example has")
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    return sorted(labels, key=int) if numbers else sorted(labels)


def train_tokenizer(texts: list[str], vocabulary_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the words of `texts`, as BERT splits them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def load_model(
    args: ModelArguments, data: DataArguments, texts: list[str], labels: list[str]
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Build or load the tokenizer and the model."""
    option = "config_name" if args.model_name_or_path is None else "model_name_or_path"
    name = getattr(args, option)
    remote = {"trust_remote_code": args.trust_remote_code}
    tokens = args.tokenizer_name or args.model_name_or_path
    try:
        config = None if name is None else AutoConfig.from_pretrained(name, **remote)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{option} {name!r} has no config of a transformers model: {error}") from error
    try:
        tokenizer = None if tokens is None else AutoTokenizer.from_pretrained(tokens, **remote)
    except (OSError, ValueError) as error:
        raise ValueError(f"{tokens!r} has no tokenizer that loads, give --tokenizer_name: {error}") from error
    if tokenizer is None:
        tokenizer = train_tokenizer(texts, args.vocabulary_size, data.max_length)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer of {tokens!r} has no padding token; give --tokenizer_name of one that has")
    heads = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if config is None:
        shape = {"vocab_size": len(tokenizer), "max_position_embeddings": data.max_length, "pad_token_id": 0}
        config = AutoConfig.for_model("bert", **PRESETS[args.preset or "bert-tiny"], **shape)
    data.max_length = min(data.max_length, getattr(config, "max_position_embeddings", None) or data.max_length)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--{option} {name!r} has {config.vocab_size} tokens, the tokenizer {len(tokenizer)}; give its own"
        )
    config.update(heads)
    if args.model_name_or_path is None:
        return AutoModelForSequenceClassification.from_config(config, **remote), tokenizer
    # float32: updates of bfloat16 weights are lost to rounding. The head may have had other labels.
    loading = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    return AutoModelForSequenceClassification.from_pretrained(name, **loading, **remote), tokenizer


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int) -> Dataset:
    """Turn texts into token ids and labels into numbers; say how many texts are cut."""
    encoded = tokenizer(examples.texts, return_token_type_ids=False, verbose=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if longer := sum(length > max_length for length in lengths):
        logger.warning(
            "%d of %d texts of %s are longer than --max_length %d, the longest has %d tokens; they are cut.",
            *(longer, len(lengths), examples.source, max_length, max(lengths)),
        )
        encoded = tokenizer(examples.texts, truncation=True, max_length=max_length, return_token_type_ids=False)
    numbers = [labels.index(label) for label in examples.labels]
    return Dataset.from_dict({**encoded, "labels": numbers})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        groups = (ModelArguments, DataArguments, PDecayTrainingArguments)
        model_args, data, args = parse_options(sys.argv[1:] if argv is None else argv, groups, default_options)
        check_run(args)
        logger.setLevel(logging.WARNING if args.process_index == 0 else logging.ERROR)
        train, others = load_examples(data)
        labels = label_names(train, others.values())
        set_seed(args.seed)
        model, tokenizer = load_model(model_args, data, train.texts, labels)
        encoded = {
            name: None if split is None else encode(split, tokenizer, labels, data.max_length)
            for name, split in {"train": train, **others}.items()
        }
        trainer = PDecayTrainer(
            model=model,
            args=args,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            **classification_hooks(len(labels)),
        )
        create_optimizer_early(trainer)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print("finetune_classifier.py: error:", shorten(str(error), 600, placeholder=" ..."), file=sys.stderr)
        return 2

    results = {"train": trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics}
    if encoded["validation"] is not None:
        results["eval"] = trainer.evaluate()
    if encoded["test"] is not None:
        results["test"] = trainer.predict(encoded["test"], metric_key_prefix="test").metrics or {}
    for split, metrics in results.items():
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    trainer.save_state()
    trainer.create_model_card(dataset=data.dataset_name or Path(data.train_file or "").name)
    trainer.save_model()
    return 0


if __name__ == "__main__":
    sys.exit(main())
