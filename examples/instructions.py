"""Rows of instructions or text for `finetune_llm.py`, turned into tokens with labels."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packing import Example
from train_clm import load_table, read_file


FORMATS = "prompt and completion; instruction and output, with or without input; messages; or"
# The prompt of https://github.com/tatsu-lab/stanford_alpaca
ALPACA = (
    "Below is an instruction that describes a task{hint}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)
ALPACA_HINT = ", paired with an input that provides further context"
# For tokenizers without one. It is saved with the tokenizer, so that a chat uses the form of the training.
PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

Segments = list[tuple[str, bool]]  # pieces of a text, and whether to learn each


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with the byte tokens 0 to 255 of `train_clm.py`, and 256 as the end of a text."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that represent themselves
    others = [byte for byte in range(256) if byte not in alphabet]
    vocabulary = {chr(byte): byte for byte in alphabet} | {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def read_rows(path: str, option: str, text_column: str) -> list[dict[str, Any]]:
    """Read the rows of a file; a text file is one row."""
    formats = {".csv": "csv", ".parquet": "parquet"}
    text, suffix = read_file(path, option, (".txt", ".text", ".md", ".json", ".jsonl", *formats)), Path(path).suffix
    if suffix in formats:
        return list(load_table(option, path, formats[suffix], data_files=path, split="train").to_list())
    if suffix not in (".json", ".jsonl"):
        return [{text_column: text}]
    # Not read as a table: rows may differ in their columns, and an error must name the row.
    whole = text.lstrip().startswith("[")
    rows: list[dict[str, Any]] = []
    try:
        for row in json.loads(text) if whole else (json.loads(line) for line in text.split("\n") if line.strip()):
            if not isinstance(row, dict):
                raise ValueError(f"it holds {json.dumps(row)[:60]}")
            rows.append(row)
    except ValueError as error:
        where = "" if whole and not rows else f"row {len(rows) + 1} of "
        raise ValueError(
            f"{where}--{option} {path!r} cannot be read as JSON: {error}; it must hold an object on each line, or a "
            "list of objects"
        ) from error
    return rows


def segments_of(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, text_column: str
) -> Iterator[tuple[Segments, bool]]:
    """Yield the examples of a row: their segments, and whether they still need start and end tokens.

    Raises:
        ValueError: If the row fits no format.
    """
    given = {name for name, value in row.items() if value is not None}
    if "messages" in given:
        yield from ((segments, False) for segments in _chat(row["messages"], tokenizer))
    elif {"prompt", "completion"} <= given:
        yield [(_text(row, "prompt"), False), (_text(row, "completion"), True)], True
    elif {"instruction", "output"} <= given:
        instruction, output = _text(row, "instruction"), _text(row, "output")
        context = _text(row, "input") if "input" in given else ""
        if tokenizer.chat_template is not None:
            asked = f"{instruction}\n\n{context}" if context else instruction
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
            yield from ((segments, False) for segments in _chat(messages, tokenizer))
        else:
            hint, context = (ALPACA_HINT, f"### Input:\n{context}\n\n") if context else ("", "")
            prompt = ALPACA.format(hint=hint, instruction=instruction, context=context)
            yield [(prompt, False), (output, True)], True
    elif text_column in given:
        yield [(_text(row, text_column), True)], True
    else:
        raise ValueError(
            f"has the columns {', '.join(sorted(given)) or '(none)'}; it must have {FORMATS} {text_column}"
        )


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"holds {str(row[column])[:60]!r} as {column}; it must be text")
    return row[column]


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> list[Segments]:
    """Render a conversation by the tokenizer's template, and mark the assistant's answers.

    Each answer follows the prompt that the model would see. Some templates render earlier turns differently once later
    turns exist, for example the thoughts of reasoning models; then each answer becomes a separate example.
    """
    whole = isinstance(messages, list) and all(isinstance(message, dict) and "role" in message for message in messages)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"] if whole else []
    if not turns:
        raise ValueError(
            "has messages without an answer; they must be a list of objects with role and content, one of them the "
            "assistant's"
        )

    def render(most: int, **options: Any) -> str:
        if tokenizer.chat_template is None:
            options["chat_template"] = PLAIN_CHAT
        try:
            return str(tokenizer.apply_chat_template(messages[:most], tokenize=False, **options))
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"has messages that the tokenizer's chat template refuses: {error}") from error

    examples: list[Segments] = []
    done = ""  # the last example, rendered
    for turn in turns:
        prompt, rendered = render(turn, add_generation_prompt=True) if turn else "", render(turn + 1)
        if not rendered.startswith(prompt):
            prompt = render(turn)
        if not rendered.startswith(prompt):
            raise ValueError("has messages for which the tokenizer's chat template renders no answer after its prompt")
        if not (examples and prompt.startswith(done)):
            examples.append([])
            done = ""
        examples[-1] += [(prompt[len(done) :], False), (rendered[len(prompt) :], True)]
        done = rendered
    return examples


def encode(
    texts: Sequence[tuple[Segments, bool]], tokenizer: PreTrainedTokenizerBase, train_on_prompts: bool = False
) -> Iterator[Example]:
    """Turn texts into tokens. A token that overlaps an answer is learned.

    Texts become tokens as a whole, because some tokenizers would put a space at the seams between segments.
    """
    beginning = tokenizer("")["input_ids"][:1]  # such as Llama's <s>; some tokenizers have an end token here
    beginning = beginning if beginning == [tokenizer.bos_token_id] else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    joined = ["".join(text for text, _ in segments) for segments, _ in texts]
    encoded = tokenizer(joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for (segments, bare), ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        seams = list(accumulate(len(text) for text, _ in segments))
        learned = [answer or train_on_prompts for _, answer in segments]
        labels = [
            token if learned[bisect_left(seams, stop)] else -100 for token, (_, stop) in zip(ids, spans, strict=True)
        ]
        if bare and ids[-1:] != end:
            ids, labels = ids + end, labels + (end if learned[-1] else [-100] * len(end))
        before = beginning if bare else []
        if not before and labels and labels[0] not in (-100, tokenizer.bos_token_id):
            before = end  # of the previous text: without it nothing would predict the first token
        yield Example([*before, *ids], [-100, *([-100] * len(before) + labels)[1:]])


def load_examples(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    train_on_prompts: bool = False,
) -> Iterator[Example]:
    """Turn rows into examples.

    Args:
        rows: Each with its position, for errors.
        tokenizer: A fast tokenizer, which knows the spans of tokens.
        text_column: Column of plain text rows.
        train_on_prompts: Whether to learn prompts as well.

    Raises:
        ValueError: If a row fits no format.
    """
    for first in range(0, len(rows), 100):
        texts: list[tuple[Segments, bool]] = []
        for position, row in rows[first : first + 100]:
            try:
                texts += segments_of(row, tokenizer, text_column)
            except ValueError as error:
                raise ValueError(f"{position} {error}") from error
        yield from encode(texts, tokenizer, train_on_prompts)
