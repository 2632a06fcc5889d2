"""examples/packing.py: blocks in which examples do not see one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf

from tests.helpers.models import tiny_gpt2

from .conftest import CONFIGS, PAIRS, SIZE


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

        wanted = sum((pairs(example.input_ids, example.labels) for example in examples), Counter())
        assert sum((pairs(row["input_ids"], row["labels"]) for row in blocks), Counter()) == wanted

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
    def test_packed_examples_score_as_they_do_alone(self, packing: ModuleType, name: str, attention: str) -> None:
        torch.manual_seed(0)
        config = tf.AutoConfig.for_model(**CONFIGS[name] | {"initializer_range": 0.2})
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        examples = self.examples(packing)
        numbers = packing.pack([len(example) for example in examples], SIZE)
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
