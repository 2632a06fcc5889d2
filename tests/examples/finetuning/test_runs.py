"""examples/finetune_llm.py: whole runs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from hf_pdecay import PDecayTrainer
from tests.helpers.launching import LEAVING
from tests.helpers.models import tiny_gpt2
from tests.helpers.warm import python

from .conftest import PAIRS, SIZE, write


# Port 0 is any that is free: tests run beside one another.
ACCELERATE = ("-m", "accelerate.commands.launch", "--main_process_port=0")
CPU_DDP = (*ACCELERATE, "--config_file", "examples/accelerate_configs/cpu_ddp.yaml")


def recount(folder: Path) -> tuple[int, int]:
    """Zeros and weights of the matrices of the layers, from the file alone."""
    saved = load_file(folder / "model.safetensors")
    matrices = [matrix for name, matrix in saved.items() if ".layers." in name or ".h." in name]
    matrices = [matrix for matrix in matrices if matrix.dim() == 2]
    return sum(int((matrix == 0).sum()) for matrix in matrices), sum(matrix.numel() for matrix in matrices)


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
            losses = -scores.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :, 0]
            nll, count = nll + float(losses.sum()), count + len(losses)
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

    def test_prompts_have_room_and_what_is_cut_is_reported(
        self,
        finetune_llm: ModuleType,
        options: Callable[..., list[str]],
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
    ) -> None:
        rows = [{"prompt": "x" * size, "completion": " no"} for size in (60, 300, 1500)]
        given = {"train_file": write(tmp_path / "long.jsonl", rows), "validation_fraction": 0}
        data = finetune_llm.prepare(options(config_name=None, **given))[2]
        assert data.block_size == 1024
        assert "1 of 3 examples of --train_file" in caplog.text
        assert "longer than --block_size 1024, the longest has 1504 tokens; they are split" in caplog.text
        assert finetune_llm.prepare(options(**given))[2].block_size == SIZE  # the model's context

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
        return python(*launcher, "examples/finetune_llm.py", *argv)

    @pytest.mark.slow
    def test_two_processes_reach_the_target_together(self, options: Callable[..., list[str]], tmp_path: Path) -> None:
        argv = options(target_sparsity=0.7, gradient_checkpointing="true", per_device_train_batch_size=2)
        both = self.launch((*CPU_DDP, *LEAVING), *argv)
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
        launcher = (*CPU_DDP[:2], "--multi_gpu", "--num_processes=2", *LEAVING)
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
