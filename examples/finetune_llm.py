"""Fine-tune a causal language model on instructions or on text, and get a sparse model.

    python examples/finetune_llm.py --model_name_or_path Qwen/Qwen3-0.6B --train_file instructions.jsonl \
        --target_sparsity 0.5 --bf16 true --gradient_checkpointing true --output_dir out
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/finetune_llm.py \
        --model_name_or_path MODEL --train_file instructions.jsonl --target_sparsity 0.5 --output_dir out
    python examples/finetune_llm.py --model_name_or_path MODEL --train_file instructions.jsonl --decay_to base \
        --target_sparsity 0.99 --output_dir out
    python examples/finetune_llm.py options.yaml --max_steps 500

Rows hold `prompt` and `completion`; `instruction`, `output` and maybe `input`; `messages`, which the tokenizer's chat
template renders; or `text`. The model learns answers and text only. Examples are packed into blocks and do not see one
another. All options of `TrainingArguments` work; `--help` lists them. With no model named, a small GPT-2 over
bytes is trained from scratch; with no data named, on the source text of Python's standard library. The output folder
loads with plain `AutoModelForCausalLM.from_pretrained`. With `--decay_to base` 99% of its weights stay those of MODEL,
and `out/delta` has the others; the last message says how many bytes that takes. The script needs `instructions.py`,
`packing.py`, `train_clm.py` and `options.py` beside it.
"""

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from transformers import PreTrainedTokenizerBase, set_seed

import train_clm
from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, causal_lm_hooks
from instructions import PLAIN_CHAT, byte_tokenizer, load_examples, read_rows
from options import arg, check_run, create_optimizer_early, parse_options
from packing import Collator, Example, fit, keeps_apart, model_options, pack, to_dataset


logger = logging.getLogger("finetune_llm")
Rows = list[tuple[str, Mapping[str, Any]]]  # each with its position, for errors


@dataclass
class ModelArguments(train_clm.ModelArguments):
    """Which model is trained."""


@dataclass
class DataArguments(train_clm.DataArguments):
    """The training data. Without a file or data set: the source text of Python's standard library."""

    train_on_prompts: bool = arg(False, help="Learn prompts as well as answers.")
    packing: bool = arg(
        True,
        help="Put several examples into a block; they do not see one another. Each example gets its own padded block "
        "if the model cannot separate them: models with a state (Mamba and hybrids), classes that ignore restarting "
        "positions, and flash attention in batches of several blocks. Eager, sdpa and flex attention can.",
    )


