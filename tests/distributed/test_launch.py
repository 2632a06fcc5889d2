"""The examples under ``accelerate launch`` with the configs that lie beside them, on two processes of this CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tests.helpers.launching import LEAVING
from tests.helpers.warm import python


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
LAUNCH = ("-m", "accelerate.commands.launch", "--main_process_port=0", "--num_processes=2", "--mixed_precision=no")
# torch's FSDP refuses to offload from a CPU to a CPU.
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a model to train on it."""
    made = tmp_path_factory.mktemp("launch")
    (made / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    tokens = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    config = {"model_type": "llama", **shape, **heads, **tokens}
    # Weights on disk, as ZeRO-3 draws those of a new model in another order.
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(made / "model")
    return made


def run(folder: Path, engine: str, script: str, out: Path, *options: str) -> list[dict[str, float]]:
    """Run an example, and return what it printed of its log."""
    words = [f"--train_file={folder}/text.txt", f"--model_name_or_path={folder}/model", f"--output_dir={out}"]
    words += ["--max_steps=20", "--learning_rate=0.01", "--warmup_steps=2", "--logging_steps=5", "--block_size=32"]
    command = []
    if engine != "single":
        command += [*LAUNCH, f"--config_file={CONFIGS / engine}.yaml", *LEAVING, "-m", "tests.distributed.on_cpu"]
    command += [f"examples/{script}", *words, "--target_sparsity=0.8", *options]
    # One engine starts as users start it; the others fork from a process that has imported torch.
    done = python(*command, cold=engine == "ddp")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]


def zeros(folder: Path) -> float:
    report = json.loads((folder / "sparsity.json").read_text())
    saved = load_file(folder / "model.safetensors")
    decayed = [saved[each["name"]] for each in report["tensors"] if each["decayed"]]
    counted = sum(int((each == 0).sum()) for each in decayed) / sum(each.numel() for each in decayed)
    assert counted == report["sparsity"]
    return counted


def test_configs_are_what_accelerate_reads() -> None:
    names = {each.stem for each in CONFIGS.glob("*.yaml")}
    assert names == {"single_gpu", "ddp", "fsdp2", "fsdp2_offload", "zero2", "zero3", "cpu_ddp"}
    kinds = {}
    for name in names:
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        kinds[name] = str(config.distributed_type).rpartition(".")[2]
    assert kinds["fsdp2"] == kinds["fsdp2_offload"] == "FSDP"
    assert kinds["zero2"] == kinds["zero3"] == "DEEPSPEED"
    assert load_config_from_file(str(CONFIGS / "fsdp2_offload.yaml")).fsdp_config["fsdp_offload_params"] is True


def test_the_bare_loop_under_each_config(folder: Path, tmp_path: Path) -> None:
    loop = ("--batch_size=8", "--gradient_accumulation_steps=2", "--save_steps=10")
    logs = {
        engine: run(folder, engine, "no_trainer.py", tmp_path / engine, *loop, *on_cpu("cpu", engine))
        for engine in ("single", *ENGINES)
    }
    for engine, log in logs.items():
        assert [line["step"] for line in log] == [5, 10, 15, 20, 20]
        assert zeros(tmp_path / engine) == pytest.approx(0.8, abs=1e-3)
        assert log[-2]["sparsity"] == zeros(tmp_path / engine)
        assert log[-1]["eval_loss"] == pytest.approx(logs["single"][-1]["eval_loss"], abs=1e-3)
    for engine in ("fsdp2", "zero3"):
        checkpoint = f"--resume_from_checkpoint={tmp_path / engine / 'step-10'}"
        again = tmp_path / f"{engine} again"
        log = run(folder, engine, "no_trainer.py", again, *loop, *on_cpu("cpu", engine), checkpoint)
        assert log == logs[engine][2:]
        whole, resumed = (load_file(each / "model.safetensors") for each in (tmp_path / engine, again))
        assert all((each == resumed[name]).all() for name, each in whole.items())


@pytest.mark.parametrize("script", ["train_clm.py", "finetune_llm.py"])
def test_the_trainer_under_each_config(script: str, folder: Path, tmp_path: Path) -> None:
    for engine in ("single", *ENGINES):
        size = 8 if engine == "single" else 4
        batch = (f"--per_device_train_batch_size={size}", "--report_to=none", "--do_eval=false")
        run(folder, engine, script, tmp_path / engine, *batch, *on_cpu("use_cpu", engine))
        assert zeros(tmp_path / engine) == pytest.approx(0.8, abs=1e-3)


def on_cpu(name: str, engine: str) -> tuple[str, ...]:
    """The word that a script needs on a CPU; told it, Accelerate would leave DeepSpeed off."""
    return () if engine.startswith("zero") else (f"--{name}=true",)
