"""What only a GPU can show: nobody waits for it, CUDA graphs, its memory, and whole runs on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from hf_pdecay import AdamWLp, LpDecay, PDecayTrainer
from hf_pdecay.inference.choice import to_dense_inference, to_sparse_inference
from hf_pdecay.optim.dormancy import LATER
from tests.helpers.models import tiny_gpt2
from tests.helpers.reference.adamw_lp64 import Hyper, Reference


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (5, 1000, 4097, 300_000)


def params(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(seed)
    made = []
    for size in SIZES:
        weight, grad = (torch.randn(size, generator=generator, device="cuda") for _ in range(2))
        made.append(torch.nn.Parameter((0.1 * weight).to(dtype)))
        made[-1].grad = grad.to(dtype)
    return made


@pytest.fixture
def no_waiting() -> Any:
    """After its first call, whatever waits for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


class TestStep:
    @pytest.mark.parametrize("backend", ["auto", "triton", "foreach"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("moments", [None, "bfloat16"])
    def test_the_host_never_waits(
        self, moments: str | None, dtype: torch.dtype, backend: str, no_waiting: Callable[[], None]
    ) -> None:
        optimizer = AdamWLp(params(dtype), moments=moments, backend=backend)
        for _ in range(2):
            optimizer.step()
        no_waiting()
        for _ in range(3):
            optimizer.step()
        optimizer.param_groups[0]["lambda_p"] = 0.5
        optimizer.step()

    def test_tensors_that_began_as_zeros_do_not_hold_up_the_others(self, no_waiting: Callable[[], None]) -> None:
        weights = [*params(torch.float32), torch.nn.Parameter(torch.zeros(100, device="cuda"))]
        weights[-1].grad = torch.ones_like(weights[-1])
        optimizer = AdamWLp(weights)
        optimizer.step()
        no_waiting()
        for _ in range(5):
            optimizer.step()
            torch.cuda.current_stream().synchronize()
        assert optimizer.state[weights[-1]]["dormant"].is_cpu and optimizer._cache.last is not None

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
    def test_shards_that_began_as_zeros_do_not_hold_up_the_others(self, tmp_path: Path) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cuda", (1,))
            whole = [torch.randn(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")]
            sharded = [torch.nn.Parameter(distribute_tensor(each, mesh, [Shard(0)])) for each in whole]
            plain = [torch.nn.Parameter(each.clone()) for each in whole]
            optimizers = [AdamWLp(some, lambda_p=0.1) for some in (sharded, plain)]
            for _ in range(LATER + 3):
                for one, other in zip(sharded, plain, strict=True):
                    other.grad = torch.randn_like(other)
                    one.grad = distribute_tensor(other.grad, mesh, [Shard(0)])
                for optimizer in optimizers:
                    optimizer.step()
            assert optimizers[0].state[sharded[1]]["dormant"].is_cpu and optimizers[0]._cache.last is not None
            for one, other in zip(sharded, plain, strict=True):
                torch.testing.assert_close(one.full_tensor(), other, rtol=0, atol=0)  # type: ignore[attr-defined]
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("group", ["row", "column", "2:4"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_groups_take_few_launches_and_no_wait(
        self, dtype: torch.dtype, group: str, no_waiting: Callable[[], None]
    ) -> None:
        weights = [torch.nn.Parameter((0.1 * torch.randn(64, 256, device="cuda")).to(dtype)) for _ in range(20)]
        optimizer = AdamWLp([{"params": weights, "group": group}], lambda_p=0.1)
        for step in range(5):
            for each in weights:
                each.grad = torch.randn_like(each)
            if step == 3:
                no_waiting()
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        assert sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) < 20

    def test_auto_is_the_kernel(self) -> None:
        optimizer = AdamWLp(params(torch.float32))
        optimizer.step()
        assert optimizer.backends["cuda"][0] == "triton"

    @pytest.mark.parametrize("backend", ["triton", "foreach", "reference"])
    @pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 1.2, 2.0, 3.0])
    def test_equals_the_reference(self, p_norm: float, backend: str) -> None:
        settings = Hyper(lr=0.01, weight_decay=0.1, p_norm=p_norm, lambda_p=0.5)
        options = dataclasses.asdict(settings)
        betas = options.pop("beta1"), options.pop("beta2")
        weights = params(torch.float32)[:3]
        references = [Reference(each.detach().double().cpu().numpy()) for each in weights]
        optimizer = AdamWLp(weights, betas=betas, backend=backend, **options)
        for _ in range(3):
            optimizer.step()
            for each, reference in zip(weights, references, strict=True):
                assert each.grad is not None
                reference.step(each.grad.double().cpu().tolist(), settings)
        for each, reference in zip(weights, references, strict=True):
            expected = torch.from_numpy(reference.weight)
            torch.testing.assert_close(each.detach().double().cpu(), expected, rtol=2e-4, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_graph_replays_what_steps_do(self, dtype: torch.dtype) -> None:
        captured, plain = params(dtype), params(dtype)
        lr = torch.tensor(1e-2, device="cuda")
        optimizer, other = (AdamWLp(some, lr=lr, lambda_p=0.1) for some in (captured, plain))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(2):
            other.step()
        for k in range(3):
            lr.fill_(1e-2 / (k + 1))
            graph.replay()
            other.step()
        for ours, theirs in zip(captured, plain, strict=True):
            assert torch.equal(ours, theirs)
            assert float(optimizer.state[ours]["step"]) == 5

    def test_memory_and_launches(self) -> None:
        weights = params(torch.float32)
        optimizer = AdamWLp(weights)
        for _ in range(2):
            optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 1 << 20
        names = [event.name for event in profile.events()]
        assert sum("update" in name for name in names) == 1
        assert sum("prepare" in name for name in names) == 1

    def test_a_step_with_nan_is_skipped_and_counted(self) -> None:
        weights = params(torch.bfloat16)
        optimizer = AdamWLp(weights)
        optimizer.step()
        before = [each.detach().clone() for each in weights]
        assert weights[2].grad is not None
        weights[2].grad[7] = float("nan")
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
        assert optimizer.skipped_steps == 1

    def test_eight_bit_moments(self) -> None:
        pytest.importorskip("torchao")
        weights = [torch.nn.Parameter(torch.randn(256, 256, device="cuda") * 0.1)]
        target = torch.randn(256, 256, device="cuda") * 0.1
        optimizer = AdamWLp(weights, lr=1e-2, lambda_p=1e-4, moments="8bit")
        losses = []
        for _ in range(50):
            loss = (weights[0] - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert type(optimizer.state[weights[0]]["exp_avg"]) is not torch.Tensor

    @pytest.mark.parametrize("fused", [True, False])
    def test_around_torchs_adamw(self, fused: bool) -> None:
        around, ours = params(torch.float32), params(torch.float32)
        options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
        wrapper = LpDecay(torch.optim.AdamW(around, **options, fused=fused), p_norm=0.8, lambda_p=0.1)
        optimizer = AdamWLp(ours, **options, lambda_p=0.1)
        for _ in range(3):
            wrapper.step()
            optimizer.step()
        for a, b in zip(around, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class TestRuns:
    def run(self, make_args: Any, tokens: Any, folder: Path, resume: str | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        arguments = {"use_cpu": False, "max_steps": 40, "lambda_p": 0.01, "p_norm": 0.8, **options}
        args = make_args(output_dir=str(folder), **arguments)
        trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return trainer

    @pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
    def test_the_sparsity_asked_for(self, precision: Any, make_args: Any, tokens: Any, tmp_path: Path) -> None:
        trainer = self.run(make_args, tokens, tmp_path, target_sparsity=0.9, **precision)
        assert next(trainer.model.parameters()).is_cuda
        saved = load_file(tmp_path / "model.safetensors")
        decayed = [each.name for each in trainer.measure_sparsity().tensors if each.decayed]
        zeros = sum(int((saved[name] == 0).sum()) for name in decayed)
        assert abs(zeros / sum(saved[name].numel() for name in decayed) - 0.9) < 1e-3

    def test_a_resumed_run_ends_with_the_same_weights(self, make_args: Any, tokens: Any, tmp_path: Path) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            options = {
                "target_sparsity": 0.8,
                "save_strategy": "steps",
                "save_steps": 12,
                "per_device_train_batch_size": 4,
            }
            self.run(make_args, tokens, tmp_path / "whole", **options)
            checkpoint = str(tmp_path / "whole" / "checkpoint-24")
            self.run(make_args, tokens, tmp_path / "resumed", resume=checkpoint, **options)
        finally:
            torch.use_deterministic_algorithms(False)
        left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
        assert all(torch.equal(left[name], right[name]) for name in left)


class TestTwoOfFour:
    def model(self) -> Any:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "initializer_range": 0.1}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).eval().to("cuda", torch.bfloat16)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                weight = module.weight.data.unflatten(-1, (-1, 4))
                least = weight.abs().topk(2, -1, largest=False).indices
                weight.scatter_(-1, least, 0.0)
        return model

    @torch.no_grad()
    def test_same_outputs_and_back(self, tmp_path: Path) -> None:
        model = self.model()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        ids = torch.randint(0, 64, (3, 17), device="cuda")
        expected = model(ids).logits.float()
        choices = to_sparse_inference(model, min_sparsity=0.4)
        assert sum(each.swapped for each in choices) == 14
        assert [each.reason for each in choices if not each.swapped] == ["its weights are not 2:4"]
        found = model(ids).logits.float()
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        assert float((found - expected).norm() / expected.norm()) < 0.02
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (3, 21)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(saved[name], state[name].cpu()) for name in saved)
        with pytest.raises(RuntimeError, match="to_dense_inference"):
            model.model.layers[0].mlp.up_proj.float()
        to_dense_inference(model)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_measured(self) -> None:
        choices = to_sparse_inference(self.model(), rows=64)
        assert all(
            each.speedup is not None and each.speedup > 0 for each in choices if not each.reason.startswith("its")
        )
