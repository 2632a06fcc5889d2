"""Train a sparse causal language model with the Hugging Face Trainer: from a config, or from a model.

    python examples/train_clm.py --optim adamw_lp --p_norm 0.5 --lambda_p 0.01 \
        --train_file input.txt --output_dir out --max_steps 1000
    python examples/train_clm.py --model_name_or_path gpt2 --dataset_name wikitext \
        --dataset_config_name wikitext-2-raw-v1 --lambda_p 1.0 --output_dir out
    python examples/train_clm.py options.yaml --max_steps 500

All options of `TrainingArguments` work, on the command line or in a JSON or YAML file; `--help` lists them. The output
folder loads with plain `AutoModelForCausalLM.from_pretrained`. With no model named, a small GPT-2 is trained from
scratch; with no data named, on the source text of Python's standard library. With no tokenizer, bytes are the tokens.
The script needs `options.py` beside it.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from sysconfig import get_paths
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, causal_lm_hooks
from options import arg, check_run, create_optimizer_early, parse_options


# Models to train from scratch: the config, and default options that suit it.
_SMALL: dict[str, Any] = {"block_size": 64, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64}
_SMALL |= {"learning_rate": 2e-3, "warmup_steps": 100, "max_steps": 1000}
_NANO: dict[str, Any] = {"block_size": 256, "per_device_train_batch_size": 64, "max_steps": 5000}
_NANO |= {"warmup_steps": 100, "adam_beta2": 0.99}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_DROPOUT = dict.fromkeys(_NO_DROPOUT, 0.2)
_LLAMA = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 352}
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": ({"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128} | _NO_DROPOUT, _SMALL),
    "llama-tiny": ({"model_type": "llama"} | _LLAMA, _SMALL),
    # The setting of https://huggingface.co/papers/2404.10824 on Tiny Shakespeare
    "nanogpt": ({"model_type": "gpt2", "n_layer": 6, "n_head": 6, "n_embd": 384} | _DROPOUT, _NANO),
    "gpt2-small": ({"model_type": "gpt2"}, {"block_size": 1024, "learning_rate": 6e-4, "warmup_steps": 100}),
}


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = arg(None, help="Model to fine-tune: a folder or a Hub id.")
    config_name: str | None = arg(None, help="Config to train from scratch: a folder, JSON file or Hub id.")
    preset: str | None = arg(None, help="Size to train from scratch, tiny by default.", choices=list(PRESETS))
    tokenizer_name: str | None = arg(None, help="Tokenizer, a folder or Hub id, if not the model's.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = arg("float32", help="Type of the weights.")
    attn_implementation: str | None = arg(None, help="Attention: eager, sdpa, flash_attention_2; or the model's own.")
    trust_remote_code: bool = arg(False, help="Run the code of a model on the Hub.")

    def __post_init__(self) -> None:
        """Check that at most one model is named."""
        named = [name for name in ("model_name_or_path", "config_name", "preset") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"--{named[0]} and --{named[1]} both name a model; give one of them")


@dataclass
class DataArguments:
    """The training text. Without a file or data set: the source text of Python's standard library."""

    dataset_name: str | None = arg(None, help="Data set: a Hub id or a folder.")
    dataset_config_name: str | None = arg(None, help="Configuration of that data set.")
    train_file: str | None = arg(None, help="Training data: .txt, .json, .jsonl, .csv or .parquet.")
    validation_file: str | None = arg(None, help="Validation data in one of these formats.")
    text_column: str = arg("text", help="Column of the text in data sets and tables.")
    validation_fraction: float = arg(0.1, help="Last fraction of the training data, if no validation data are given.")
    block_size: int | None = arg(None, help="Tokens in a training example.")
    max_train_samples: int | None = arg(None, help="Maximum number of training examples.")
    max_eval_samples: int | None = arg(None, help="Maximum number of validation examples.")
    generate_prompt: str = arg("\n", help="Start of the text that is generated at the end.")
    generate_tokens: int = arg(256, help="Length of that text; 0 for none.")

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError("--dataset_name and --train_file both name training data; give one of them")
        if self.validation_file is not None and self.dataset_name is None and self.train_file is None:
            raise ValueError(f"--validation_file {self.validation_file!r} needs --train_file or --dataset_name")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction} must be at least 0 and below 1")
        lowest = {"block_size": 2, "max_train_samples": 1, "max_eval_samples": 1, "generate_tokens": 0}
        for name, least in lowest.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}")