def default_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that suit the model, without those that are `given`."""
    defaults = train_clm.default_options(given) | {"output_dir": "finetune_llm_output", "generate_tokens": 0}
    older = Version(transformers.__version__).major < 5
    if older:  # the default of version 5; reentrant checkpointing does not work with DDP
        defaults["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if "warmup_steps" not in given:
        defaults.pop("warmup_steps", None)
        defaults["warmup_ratio" if older else "warmup_steps"] = 0.03  # of the run
    if "block_size" in defaults and "block_size" not in given and given.keys() & {"train_file", "dataset_name"}:
        # A preset's blocks are for running text; prompts need room.
        defaults |= {"block_size": 1024, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    if "model_name_or_path" in given:
        defaults |= {"learning_rate": 1e-4 if given.get("target_sparsity") else 2e-5, "logging_steps": 10}
    return defaults


def placed(rows: Sequence[Mapping[str, Any]], source: str) -> Rows:
    """Add its position to each row."""
    return [(f"row {number} of {source}", row) for number, row in enumerate(rows, start=1)]


def load_rows(data: DataArguments) -> tuple[Rows, Rows, str]:
    """Return the training rows, the held-out rows, and the name of their source."""
    validation: Rows | None = None
    column = data.text_column
    if data.dataset_name is not None:
        source = f"--dataset_name {data.dataset_name!r}"
        splits = train_clm.load_table("dataset_name", data.dataset_name, data.dataset_name, data.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"{source} has no split named train; it has {', '.join(splits)}")
        train = placed(splits["train"].to_list(), source)
        if "validation" in splits:
            validation = placed(splits["validation"].to_list(), f"the split validation of {source}")
    elif data.train_file is not None:
        source = f"--train_file {data.train_file!r}"
        train = placed(read_rows(data.train_file, "train_file", column), source)
    else:
        source = "Python's standard library"
        splits = train_clm.standard_library()
        train, validation = (placed([{column: text} for text in split], source) for split in splits)
    if data.validation_file is not None:
        option = f"--validation_file {data.validation_file!r}"
        validation = placed(read_rows(data.validation_file, "validation_file", column), option)
    if validation is not None:
        return train, validation, source
    if len(train) == 1 and isinstance(text := train[0][1].get(column), str):  # the end of a single text
        end = int(len(text) * (1 - data.validation_fraction))
        train, validation = (placed([{column: piece}], source) if piece else [] for piece in (text[:end], text[end:]))
        return train, validation, source
    end = max(1, int(len(train) * (1 - data.validation_fraction)))
    return train[:end], train[end:], source


def to_blocks(examples: Iterable[Example], size: int, most: int | None, packed: bool, source: str) -> Dataset:
    """Divide at most `most` examples over blocks; an example longer than a block counts as several."""
    pieces: list[Example] = []
    lengths: list[int] = []
    for example in examples:
        pieces += fit(example, size)
        lengths.append(len(example))
        if most is not None and len(pieces) >= most:
            break
    pieces = pieces[:most]
    if not pieces:
        raise ValueError(f"{source} has nothing in it to learn")
    if longer := sum(length > size for length in lengths):
        logger.warning(
            "%d of %d examples of %s are longer than --block_size %d, the longest has %d tokens; they are split, and "
            "later pieces do not see what came before.",
            *(longer, len(lengths), source, size, max(lengths)),
        )
    numbers = pack([len(piece) for piece in pieces], size) if packed else [[number] for number in range(len(pieces))]
    return to_dataset([[pieces[number] for number in block] for block in numbers])


def can_pack(model: Any, args: PDecayTrainingArguments) -> bool:
    """Whether the model separates packed examples in this run's batches.

    Under FSDP and DeepSpeed no process has the weights to run the model, so its class decides.
    """
    rows = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        flash = "flash" in str(model.config._attn_implementation)
        return model._supports_attention_backend and not model._is_stateful and not (flash and rows > 1)
    mixed = args.bf16 or args.fp16
    exact = model.dtype == torch.float32 and not mixed
    model = model.to(args.device)
    with torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16, enabled=mixed):
        return keeps_apart(model, min(rows, 2), 1e-3 if exact else 2e-2)


def prepare(argv: Sequence[str]) -> tuple[PDecayTrainer, PreTrainedTokenizerBase, DataArguments]:
    """Read, check and load everything; raise ValueError or OSError before any training."""
    groups = (ModelArguments, DataArguments, PDecayTrainingArguments)
    model_args, data, args = parse_options(argv, groups, default_options)
    check_run(args)
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    args.batch_eval_metrics = True  # causal_lm_hooks needs it
    train, validation, source = load_rows(data)
    sources = {"train": source, "validation": f"The validation split of {source}"}
    if data.validation_file is not None:
        sources["validation"] = f"--validation_file {data.validation_file!r}"
    tokenizer = train_clm.load_tokenizer(model_args)
    set_seed(args.seed)
    model = train_clm.load_model(model_args, tokenizer, data, grow=True)
    if tokenizer is None:
        tokenizer = byte_tokenizer()
        model.resize_token_embeddings(len(tokenizer))
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} cannot say where tokens lie in a text; give a fast one"
        )
    packed = data.packing and can_pack(model, args)
    if data.packing and not packed:
        logger.warning("%s cannot keep packed examples apart here: each gets its own block.", type(model).__name__)
    most = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    blocks: dict[str, Dataset] = {}
    for split, rows in (("train", train), ("validation", validation)):
        if rows or split == "train":
            examples = load_examples(rows, tokenizer, data.text_column, data.train_on_prompts)
            blocks[split] = to_blocks(examples, data.block_size, most[split], packed, sources[split])
    if tokenizer.chat_template is None and any("messages" in row for _, row in train):
        tokenizer.chat_template = PLAIN_CHAT
    filling = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = PDecayTrainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks.get("validation"),
        data_collator=Collator(packed, filling or 0, model_options(model)),
        processing_class=tokenizer,
        **causal_lm_hooks(),
    )
    create_optimizer_early(trainer)
    return trainer, tokenizer, data


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        job = prepare(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print("finetune_llm.py: error:", shorten(str(error), 600, placeholder=" ..."), file=sys.stderr)
        return 2
    train_clm.run(*job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
