"""examples/instructions.py: every format of instructions and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers as tf

from .conftest import write


def learned(example: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != -100]))


class TestRows:
    def examples(self, instructions: ModuleType, tokenizer: Any, *rows: Any, **options: Any) -> list[Any]:
        return list(instructions.load_examples([("row", row) for row in rows], tokenizer, "text", **options))

    def test_tokens_are_bytes(self, tokenizer: Any) -> None:
        text = "".join(map(chr, [*range(1, 300), 0x20AC, 0x1F600]))
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
        assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)

    @pytest.mark.parametrize(
        ("row", "whole", "answers"),
        [
            ({"prompt": "2 + 2 =", "completion": " 4 é"}, "2 + 2 = 4 é<|endoftext|>", " 4 é<|endoftext|>"),
            ({"prompt": "", "completion": "hi"}, "<|endoftext|>hi<|endoftext|>", "hi<|endoftext|>"),
            ({"text": "just text", "number": 1}, "<|endoftext|>just text<|endoftext|>", "just text<|endoftext|>"),
            ({"text": "a", "messages": None}, "<|endoftext|>a<|endoftext|>", "a<|endoftext|>"),
            (
                {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}] * 2},
                "User:\n1?\n\nAssistant:\none<|endoftext|>\n\nUser:\n1?\n\nAssistant:\none<|endoftext|>\n\n",
                "one<|endoftext|>\n\none<|endoftext|>\n\n",
            ),
        ],
    )
    def test_answers_are_learned(
        self, instructions: ModuleType, tokenizer: Any, row: Any, whole: str, answers: str
    ) -> None:
        (example,) = self.examples(instructions, tokenizer, row)
        assert tokenizer.decode(example.input_ids) == whole
        assert learned(example, tokenizer) == answers
        (example,) = self.examples(instructions, tokenizer, row, train_on_prompts=True)
        assert learned(example, tokenizer) == whole.removeprefix("<|endoftext|>")

    def test_alpaca(self, instructions: ModuleType, tokenizer: Any) -> None:
        rows = [{"instruction": "Double.", "input": given, "output": "8"} for given in ("4", "", None)]
        full, empty, none = self.examples(instructions, tokenizer, *rows)
        assert "### Instruction:\nDouble.\n\n### Input:\n4\n\n### Response:\n8<|" in tokenizer.decode(full.input_ids)
        assert "### Instruction:\nDouble.\n\n### Response:\n8<|" in tokenizer.decode(empty.input_ids)
        assert empty == none
        assert {learned(example, tokenizer) for example in (full, empty)} == {"8<|endoftext|>"}
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
        (chat,) = self.examples(instructions, tokenizer, rows[0])
        assert tokenizer.decode(chat.input_ids) == "<|endoftext|>[user] Double.\n\n4;[assistant] 8;"[13:]
        assert learned(chat, tokenizer) == "[assistant] 8;"  # the template opens no answer

    def test_each_answer_follows_what_the_model_would_see(self, instructions: ModuleType, tokenizer: Any) -> None:
        """A template that forgets thoughts of earlier turns, as those of reasoning models do."""
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}hm,{% endif %}"
            "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        first, second = self.examples(instructions, tokenizer, row)
        assert (tokenizer.decode(first.input_ids), learned(first, tokenizer)) == ("<user>a<assistant>hm,b", "hm,b")
        assert tokenizer.decode(second.input_ids) == "<user>a<assistant>b<user>c<assistant>hm,d"
        assert learned(second, tokenizer) == "hm,d"

    def test_a_token_that_begins_every_text_is_kept(self, instructions: ModuleType, tokenizer: Any) -> None:
        from tokenizers import processors

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <|endoftext|>", special_tokens=[("<s>", 257), ("<|endoftext|>", 256)]
        )
        rows = {"prompt": "a", "completion": "b"}, {"text": "c"}
        pair, text = self.examples(instructions, tokenizer, *rows)
        assert (pair.input_ids, pair.labels) == ([257, 97, 98, 256], [-100, -100, 98, 256])
        assert (text.input_ids, text.labels) == ([257, 99, 256], [-100, 99, 256])

    def test_a_token_that_reaches_into_an_answer_is_learned(self, instructions: ModuleType) -> None:
        from tokenizers import Tokenizer, models

        vocabulary = {"a": 0, "=": 1, "b": 2, "=b": 3, "bb": 4, "<end>": 5}
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("=", "b"), ("b", "b")]))
        tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
        rows = {"prompt": "aa=", "completion": "bbb"}, {"prompt": "a", "completion": "bb"}
        joined, apart = self.examples(instructions, tokenizer, *rows)
        assert (joined.input_ids, joined.labels) == ([0, 0, 3, 4, 5], [-100, -100, 3, 4, 5])
        assert (apart.input_ids, apart.labels) == ([0, 4, 5], [-100, 4, 5])

    @pytest.mark.parametrize(
        ("row", "parts"),
        [
            ({"question": "a", "answer": "b"}, ["has the columns answer, question", "prompt and completion", "body"]),
            ({}, ["has the columns (none)"]),
            ({"prompt": "a", "completion": None}, ["has the columns prompt;"]),
            ({"prompt": "a", "completion": 5}, ["holds '5' as completion; it must be text"]),
            ({"messages": "hello"}, ["messages without an answer"]),
            ({"messages": [{"role": "user", "content": "a"}]}, ["messages without an answer"]),
            (["a"], ["cannot be read as JSON", "it holds"]),
        ],
    )
    def test_a_row_that_fits_no_format_is_named(
        self,
        finetune_llm: ModuleType,
        options: Callable[..., list[str]],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        row: Any,
        parts: list[str],
    ) -> None:
        rows = [{"prompt": "a", "completion": "b"}] * 20
        for place in (3, 20):  # the second is held out
            path = write(tmp_path / "bad.jsonl", [*rows[: place - 1], row, *rows[place:]])
            assert finetune_llm.main(options(train_file=path, text_column="body")) == 2
            sentence = capsys.readouterr().err
            assert "Traceback" not in sentence
            assert all(part in sentence for part in [f"row {place} of --train_file", "bad.jsonl", *parts]), sentence

    def test_a_template_that_refuses_messages(self, instructions: ModuleType, tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ raise_exception('no system here') }}"
        row = {"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}
        with pytest.raises(ValueError, match="row .*chat template refuses: no system here"):
            self.examples(instructions, tokenizer, row)

    def test_files_of_every_kind(self, instructions: ModuleType, tmp_path: Path) -> None:
        from datasets import Dataset

        rows = [{"prompt": "a\u2028b", "completion": str(number)} for number in range(3)]
        (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        (tmp_path / "lines.json").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
        Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
        for name in ("list.json", "lines.json", "table.parquet"):
            assert instructions.read_rows(str(tmp_path / name), "train_file", "text") == rows
        (tmp_path / "text.txt").write_text("one\n\ntwo")
        assert instructions.read_rows(str(tmp_path / "text.txt"), "train_file", "body") == [{"body": "one\n\ntwo"}]
