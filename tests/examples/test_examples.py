from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ..helpers.warm import python


ROOT = Path(__file__).parents[2]
TEXT = "".join(
    f"{number} bottles of beer on the wall, take one down and pass it around.\n" for number in range(99, 0, -1)
)


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours, as they do when they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def train_clm() -> ModuleType:
    return importlib.import_module("train_clm")


@pytest.fixture
def finetune_classifier() -> ModuleType:
    return importlib.import_module("finetune_classifier")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    (tmp_path / "beer.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "beer.txt"


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """The config of a GPT-2 that trains in no time."""
    (folder := tmp_path / "config").mkdir()
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 256}
    config = {"model_type": "gpt2", **shape, "bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def clm_options(tmp_path: Path, text_file: Path, tiny_config: Path) -> list[str]:
    options = {"train_file": text_file, "config_name": tiny_config, "output_dir": tmp_path / "out", "max_steps": 4}
    options |= {"per_device_train_batch_size": 4, "generate_tokens": 40, "use_cpu": "true", "disable_tqdm": "true"}
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a main function that must refuse its arguments; returns the sentence."""

    def run(main: Callable[[list[str]], int], *argv: str) -> str:
        capsys.readouterr()
        assert main(list(argv)) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if "error:" in line]
        assert len(lines) == 1
        assert "Traceback" not in captured.err + captured.out
        return lines[0]

    return run


class TestTrainClm:
    def test_leaves_a_sparse_model_that_plain_transformers_loads(
        self, train_clm: ModuleType, clm_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sparse = [
            "--max_steps=20",
            "--p_norm=0.5",
            "--lambda_p=3",
            "--learning_rate=0.01",
            "--generate_prompt=99 ",
            "--logging_steps=2",
        ]
        assert train_clm.main([*clm_options, *sparse]) == 0
        out = tmp_path / "out"
        assert "----- generated text -----\n99 " in capsys.readouterr().out
        assert {"README.md", "sparsity.json", "sparsity.jsonl", "sparsity.png", "config.json"} <= set(os.listdir(out))
        model = AutoModelForCausalLM.from_pretrained(out)
        tensors = load_file(out / "model.safetensors")
        ends = ("attn.weight", "proj.weight", "fc.weight")
        decayed = [array for name, array in tensors.items() if name.endswith(ends)]
        zeros = sum(int((array == 0).sum()) for array in decayed) / sum(array.size for array in decayed)
        assert zeros > 0.5
        assert json.loads((out / "sparsity.json").read_text())["sparsity"] == pytest.approx(zeros)

        # The figures, computed anew from the saved folder: the last tenth of the text, in blocks of 32 bytes.
        held_out = np.frombuffer(TEXT[int(len(TEXT) * 0.9) :].encode(), dtype=np.uint8).astype(np.int64)
        blocks = torch.from_numpy(held_out[: len(held_out) // 32 * 32].reshape(-1, 32))
        with torch.no_grad():
            scores = model.eval()(blocks).logits[:, :-1].double().log_softmax(-1)
        nll = -scores.gather(-1, blocks[:, 1:, None]).mean()
        results = json.loads((out / "eval_results.json").read_text())
        assert results["eval_perplexity"] == pytest.approx(float(nll.exp()), rel=1e-5)
        assert results["eval_loss"] == pytest.approx(float(nll), rel=1e-5)
        hits = (scores.argmax(-1) == blocks[:, 1:]).double().mean()
        assert results["eval_token_accuracy"] == pytest.approx(float(hits), abs=1e-4)

    def test_the_embedded_text_is_the_same_each_time_and_split_by_file(self, train_clm: ModuleType) -> None:
        train, validation = train_clm.standard_library()
        assert (train, validation) == train_clm.standard_library()
        size = sum(map(len, train + validation))
        assert 1_000_000 < size <= 4_000_000
        assert 0.02 < sum(map(len, validation)) / size < 0.25
        assert not set(train) & set(validation)

    @pytest.mark.parametrize("preset", ["tiny", "nanogpt", "gpt2-small", "llama-tiny"])
    def test_presets_make_models_of_their_block_size(self, train_clm: ModuleType, preset: str) -> None:
        groups = (train_clm.ModelArguments, train_clm.DataArguments, train_clm.PDecayTrainingArguments)
        model_args, data, args = train_clm.parse_options(["--preset", preset], groups, train_clm.default_options)
        with torch.device("meta"):
            model = train_clm.load_model(model_args, None, data)
        assert (model.config.vocab_size, model.config.max_position_embeddings) == (256, data.block_size)
        assert args.learning_rate >= 6e-4
        millions = {"tiny": 0.83, "nanogpt": 10.8, "gpt2-small": 86, "llama-tiny": 0.87}
        assert model.num_parameters() / 1e6 == pytest.approx(millions[preset], rel=0.02)

    def test_what_the_user_gives_goes_before_the_preset(self, train_clm: ModuleType) -> None:
        assert "max_steps" not in train_clm.default_options({"num_train_epochs": 1.0})
        assert not {"learning_rate", "max_steps"} & set(train_clm.default_options({"model_name_or_path": "gpt2"}))

    def test_options_come_from_a_file_and_the_command_line_overrides_them(
        self, train_clm: ModuleType, tmp_path: Path
    ) -> None:
        groups = (train_clm.ModelArguments, train_clm.DataArguments, train_clm.PDecayTrainingArguments)
        (tmp_path / "options.yaml").write_text(
            "learning_rate: 1e-3\np_norm: 0.5\nblock_size: 16\nbf16: false\nmax_steps: 7\ntrain_file: null\n"
            "lp_rules: {mlp: {p_norm: 0.7}}\n"
        )
        (tmp_path / "options.json").write_text('{"learning_rate": 1e-3, "p_norm": 0.5, "block_size": 16}')
        for name, steps in (("options.yaml", 7), ("options.json", 1000)):
            _, data, args = train_clm.parse_options([str(tmp_path / name)], groups, train_clm.default_options)
            assert (args.learning_rate, args.p_norm, data.block_size, args.max_steps) == (1e-3, 0.5, 16, steps)
        argv = [str(tmp_path / "options.yaml"), "--max_steps", "3"]
        args = train_clm.parse_options(argv, groups, train_clm.default_options)[2]
        assert args.max_steps == 3
        assert args.lp_rules["mlp"]["p_norm"] == 0.7

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
    def test_tables_are_documents(self, train_clm: ModuleType, tmp_path: Path, suffix: str) -> None:
        rows = [f"document {number}" for number in range(10)]
        table = Dataset.from_dict({"body": rows, "number": list(range(10))})
        path = str(tmp_path / f"table{suffix}")
        {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[suffix](path)
        data = train_clm.DataArguments(train_file=path, text_column="body", validation_fraction=0.2)
        assert train_clm.load_documents(data)[:2] == (rows[:8], rows[8:])

    def test_a_tokenizer_ends_documents_and_goes_into_the_folder(
        self, train_clm: ModuleType, finetune_classifier: ModuleType, text_file: Path, tmp_path: Path
    ) -> None:
        tokenizer = finetune_classifier.train_tokenizer([TEXT], 128, 32)
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        blocks = train_clm.to_blocks(["take one down", "pass it"], tokenizer, 7, None, "test")
        assert tokenizer.decode(blocks[0]["input_ids"]) == "take one down [SEP] pass it [SEP]"
        argv = ["--preset=tiny", "--block_size=16", "--max_steps=2", "--use_cpu=true", "--disable_tqdm=true"]
        argv += [f"--train_file={text_file}", f"--tokenizer_name={tmp_path / 'tokenizer'}"]
        argv += [f"--output_dir={tmp_path / 'out'}"]
        assert train_clm.main([*argv, "--generate_tokens=30", "--generate_prompt=take one"]) == 0
        assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(tokenizer)

    def test_a_model_of_bytes_is_trained_on_as_one(
        self, train_clm: ModuleType, clm_options: list[str], text_file: Path, tmp_path: Path
    ) -> None:
        assert train_clm.main([*clm_options, "--lambda_p=0", "--generate_tokens=0"]) == 0
        argv = [f"--model_name_or_path={tmp_path / 'out'}", f"--train_file={text_file}", "--max_steps=1"]
        trainer, tokenizer, data = train_clm.prepare([*argv, f"--output_dir={tmp_path / 'again'}", "--use_cpu=true"])
        assert (tokenizer, data.block_size) == (None, 32)
        saved = load_file(tmp_path / "out" / "model.safetensors")
        weights = trainer.model.state_dict()
        assert all(np.array_equal(array, weights[name].numpy()) for name, array in saved.items())

    @pytest.mark.slow
    def test_resumes_to_the_very_weights(self, train_clm: ModuleType, clm_options: list[str], tmp_path: Path) -> None:
        options = [*clm_options, "--generate_tokens=0", "--save_steps=2", "--lambda_p=1"]
        assert train_clm.main(options) == 0
        whole = load_file(tmp_path / "out" / "model.safetensors")
        for path in (tmp_path / "out").glob("checkpoint-4"):
            path.rename(tmp_path / "out-of-the-way")
        for asked in ("true", str(tmp_path / "out" / "checkpoint-2")):
            (tmp_path / "out" / "model.safetensors").unlink()
            assert train_clm.main([*options, f"--resume_from_checkpoint={asked}", "--save_strategy=no"]) == 0
            resumed = load_file(tmp_path / "out" / "model.safetensors")
            assert all(np.array_equal(resumed[name], whole[name]) for name in whole)

    @pytest.mark.slow
    def test_runs_as_a_script_and_complains_in_one_sentence(self, clm_options: list[str]) -> None:
        words = [ROOT / "examples" / "train_clm.py", *clm_options]
        done = python(*words)
        assert done.returncode == 0, done.stderr
        assert "eval_perplexity" in done.stdout
        done = python(*words, "--p_norm=-1")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert [line for line in done.stderr.splitlines() if "p_norm" in line and "-1" in line]


class TestBadInputOfTrainClm:
    @pytest.mark.parametrize(
        ("argv", "parts"),
        [
            (["--p_norm=0"], ["p_norm", "0"]),
            (["--p_norm=nan"], ["p_norm", "nan"]),
            (["--lambda_p=-2"], ["lambda_p", "-2"]),
            (["--p_norm=large"], ["p_norm", "large"]),
            (["--optim=sgdd"], ["optim", "sgdd"]),
            (["--preset=huge"], ["preset", "huge", "nanogpt"]),
            (["--dtype=int8"], ["dtype", "int8", "bfloat16"]),
            (["--no_such_option=1"], ["no_such_option"]),
            (["--preset=tiny", "--config_name=x"], ["--config_name and --preset"]),
            (["--train_file=nowhere.txt"], ["--train_file", "nowhere.txt", "missing"]),
            (["--validation_file=x.txt"], ["--validation_file", "x.txt", "--train_file"]),
            (["--validation_fraction=1"], ["--validation_fraction", "1.0", "below 1"]),
            (["--block_size=1"], ["--block_size", "1", "at least 2"]),
            (["--max_train_samples=0"], ["--max_train_samples", "0", "at least 1"]),
            (["nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
            (["--lp_rules=["], ["lp_rules"]),
            (["--learning_rate=-1"], ["learning_rate", "-1"]),
            (["--adam_beta1=1.5"], ["adam_beta1", "1.5", "below 1"]),
            (["--optim=adamw_torch", "--learning_rate=-1"], ["-1"]),
            (["--per_device_train_batch_size=0"], ["--per_device_train_batch_size", "0", "at least 1"]),
            (["--generate_tokens=-3"], ["--generate_tokens", "-3", "at least 0"]),
            (["--resume_from_checkpoint=."], ["--resume_from_checkpoint", "is not a checkpoint"]),
            ([f"--output_dir={__file__}"], ["--output_dir", "is a file"]),
        ],
    )
    def test_options(self, train_clm: ModuleType, complaint: Any, argv: list[str], parts: list[str]) -> None:
        sentence = complaint(train_clm.main, *argv)
        assert all(part in sentence for part in parts), sentence

    def test_files(self, train_clm: ModuleType, complaint: Any, clm_options: list[str], tmp_path: Path) -> None:
        def refused(name: str, content: bytes, *argv: str) -> str:
            (tmp_path / name).write_bytes(content)
            sentence = complaint(train_clm.main, *clm_options, f"--train_file={tmp_path / name}", *argv)
            assert name in sentence or "--text_column" in sentence
            return sentence

        assert "is empty" in refused("empty.txt", b"")
        assert "not UTF-8 text, see byte 3" in refused("latin.txt", b"caf\xe9 au lait")
        assert "unknown suffix" in refused("data.xyz", b"text")
        assert "has 18 tokens; --block_size 32" in refused("short.txt", b"twenty characters...")
        assert "'text' is not in --train_file" in refused("rows.jsonl", b'{"body": "a"}\n')
        assert "must hold text" in refused("numbers.jsonl", b'{"text": 1}\n')
        assert "cannot be loaded" in refused("broken.jsonl", b'{"text": \n')
        assert "cannot be loaded" in refused("broken.parquet", b"PAR0")
        assert "The validation split of" in refused("short.txt", b"x" * 100)

    def test_models(self, train_clm: ModuleType, complaint: Any, text_file: Path, tmp_path: Path) -> None:
        def refused(**options: Any) -> str:
            options = {"train_file": text_file, "output_dir": tmp_path / "out", "use_cpu": "true", **options}
            return complaint(train_clm.main, *(f"--{name}={value}" for name, value in options.items()))

        (tmp_path / "hollow").mkdir()
        assert "hollow" in refused(model_name_or_path=tmp_path / "hollow")
        assert "config_name" in refused(config_name=tmp_path / "hollow")
        assert "nowhere" in refused(model_name_or_path=tmp_path / "nowhere")
        assert "without a tokenizer" in refused(tokenizer_name=tmp_path / "hollow")
        config = {"model_type": "gpt2", "vocab_size": 100, "n_positions": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}
        (tmp_path / "hollow" / "config.json").write_text(json.dumps(config))
        assert "has 100 tokens, the text 256" in refused(config_name=tmp_path / "hollow")
        assert "more than the 16 positions" in refused(config_name=tmp_path / "hollow", block_size=17)
        (tmp_path / "hollow" / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
        assert "has no tokenizer with it" in refused(model_name_or_path=tmp_path / "hollow")

    def test_output_and_checkpoints(
        self, train_clm: ModuleType, complaint: Any, clm_options: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        refused = complaint(train_clm.main, *clm_options, f"--output_dir={tmp_path / 'file'}")
        assert str(tmp_path / "file") in refused
        refused = complaint(train_clm.main, *clm_options, "--resume_from_checkpoint=true")
        assert "has no complete checkpoint" in refused
        refused = complaint(train_clm.main, *clm_options, "--resume_from_checkpoint=nowhere")
        assert "--resume_from_checkpoint 'nowhere' is missing" in refused
        refused = complaint(train_clm.main, *clm_options, '--lp_rules={"no_such_layer": "off"}')
        assert "no_such_layer" in refused


GOOD = ["a fine film", "a warm and moving story", "bright , funny and fresh", "the best of the year"] * 8
BAD = ["a dull film", "cold and stale", "a long and tired mess", "the worst of the year"] * 8


def write_table(path: Path, labels: tuple[str, str], header: bool) -> Path:
    quote, separator = ("", "\t") if path.suffix == ".tsv" else ('"', ",")
    pairs = [pair for both in zip(BAD, GOOD, strict=True) for pair in zip(both, labels, strict=True)]
    lines = [f"{quote}{text}{quote}{separator}{label}" for text, label in pairs]
    path.write_text("\n".join([f"sentence{separator}label"] * header + lines) + "\n")
    return path


class TestFinetuneClassifier:
    def test_learns_and_leaves_a_folder_that_plain_transformers_loads(
        self, finetune_classifier: ModuleType, tmp_path: Path
    ) -> None:
        table = write_table(tmp_path / "train.tsv", ("0", "1"), header=False)
        out = tmp_path / "out"
        argv = [f"--{part}_file={table}" for part in ("train", "validation", "test")] + [f"--output_dir={out}"]
        argv += ["--max_steps=30", "--warmup_steps=0", "--use_cpu=true", "--disable_tqdm=true", "--max_length=16"]
        assert finetune_classifier.main([*argv, "--p_norm=0.5", "--lambda_p=0.05", "--learning_rate=0.003"]) == 0
        results = json.loads((out / "all_results.json").read_text())
        for part in ("eval", "test"):
            assert results[f"{part}_accuracy"] >= 0.9
            assert {f"{part}_f1", f"{part}_f1_macro"} <= set(results)
        tokenizer = AutoTokenizer.from_pretrained(out)
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert model.config.id2label == {0: "0", 1: "1"}
        inputs = tokenizer(GOOD + BAD, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            predicted = model.eval()(**inputs).logits.argmax(-1)
        hits = (predicted == torch.tensor([1] * len(GOOD) + [0] * len(BAD))).double().mean()
        assert float(hits) == pytest.approx(results["eval_accuracy"], abs=1e-4)
        assert json.loads((out / "sparsity.json").read_text())["sparsity"] > 0

    def test_says_how_many_texts_are_cut(
        self, finetune_classifier: ModuleType, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = finetune_classifier.train_tokenizer(GOOD, 128, 8)
        texts = ["a film", "a " * 20, "a " * 30]
        examples = finetune_classifier.Examples(texts, ["0", "1", "1"], "--train_file 'reviews.tsv'")
        rows = finetune_classifier.encode(examples, tokenizer, ["0", "1"], 8)
        assert [len(ids) for ids in rows["input_ids"]] == [4, 8, 8]
        assert {ids[-1] for ids in rows["input_ids"]} == {tokenizer.sep_token_id}
        said = "2 of 3 texts of --train_file 'reviews.tsv' are longer than --max_length 8, the longest has 32 tokens"
        assert said in caplog.text
        finetune_classifier.encode(examples, tokenizer, ["0", "1"], 32)
        assert caplog.text.count("longer than") == 1

    def test_a_head_of_other_labels_is_made_anew(self, finetune_classifier: ModuleType, tmp_path: Path) -> None:
        data = finetune_classifier.DataArguments(train_file="x", max_length=16)
        args = finetune_classifier.ModelArguments()
        model, tokenizer = finetune_classifier.load_model(args, data, GOOD + BAD, ["bad", "good"])
        model.save_pretrained(tmp_path / "bert")
        tokenizer.save_pretrained(tmp_path / "bert")
        args = finetune_classifier.ModelArguments(model_name_or_path=str(tmp_path / "bert"))
        tuned, _ = finetune_classifier.load_model(args, data, [], ["a", "b", "c"])
        assert tuned.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert tuned.classifier.weight.shape[0] == 3
        first = "bert.encoder.layer.0.attention.self.query.weight"
        assert torch.equal(tuned.state_dict()[first], model.state_dict()[first])

    @pytest.mark.parametrize(("suffix", "header"), [(".tsv", False), (".tsv", True), (".csv", False), (".csv", True)])
    def test_a_header_is_recognised(
        self, finetune_classifier: ModuleType, tmp_path: Path, suffix: str, header: bool
    ) -> None:
        table = write_table(tmp_path / f"train{suffix}", ("bad", "good"), header)
        data = finetune_classifier.DataArguments(train_file=str(table), validation_file=str(table), max_eval_samples=3)
        train, others = finetune_classifier.load_examples(data)
        assert train.texts[:2] == [BAD[0], GOOD[0]]
        assert train.labels == ["bad", "good"] * 32
        assert others["validation"].labels == ["bad", "good", "bad"]
        assert others["test"] is None
        assert finetune_classifier.label_names(train, others.values()) == ["bad", "good"]

    def test_json_with_columns_of_other_names(self, finetune_classifier: ModuleType, tmp_path: Path) -> None:
        path = tmp_path / "train.jsonl"
        Dataset.from_dict({"stars": [10, 9, 10], "review": ["a", "b", "c"], "id": ["x", "y", "z"]}).to_json(path)
        columns = {"text_column": "review", "label_column": "stars", "validation_fraction": 0.0}
        data = finetune_classifier.DataArguments(train_file=str(path), **columns)
        train, others = finetune_classifier.load_examples(data)
        assert train.texts == ["a", "b", "c"]
        assert finetune_classifier.label_names(train, others.values()) == ["9", "10"]  # by value

    def test_bad_input(self, finetune_classifier: ModuleType, complaint: Any, tmp_path: Path) -> None:
        def refused(content: bytes | None, *argv: str) -> str:
            path = tmp_path / "train.tsv"
            path.write_bytes(content or b"good\t1\nbad\t0\nfair\t1\n")
            return complaint(
                finetune_classifier.main, f"--train_file={path}", f"--output_dir={tmp_path / 'out'}", *argv
            )

        assert "--train_file, or --dataset_name" in complaint(finetune_classifier.main)
        assert "not UTF-8" in refused(b"caf\xe9\t1\n")
        assert "has one column" in refused(b"only text\nmore text\n")
        assert "3 columns in row 2" in refused(b"good\t1\nbad\t0\t0\n")
        assert "has no rows" in refused(b"sentence\tlabel\n")
        assert "has one label, '1'" in refused(b"good\t1\nfine\t1\n")
        assert "--text_column 'body' is not in" in refused(None, "--text_column=body")
        assert "--max_length 2 must be at least 3" in refused(None, "--max_length=2")
        assert "preset" in refused(None, "--preset=bert-huge")
        assert "p_norm" in refused(None, "--p_norm=inf")
        (tmp_path / "dev.tsv").write_text("strange\t7\nodd\t7\n")
        assert "has the label '7'" in refused(None, f"--validation_file={tmp_path / 'dev.tsv'}")
        assert "missing" in refused(None, f"--test_file={tmp_path / 'nowhere.tsv'}")
        assert "nowhere" in refused(None, f"--model_name_or_path={tmp_path / 'nowhere'}")
