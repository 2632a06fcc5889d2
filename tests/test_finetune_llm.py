"""examples/finetune_llm.py: every format, packing that keeps examples apart, and whole runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from hf_pdecay import PDecayTrainer
from tests.models import tiny_gpt2


ROOT = Path(__file__).parents[1]
# Port 0 is any that is free: tests run beside one another.
ACCELERATE = ("-m", "accelerate.commands.launch", "--main_process_port=0")
CPU_DDP = (*ACCELERATE, "--config_file", "examples/accelerate_configs/cpu_ddp.yaml")
SIZE = 96
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SIZE,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"model_type": "llama"},
    "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": SHAPE | {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": SHAPE | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
PAIRS = [(f"{n} + {n + 3} =", f" {2 * n + 3}" + "!" * (n % 7)) for n in range(120)]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours, as they do when they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def finetune_llm() -> ModuleType:
    return importlib.import_module("finetune_llm")


@pytest.fixture
def instructions() -> ModuleType:
    return importlib.import_module("instructions")


@pytest.fixture
def packing() -> ModuleType:
    return importlib.import_module("packing")


@pytest.fixture
def tokenizer(instructions: ModuleType) -> Any:
    return instructions.byte_tokenizer()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS])


def config_folder(tmp_path: Path, name: str) -> Path:
    (folder := tmp_path / name).mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


@pytest.fixture
def options(tmp_path: Path, pairs_file: Path) -> Callable[..., list[str]]:
    """The command line of a short run on the CPU."""

    def make(model: str = "llama", **given: Any) -> list[str]:
        chosen = {"config_name": config_folder(tmp_path, model), "output_dir": tmp_path / "out", "max_steps": 20}
        chosen |= {"train_file": pairs_file, "use_cpu": "true", "disable_tqdm": "true", "learning_rate": 0.01}
        chosen |= {"logging_steps": 5, "per_device_train_batch_size": 4, **given}
        return [f"--{name}={value}" for name, value in chosen.items() if value is not None]

    return make


def learned(example: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != -100]))


def recount(folder: Path) -> tuple[int, int]:
    """Zeros and weights of the matrices of the layers, from the file alone."""
    saved = load_file(folder / "model.safetensors")
    matrices = [each for name, each in saved.items() if ".layers." in name or ".h." in name]
    matrices = [each for each in matrices if each.dim() == 2]
    return sum(int((each == 0).sum()) for each in matrices), sum(each.numel() for each in matrices)


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
        assert {learned(each, tokenizer) for each in (full, empty)} == {"8<|endoftext|>"}
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


class TestPacking:
    def examples(self, packing: ModuleType, count: int = 40, longest: int = 30) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        made = []
        for _ in range(count):
            ids = torch.randint(0, 64, (int(torch.randint(2, longest, (), generator=generator)),), generator=generator)
            silent = int(torch.randint(1, len(ids), (), generator=generator))
            made.append(packing.Example(ids.tolist(), [-100] * silent + ids[silent:].tolist()))
        return made

    def test_every_learned_token_is_in_one_block(self, packing: ModuleType) -> None:
        examples = self.examples(packing, 200, 100)
        pieces = [piece for example in examples for piece in packing.fit(example, 32)]
        numbers = packing.pack([len(piece) for piece in pieces], 32)
        assert sorted(number for block in numbers for number in block) == list(range(len(pieces)))
        blocks = packing.to_dataset([[pieces[number] for number in block] for block in numbers])
        assert max(len(block["input_ids"]) for block in blocks) <= 32
        assert len(blocks) < 1.1 * sum(map(len, pieces)) / 32

        def pairs(ids: list[int], labels: list[int]) -> Counter[tuple[int, int]]:
            return Counter((before, label) for before, label in zip(ids, labels[1:], strict=False) if label != -100)

        wanted = sum((pairs(each.input_ids, each.labels) for each in examples), Counter())
        assert sum((pairs(row["input_ids"], row["labels"]) for row in blocks), Counter()) == wanted

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
    def test_packed_examples_score_as_they_do_alone(self, packing: ModuleType, name: str, attention: str) -> None:
        torch.manual_seed(0)
        config = tf.AutoConfig.for_model(**CONFIGS[name] | {"initializer_range": 0.2})
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        examples = self.examples(packing)
        numbers = packing.pack([len(each) for each in examples], SIZE)
        rows = list(packing.to_dataset([[examples[number] for number in block] for block in numbers]))
        assert len({len(row["input_ids"]) for row in rows}) > 1  # so that some are filled up
        batch = packing.Collator(True, 0, packing.model_options(model))(rows)
        with torch.no_grad():
            output = model(**batch)
            loss = count = 0.0
            for place, block in enumerate(numbers):
                start = 0
                for example in (examples[number] for number in block):
                    tokens = torch.tensor([example.input_ids])
                    alone = model(tokens, labels=torch.tensor([example.labels]))
                    packed = output.logits[place, start : start + len(example)]
                    torch.testing.assert_close(packed, alone.logits[0], rtol=1e-4, atol=1e-5)
                    loss, count = loss + float(alone.loss) * example.learned, count + example.learned
                    start += len(example)
            assert float(output.loss) == pytest.approx(loss / count, rel=1e-5)
            assert packing.keeps_apart(model, 2)
            # Without positions that begin anew they do see one another: the comparison above can fail.
            leaking = model(batch["input_ids"]).logits
            assert not torch.allclose(leaking[0, : len(rows[0]["input_ids"])], output.logits[0], rtol=1e-2, atol=1e-2)
        assert model.training is False

    def test_a_model_that_lets_examples_see_one_another_is_found_out(self, packing: ModuleType) -> None:
        torch.manual_seed(0)
        assert not packing.keeps_apart(
            tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(**CONFIGS["opt"])), 2
        )
        mamba = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4}
        assert not packing.keeps_apart(tf.MambaForCausalLM(tf.MambaConfig(**mamba)), 2)
        assert packing.keeps_apart(tiny_gpt2(), 1)

    def test_where_weights_are_not_at_hand_the_class_decides(
        self, finetune_llm: ModuleType, make_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = make_args(per_device_train_batch_size=2, per_device_eval_batch_size=1)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(**CONFIGS["llama"]))
            mamba = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
        assert finetune_llm.can_pack(model, args)
        assert not finetune_llm.can_pack(mamba, args)
        model.config._attn_implementation_internal = "flash_attention_2"  # which cannot be had here
        assert not finetune_llm.can_pack(model, args)
        args.per_device_train_batch_size = 1
        assert finetune_llm.can_pack(model, args)

    @pytest.mark.parametrize(("model", "packed"), [("llama", True), ("opt", False)])
    def test_an_epoch_learns_every_token_of_every_answer_once(
        self, finetune_llm: ModuleType, options: Callable[..., list[str]], model: str, packed: bool
    ) -> None:
        epoch = {"max_steps": None, "num_train_epochs": 1, "validation_fraction": 0, "lambda_p": 0}
        trainer, tokenizer, _ = finetune_llm.prepare(options(model, **epoch))
        seen: list[str] = []
        most = 0

        def record(module: Any, args: Any, given: dict[str, Any]) -> None:
            nonlocal most
            most = max(most, given["input_ids"].shape[1])
            assert ("position_ids" in given, "attention_mask" in given) == (packed, not packed)
            for row in given["labels"].tolist():
                answers = tokenizer.decode([label for label in row if label != -100])
                seen.extend(answers.split("<|endoftext|>")[:-1])

        trainer.model.register_forward_pre_hook(record, with_kwargs=True)
        trainer.train()
        assert Counter(seen) == Counter(answer for _, answer in PAIRS)
        assert (most > SIZE - 20) == packed


class TestRuns:
    @pytest.mark.parametrize("model", ["llama", "qwen3", "gpt2"])
    def test_reaches_the_target_to_the_weight(
        self, finetune_llm: ModuleType, options: Callable[..., list[str]], model: str, tmp_path: Path
    ) -> None:
        assert finetune_llm.main(options(model, target_sparsity=0.7)) == 0
        out = tmp_path / "out"
        assert {"README.md", "sparsity.json", "sparsity.jsonl", "config.json", "tokenizer.json"} <= set(os.listdir(out))
        zeros, weights = recount(out)
        assert zeros == round(0.7 * weights)
        assert json.loads((out / "sparsity.json").read_text())["sparsity"] == zeros / weights
        results = json.loads((out / "all_results.json").read_text())
        assert results["train_loss"] < 5.5
        tuned, tokenizer = tf.AutoModelForCausalLM.from_pretrained(out).eval(), tf.AutoTokenizer.from_pretrained(out)
        assert tuned.config.vocab_size == len(tokenizer) == 257
        # The perplexity of the answers of the last tenth, computed anew, one by one.
        nll = count = 0.0
        for prompt, answer in PAIRS[108:]:
            tokens = torch.tensor([[*prompt.encode(), *answer.encode(), 256]])
            with torch.no_grad():
                scores = tuned(tokens).logits[0, :-1].double().log_softmax(-1)
            each = -scores.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :, 0]
            nll, count = nll + float(each.sum()), count + len(each)
        assert results["eval_perplexity"] == pytest.approx(float(torch.tensor(nll / count).exp()), rel=1e-4)

    @pytest.mark.slow
    def test_a_model_goes_on_with_bf16_checkpointing_and_a_larger_vocabulary(
        self, finetune_llm: ModuleType, options: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        first = tmp_path / "first"
        chat = write(
            tmp_path / "chat.jsonl",
            [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in PAIRS],
        )
        assert finetune_llm.main(options(target_sparsity=0.5, output_dir=first, train_file=chat)) == 0
        tokenizer = tf.AutoTokenizer.from_pretrained(first)
        messages = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith("ant:\n")
        tokenizer.add_tokens(["<tool>", "</tool>"])
        tokenizer.save_pretrained(tmp_path / "grown")
        more = {"bf16": "true", "gradient_checkpointing": "true", "tokenizer_name": tmp_path / "grown"}
        more |= {"config_name": None, "model_name_or_path": first, "keep_zeros": "true", "target_sparsity": 0.6}
        assert finetune_llm.main(options(dtype="bfloat16", **more)) == 0
        zeros, weights = recount(tmp_path / "out")
        assert zeros == round(0.6 * weights)
        saved, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", first))
        assert saved["model.embed_tokens.weight"].shape == (259, 32)
        assert saved["model.embed_tokens.weight"].dtype == torch.bfloat16
        name = "model.layers.0.mlp.up_proj.weight"
        assert bool((saved[name][before[name] == 0] == 0).all())

    def test_defaults(self, finetune_llm: ModuleType) -> None:
        groups = (finetune_llm.ModelArguments, finetune_llm.DataArguments, finetune_llm.PDecayTrainingArguments)

        def parsed(*argv: str) -> Any:
            return finetune_llm.parse_options(["--use_cpu=true", *argv], groups, finetune_llm.default_options)[2]

        dense, sparse = parsed("--model_name_or_path=x"), parsed("--model_name_or_path=x", "--target_sparsity=0.5")
        assert dense.learning_rate < sparse.learning_rate < parsed().learning_rate
        assert [args.get_warmup_steps(1000) for args in (dense, sparse, parsed("--warmup_steps=7"))] == [30, 30, 7]
        assert dense.lr_scheduler_type == "cosine"

    def test_without_a_file_it_learns_the_standard_library(self, finetune_llm: ModuleType, tmp_path: Path) -> None:
        argv = ["--use_cpu=true", f"--output_dir={tmp_path}", "--max_train_samples=50", "--max_eval_samples=5"]
        trainer, tokenizer, data = finetune_llm.prepare(argv)
        assert (data.block_size, len(trainer.train_dataset)) == (64, 50)
        row = trainer.train_dataset[0]
        assert row["labels"][1:] == row["input_ids"][1:]

    @pytest.mark.parametrize(
        ("given", "parts"),
        [
            ({"target_sparsity": 1.5}, ["target_sparsity", "1.5"]),
            ({"train_file": "nowhere.jsonl"}, ["--train_file", "nowhere.jsonl", "missing"]),
            ({"block_size": 97}, ["--block_size 97", "96 positions"]),
            ({"attn_implementation": "fast"}, ["fast"]),
            ({"preset": "tiny"}, ["--config_name and --preset"]),
        ],
    )
    def test_complaints(
        self,
        finetune_llm: ModuleType,
        options: Callable[..., list[str]],
        capsys: pytest.CaptureFixture[str],
        given: dict[str, Any],
        parts: list[str],
    ) -> None:
        assert finetune_llm.main(options(**given)) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if "finetune_llm.py: error:" in line]
        assert len(lines) == 1 and "Traceback" not in captured.err
        assert all(part in lines[0] for part in parts), lines[0]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU may know bfloat16")
    def test_bf16_is_refused_where_the_device_does_not_know_it(
        self, finetune_llm: ModuleType, options: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert finetune_llm.main(options(use_cpu=None, bf16="true")) == 2
        assert "bf16" in capsys.readouterr().err


class TestProcesses:
    def launch(self, launcher: tuple[str, ...], *argv: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, "examples/finetune_llm.py", *argv]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    @pytest.mark.slow
    def test_two_processes_reach_the_target_together(self, options: Callable[..., list[str]], tmp_path: Path) -> None:
        argv = options(target_sparsity=0.7, gradient_checkpointing="true", per_device_train_batch_size=2)
        both = self.launch(CPU_DDP, *argv)
        assert both.returncode == 0, both.stdout + both.stderr
        zeros, weights = recount(tmp_path / "out")
        assert zeros == round(0.7 * weights)
        results = json.loads((tmp_path / "out" / "all_results.json").read_text())
        alone = self.launch((), *options(target_sparsity=0.7, output_dir=tmp_path / "alone"))
        assert alone.returncode == 0, alone.stderr
        one = json.loads((tmp_path / "alone" / "all_results.json").read_text())
        assert results["epoch"] == one["epoch"]  # as many blocks a step
        assert results["eval_perplexity"] == pytest.approx(one["eval_perplexity"], rel=0.02)

    @pytest.mark.slow
    def test_a_script_of_its_own_complains_without_a_traceback(self, options: Callable[..., list[str]]) -> None:
        done = self.launch((), *options(p_norm=-1))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert [line for line in done.stderr.splitlines() if "finetune_llm.py: error:" in line and "p_norm" in line]

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would find each other on a GPU")
    def test_processes_that_do_not_find_each_other_are_refused(self, options: Callable[..., list[str]]) -> None:
        launcher = (*CPU_DDP[:2], "--multi_gpu", "--num_processes=2")
        done = self.launch(launcher, *options(use_cpu=None))
        assert done.returncode != 0
        assert "2 processes were started" in done.stderr and "use_cpu" in done.stderr

    def test_so_does_the_trainer_of_any_optimizer(
        self, make_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both = [make_args(optim=optim) for optim in ("adamw_lp", "adamw_torch")]
        for started in ("1", "2"):
            monkeypatch.setenv("WORLD_SIZE", started)
            for args in both:
                if started == "1":
                    PDecayTrainer(model=tiny_gpt2(), args=args)
                    continue
                with pytest.raises(ValueError, match="2 processes were started .* world_size=1"):
                    PDecayTrainer(model=tiny_gpt2(), args=args)