def default_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that suit the model, without those that are `given`."""
    defaults: dict[str, Any] = {"output_dir": "train_clm_output", "logging_steps": 50, "report_to": "none"}
    defaults |= {"lr_scheduler_type": "cosine", "dataloader_pin_memory": torch.cuda.is_available()}
    if "save_steps" not in given:
        defaults["save_strategy"] = "no"
    if given.get("decay_to") == "base" and "model_name_or_path" in given:
        defaults["dtype"] = "auto"  # that of the base, so that unchanged weights are equal to its own
    if "model_name_or_path" not in given:
        defaults["learning_rate"] = 1e-3
        if "config_name" not in given:
            defaults |= PRESETS.get(given.get("preset", "tiny"), ({}, {}))[1]
    if "num_train_epochs" in given:
        defaults.pop("max_steps", None)
    return defaults


def read_file(path: str, option: str, suffixes: Sequence[str]) -> str:
    """Return the text of a data file with its line ends, or an empty string for .parquet."""
    file = Path(path)
    if not file.is_file():
        raise OSError(f"--{option} {path!r} is missing; it must be a file")
    if file.suffix not in suffixes:
        raise ValueError(f"--{option} {path!r} has an unknown suffix; it must end in {', '.join(suffixes)}")
    content = file.read_bytes()
    if not content.strip():
        raise ValueError(f"--{option} {path!r} is empty; it must hold data")
    try:
        return "" if file.suffix == ".parquet" else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--{option} {path!r} is not UTF-8 text, see byte {error.start}; convert it") from error


def load_table(option: str, value: str, *names: Any, **options: Any) -> Any:
    """`datasets.load_dataset` with errors that name the option."""
    try:
        return load_dataset(*names, **options)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"--{option} {value!r} cannot be loaded: {error.__cause__ or error}") from error


def texts_of(table: Dataset, column: str, source: str) -> list[str]:
    """Take the texts out of a table."""
    if column not in table.column_names:
        raise ValueError(f"--text_column {column!r} is not in {source}; it has {', '.join(table.column_names)}")
    if table.features[column].dtype not in ("string", "large_string"):
        raise ValueError(f"--text_column {column!r} of {source} must hold text, it holds {table.features[column]}")
    return [text for text in table[column] if text is not None]


def read_documents(path: str, option: str, text_column: str) -> list[str]:
    """Read the documents in a file; a text file is one document."""
    formats = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    text = read_file(path, option, (".txt", ".text", ".md", *formats))
    if Path(path).suffix not in formats:
        return [text]
    table = load_table(option, path, formats[Path(path).suffix], data_files=path, split="train")
    return texts_of(table, text_column, f"--{option} {path!r}")


def standard_library(most: int = 4_000_000) -> tuple[list[str], list[str]]:
    """Return source files of Python's standard library, a tenth of them for validation, in an order fixed by name."""
    root = Path(get_paths()["stdlib"])
    packages = ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging")
    files = [*root.glob("*.py"), *(file for package in packages for file in (root / package).rglob("*.py"))]
    splits: tuple[list[str], list[str]] = ([], [])
    for digest, file in sorted((sha256(file.relative_to(root).as_posix().encode()).digest(), file) for file in files):
        text = file.read_bytes().decode("utf-8", errors="replace")
        if len(text) <= most:
            most -= len(text)
            splits[digest[0] % 10 == 0].append(text)
    if not all(splits):
        raise OSError(f"Python's standard library has no source text in {str(root)!r}; give --train_file")
    return splits


def load_documents(data: "DataArguments") -> tuple[list[str], list[str], str]:
    """Return the training documents, the validation documents and the name of their source."""
    validation: list[str] | None = None
    if data.dataset_name is not None:
        source = f"--dataset_name {data.dataset_name!r}"
        splits = load_table("dataset_name", data.dataset_name, data.dataset_name, data.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"{source} has no split named train; it has {', '.join(splits)}")
        train = texts_of(splits["train"], data.text_column, source)
        if "validation" in splits:
            validation = texts_of(splits["validation"], data.text_column, source)
    elif data.train_file is not None:
        source = f"--train_file {data.train_file!r}"
        train = read_documents(data.train_file, "train_file", data.text_column)
    else:
        source = "Python's standard library"
        train, validation = standard_library()
    if data.validation_file is not None:
        validation = read_documents(data.validation_file, "validation_file", data.text_column)
    if validation is None:
        whole: Any = train[0] if len(train) == 1 else train  # the end of a single text, or the last rows
        end = int(len(whole) * (1 - data.validation_fraction))
        train, validation = ([whole[:end]], [whole[end:]]) if len(train) == 1 else (whole[:end], whole[end:])
    return train, [text for text in validation if text], source


def to_blocks(documents: list[str], tokenizer: Tokenizer | None, size: int, most: int | None, source: str) -> Dataset:
    """Join the tokens of all documents and divide them into blocks of `size` tokens, at most `most` of them."""
    if tokenizer is None:
        tokens = np.frombuffer("\n".join(documents).encode("utf-8"), dtype=np.uint8)
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded_documents = [np.zeros(0, dtype=np.int32)]
        for first in range(0, len(documents), 1000):
            encoded = tokenizer(documents[first : first + 1000], add_special_tokens=False, verbose=False)["input_ids"]
            encoded_documents.extend(np.array(ids + end, dtype=np.int32) for ids in encoded)
        tokens = np.concatenate(encoded_documents)
    blocks = tokens[: len(tokens) // size * size].reshape(-1, size)[:most]
    if not len(blocks):
        raise ValueError(f"{source} has {len(tokens)} tokens; --block_size {size} must be at most that")
    return Dataset.from_dict({"input_ids": blocks}).with_format("numpy")


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack blocks into a batch; the model itself shifts the labels."""
    tokens = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    labels = tokens.clone()
    labels[:, 0] = -100  # nothing predicts the first token; the Trainer would count it in its mean loss
    return {"input_ids": tokens, "labels": labels}


def load_tokenizer(model: ModelArguments) -> Tokenizer | None:
    """Return the tokenizer, or None for bytes: if no model is named, or the model has no tokenizer."""
    option = "model_name_or_path" if model.tokenizer_name is None else "tokenizer_name"
    name = getattr(model, option)
    if name is None:
        return None
    try:
        if not Path(name).is_dir() or any(Path(name).glob("tokenizer*")) or any(Path(name).glob("vocab*")):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{option} {name!r} has no tokenizer that loads: {error}") from error
    if model.tokenizer_name is not None:
        raise ValueError(f"--tokenizer_name {name!r} is a folder without a tokenizer")
    return None


def load_model(model: ModelArguments, tokenizer: Tokenizer | None, data: DataArguments, grow: bool = False) -> Any:
    """Build or load the model, and set the block size; `grow` it if the tokenizer has more tokens."""
    remote = {"trust_remote_code": model.trust_remote_code}
    options: dict[str, Any] = {} if model.dtype == "auto" else {"dtype": getattr(torch, model.dtype)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    vocabulary = 256 if tokenizer is None else len(tokenizer)
    option = "config_name" if model.model_name_or_path is None else "model_name_or_path"
    name = getattr(model, option)
    if name is None:
        special = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape: dict[str, Any] = {"vocab_size": vocabulary, "max_position_embeddings": data.block_size, **special}
        config = AutoConfig.for_model(**PRESETS[model.preset or "tiny"][0], **shape)
        return AutoModelForCausalLM.from_config(config, **options)
    try:
        config = AutoConfig.from_pretrained(name, **remote)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{option} {name!r} has no config of a transformers model: {error}") from error
    longest = (
        getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    )  # some models have no limit
    data.block_size = data.block_size or min(longest, 1024)
    if data.block_size > longest:
        raise ValueError(f"--block_size {data.block_size} is more than the {longest} positions of --{option} {name!r}")
    if config.vocab_size < vocabulary and not grow:
        raise ValueError(
            f"--{option} {name!r} has {config.vocab_size} tokens, the text {vocabulary}; name its tokenizer"
        )
    if model.model_name_or_path is None:
        loaded = AutoModelForCausalLM.from_config(config, **options, **remote)
    elif tokenizer is None and config.vocab_size != 256:  # the model did not learn bytes
        raise ValueError(f"--{option} {name!r} has no tokenizer with it; give --tokenizer_name")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(name, **options, **remote)
    if config.vocab_size < vocabulary:
        loaded.resize_token_embeddings(vocabulary)
    return loaded


def prepare(argv: Sequence[str]) -> tuple[PDecayTrainer, Tokenizer | None, DataArguments]:
    """Read, check and load everything; raise ValueError or OSError before any training."""
    groups = (ModelArguments, DataArguments, PDecayTrainingArguments)
    model_args, data, args = parse_options(argv, groups, default_options)
    check_run(args)
    args.batch_eval_metrics = True  # causal_lm_hooks needs it
    train, validation, source = load_documents(data)
    tokenizer = load_tokenizer(model_args)
    set_seed(args.seed)
    model = load_model(model_args, tokenizer, data)
    datasets = [to_blocks(train, tokenizer, data.block_size, data.max_train_samples, source)]
    if validation:
        source = (
            f"The validation split of {source}"
            if data.validation_file is None
            else f"--validation_file {data.validation_file!r}"
        )
        datasets.append(to_blocks(validation, tokenizer, data.block_size, data.max_eval_samples, source))
    sets = {"train_dataset": datasets[0], "eval_dataset": datasets[1] if validation else None, "data_collator": collate}
    trainer = PDecayTrainer(model=model, args=args, processing_class=tokenizer, **sets, **causal_lm_hooks())
    create_optimizer_early(trainer)
    return trainer, tokenizer, data


def run(trainer: PDecayTrainer, tokenizer: Tokenizer | None, data: DataArguments) -> dict[str, float]:
    """Train, evaluate and save; return all metrics."""
    results = {"train": trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics}
    if trainer.eval_dataset is not None:
        results["eval"] = trainer.evaluate()
    for split, metrics in results.items():
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    trainer.save_state()
    trainer.create_model_card(dataset=data.dataset_name or Path(data.train_file or "Python standard library").name)
    trainer.save_model()
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # every process would have to generate
    if data.generate_tokens and trainer.is_world_process_zero() and not sharded:
        print("----- generated text -----", generate(trainer, tokenizer, data), "-----", sep="\n")
    return {name: value for metrics in results.values() for name, value in metrics.items()}


@torch.no_grad()
def generate(trainer: PDecayTrainer, tokenizer: Tokenizer | None, data: DataArguments) -> str:
    """Continue the prompt; the model sees at most the last half block, so its positions suffice."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    prompt, window = data.generate_prompt, data.block_size or 2
    tokens = (list(prompt.encode()) if tokenizer is None else tokenizer(prompt)["input_ids"]) or [0]
    wanted = len(tokens) + data.generate_tokens
    while len(tokens) < wanted:
        seen = torch.tensor([tokens[-window // 2 :]], device=model.device)
        options = {"max_new_tokens": min(wanted - len(tokens), window - seen.shape[1]), "pad_token_id": 0}
        output = model.generate(seen, attention_mask=torch.ones_like(seen), do_sample=True, **options)
        tokens += output[0, seen.shape[1] :].tolist()
    return bytes(tokens).decode("utf-8", errors="replace") if tokenizer is None else str(tokenizer.decode(tokens))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    try:
        job = prepare(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print("train_clm.py: error:", shorten(str(error), 600, placeholder=" ..."), file=sys.stderr)
        return 2
    run(*job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
