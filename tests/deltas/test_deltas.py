from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_pdecay import (
    FormatError,
    compress,
    decompress,
    load_delta,
    merge_deltas,
    swap,
    unswap,
    write_delta,
)
from hf_pdecay.cli.main import main
from hf_pdecay.deltas.report import is_delta

from ..helpers.models import build


def _changed(folder: Path, out: Path, seed: int = 1, share: float = 0.02, dtype: torch.dtype | None = None) -> Path:
    """Save a model some of whose weights are others: 0, -0.0, NaN and infinity among them."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            marks = torch.rand(param.shape, generator=generator) < share
            param[marks] += 0.5
            flat = param.view(-1)
            flat[:4] = torch.tensor([0.0, -0.0, torch.nan, torch.inf])
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deltas")
    build("llama").save_pretrained(root / "base")
    (root / "base" / "README.md").write_text("# A base\n")
    for name, seed in (("tuned", 1), ("other", 2)):
        _changed(root / "base", root / name, seed)
        (root / name / "README.md").write_text(f"# {name}\n")
        write_delta(root / "base", root / name, root / f"{name}_delta")
    return {path.name: path for path in root.iterdir()}


def _tensors(folder: Path) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in load_file(folder / "model.safetensors").items()}


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(_bits(left[name]), _bits(right[name])) for name in left)


def _decoded(file: Path, base: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Decode the changes of a file without zstd by the words of docs/deltas.md."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["hf_pdecay"])
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + place for place in entry["data_offsets"])
        blob = raw[begin:end]
        encoding, flags, width, dimensions = blob[9], blob[10], blob[11], blob[12]
        assert flags == 8 and name in manifest["base"]["sha256"]
        old = _bits(base[name])
        assert hashlib.sha256(old.tobytes()).hexdigest() == manifest["base"]["sha256"][name]
        itemsize = {"F32": 4, "BF16": 2, "F16": 2}[blob[16:32].rstrip(b"\0").decode()]
        new = old.copy().view(f"<u{itemsize}")
        (count,) = struct.unpack("<Q", blob[32:40])
        start = 48 + 8 * dimensions
        if encoding == 1:
            size = -(-new.size // 8)
            places = np.flatnonzero(
                np.unpackbits(np.frombuffer(blob[start : start + size], np.uint8), bitorder="little")
            )
        else:
            size = width * count
            gaps = np.frombuffer(blob[start : start + size], f"<u{width}").astype(np.int64)
            places = np.cumsum(gaps + 1) - 1
        new[places] = np.frombuffer(blob[start + size : start + size + count * itemsize], f"<u{itemsize}")
        tensors[name] = new.view(np.uint8)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3])
def test_a_decoder_by_the_specification_gives_the_tuned_model(
    dtype: torch.dtype, share: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    tf.AutoModelForCausalLM.from_pretrained(folders["base"], dtype=dtype).save_pretrained(tmp_path / "base")
    tuned = _tensors(_changed(tmp_path / "base", tmp_path / "tuned", share=share))
    report = write_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", zstd=False)
    base = _tensors(tmp_path / "base")
    decoded = _decoded(tmp_path / "delta" / "model.safetensors", base)
    assert decoded.keys() == tuned.keys()
    assert all(np.array_equal(bits, _bits(tuned[name])) for name, bits in decoded.items())
    size = dtype.itemsize
    changed = sum(
        int((_bits(base[name]).reshape(-1, size) != _bits(tuned[name]).reshape(-1, size)).any(1).sum()) for name in base
    )
    assert report.changed == changed and report.weights == sum(tensor.numel() for tensor in base.values())


def test_plain_loading_gives_the_tuned_model(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = tf.AutoModelForCausalLM.from_pretrained(folders["tuned_delta"])
    loaded.save_pretrained(tmp_path / "again")
    assert _same(_tensors(tmp_path / "again"), _tensors(folders["tuned"]))
    script = (
        "import hf_pdecay, sys, transformers as tf; from safetensors.torch import load_file\n"
        "model = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1]); model.save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, folders["tuned_delta"], tmp_path / "process"], check=True)
    assert _same(_tensors(tmp_path / "process"), _tensors(folders["tuned"]))
    assert "This is a delta" in (folders["tuned_delta"] / "README.md").read_text()


def test_apply_writes_the_plain_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    words = [folders["base"], folders["tuned_delta"], tmp_path / "plain"]
    assert main(["apply", *map(str, words)]) == 0
    assert _same(_tensors(tmp_path / "plain"), _tensors(folders["tuned"]))
    assert (tmp_path / "plain" / "README.md").read_text() == "# tuned\n"
    decompress(folders["tuned_delta"], tmp_path / "named")
    assert _same(_tensors(tmp_path / "named"), _tensors(folders["tuned"]))
    with pytest.raises(FormatError, match="is not a delta, and has no base"):
        compress(folders["tuned"], tmp_path / "small")
        decompress(tmp_path / "small", tmp_path / "no", base=folders["base"])


@pytest.mark.parametrize("kind", ["compressed", "sharded", "delta"])
def test_what_a_base_may_be(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    if kind == "compressed":
        compress(folders["tuned"], base)
    elif kind == "sharded":
        tf.AutoModelForCausalLM.from_pretrained(folders["tuned"]).save_pretrained(base, max_shard_size="30KB")
    else:
        base = folders["tuned_delta"]
    new = _changed(folders["tuned"], tmp_path / "new", seed=7)
    report = write_delta(base, new, tmp_path / "delta")
    assert 0 < report.changed < 0.05 * report.weights
    again = decompress(tmp_path / "delta", tmp_path / "plain")
    assert again.before and _same(_tensors(tmp_path / "plain"), _tensors(new))


def test_new_and_resized_tensors_are_stored_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _tensors(folders["tuned"])
    tensors["score.weight"] = torch.randn(3, 32)
    tensors["model.embed_tokens.weight"] = torch.randn(70, 32)
    new = tmp_path / "new"
    new.mkdir()
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    (new / "config.json").write_text((folders["tuned"] / "config.json").read_text())
    report = write_delta(folders["base"], new, tmp_path / "delta")
    whole = {change.name for change in report.tensors if change.whole}
    assert whole == {"score.weight", "model.embed_tokens.weight"}
    decompress(tmp_path / "delta", tmp_path / "plain")
    assert _same(_tensors(tmp_path / "plain"), tensors)


def test_an_unchanged_model_has_an_empty_delta(folders: dict[str, Path], tmp_path: Path) -> None:
    report = write_delta(folders["base"], folders["base"], tmp_path / "delta")
    assert report.changed == 0
    decompress(tmp_path / "delta", tmp_path / "plain")
    assert _same(_tensors(tmp_path / "plain"), _tensors(folders["base"]))


def test_a_base_that_changed_or_is_gone_is_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    tf.AutoModelForCausalLM.from_pretrained(folders["base"]).save_pretrained(base)
    write_delta(base, folders["tuned"], tmp_path / "delta")
    tf.AutoModelForCausalLM.from_pretrained(folders["other"]).save_pretrained(base)
    with pytest.raises(FormatError, match=r"has changed since the delta was made from it, or is another model"):
        decompress(tmp_path / "delta", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"The base '../base' of a delta is not found. Name its folder in the environ"):
        decompress(tmp_path / "delta", tmp_path / "plain")
    monkeypatch.setenv("HF_PDECAY_BASE", str(folders["base"]))
    decompress(tmp_path / "delta", tmp_path / "plain")
    assert _same(_tensors(tmp_path / "plain"), _tensors(folders["tuned"]))


def test_models_that_share_nothing_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tf.AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    with pytest.raises(FormatError, match=r"no tensor has the same name, dtype and shape; .* is F32 .* and BF16"):
        write_delta(folders["base"], tmp_path / "half", tmp_path / "delta")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(FormatError, match=r"is not the base of .*: no tensor has the same name"):
        write_delta(tmp_path / "gpt2", folders["tuned"], tmp_path / "delta")
    with pytest.raises(ValueError, match="lie in each other"):
        write_delta(folders["base"], folders["tuned"], folders["base"] / "delta")
    assert not (tmp_path / "delta").exists()


def test_swapping_in_place(folders: dict[str, Path]) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folders["base"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [param.data_ptr() for param in model.parameters()]
    for name in ("tuned", "other"):
        delta = load_delta(folders[f"{name}_delta"])
        for _ in range(2):
            swap(model, delta)
            assert _same(model.state_dict(), tf.AutoModelForCausalLM.from_pretrained(folders[name]).state_dict())
            with pytest.raises(ValueError, match="call unswap first"):
                swap(model, delta)
            unswap(model)
            assert _same(model.state_dict(), before)
    assert [param.data_ptr() for param in model.parameters()] == pointers
    with pytest.raises(ValueError, match="there is no delta in it"):
        unswap(model)


def test_a_model_that_is_not_the_base_is_left_alone(folders: dict[str, Path]) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folders["base"])
    with torch.no_grad():
        model.model.norm.weight[5] += 1  # the last tensor
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match=r"model.norm.weight has another checksum"):
        swap(model, folders["tuned_delta"])
    assert _same(model.state_dict(), before)
    with pytest.raises(FormatError, match=r"the model has no model.embed_tokens.weight"):
        swap(build("gpt2"), folders["tuned_delta"])
    half = tf.AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.bfloat16)
    swap(half, folders["tuned_delta"])
    tuned = tf.AutoModelForCausalLM.from_pretrained(folders["tuned"], dtype=torch.bfloat16)
    assert _same(half.state_dict(), tuned.state_dict())


def test_a_base_that_was_trained_between_is_looked_at_again(folders: dict[str, Path]) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folders["base"])
    delta = load_delta(folders["tuned_delta"])
    swap(model, delta)
    unswap(model)
    with torch.no_grad():
        model.model.norm.weight[5] += 1
    with pytest.raises(FormatError, match="another checksum"):
        swap(model, delta)


def test_merging(folders: dict[str, Path], tmp_path: Path) -> None:
    deltas = [folders["tuned_delta"], folders["other_delta"]]
    base, one, two = (_tensors(folders[name]) for name in ("base", "tuned", "other"))
    report = merge_deltas(folders["base"], deltas, tmp_path / "merged")
    shared = differing = 0
    for name, merged in _tensors(tmp_path / "merged").items():
        old, first, second = (each[name].view(torch.int32) for each in (base, one, two))
        in_first, in_second = first != old, second != old
        expected = torch.where(in_first, first, torch.where(in_second, second, old))
        assert torch.equal(merged.view(torch.int32), expected)
        shared += int((in_first & in_second).sum())
        differing += int((in_first & in_second & (first != second)).sum())
    assert (report.shared, report.differing) == (shared, differing) and shared and not differing
    assert (tmp_path / "merged" / "README.md").read_text() == "# tuned\n"


def test_merging_different_values(folders: dict[str, Path], tmp_path: Path) -> None:
    base, one, third = (_tensors(folders[name])["lm_head.weight"] for name in ("base", "tuned", "tuned"))
    changed = (base != one).nonzero()[-6:].tolist()
    for number, (row, column) in enumerate(changed):
        third[row, column] = number + 3.0
    row, column = (base == one).nonzero()[-1].tolist()
    third[row, column] = 9.0
    tensors = {**_tensors(folders["tuned"]), "lm_head.weight": third}
    folder = tmp_path / "third"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((folders["tuned"] / "config.json").read_text())
    write_delta(folders["base"], folder, tmp_path / "third_delta")
    deltas = [str(folders["tuned_delta"]), str(tmp_path / "third_delta")]
    with pytest.raises(ValueError, match=r"shared='refuse', and .* get different values, the first in lm_head.weight"):
        merge_deltas(folders["base"], deltas, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    words = ["merge", str(folders["base"]), *deltas, str(tmp_path / "merged"), "--shared", "average"]
    assert main(words) == 0
    merged = _tensors(tmp_path / "merged")["lm_head.weight"]
    for number, place in enumerate(changed):
        assert float(merged[tuple(place)]) == pytest.approx((float(one[tuple(place)]) + number + 3) / 2)
    assert merged[row, column] == 9
    others = torch.ones_like(merged, dtype=torch.bool)
    for place in [*changed, [row, column]]:
        others[tuple(place)] = False
    assert torch.equal(merged[others].view(torch.int32), one[others].view(torch.int32))
    with pytest.raises(ValueError, match=r"at least 2 can be merged"):
        merge_deltas(folders["base"], deltas[:1], tmp_path / "one")
    with pytest.raises(ValueError, match=r"is there twice"):
        merge_deltas(folders["base"], deltas[:1] * 2, tmp_path / "one")
    with pytest.raises(ValueError, match=r"shared='mean'; it must be one of refuse, average"):
        merge_deltas(folders["base"], deltas, tmp_path / "one", shared="mean")


def test_the_report(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders["tuned_delta"]
    assert is_delta(folder) and not is_delta(folders["base"])
    capsys.readouterr()
    assert main(["report", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    base, tuned = _tensors(folders["base"]), _tensors(folders["tuned"])
    for change in result["tensors"]:
        marks = base[change["name"]].view(torch.int32) != tuned[change["name"]].view(torch.int32)
        assert change["changed"] == int(marks.sum())
        if marks.dim() == 2:
            assert [change["rows"], change["columns"]] == [int(marks.any(1).sum()), int(marks.any(0).sum())]
    mlp = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    marks = [(base[name].view(torch.int32) != tuned[name].view(torch.int32)) for name in mlp]
    by_neuron = (marks[0].sum(1) + marks[1].sum(1) + marks[2].sum(0)).tolist()
    first = next(layer for layer in result["units"] if layer["kind"] == "neuron")
    assert first["changed"] == by_neuron and first["size"] == sum(mark.numel() for mark in marks) // len(by_neuron)
    heads = [layer for layer in result["units"] if layer["kind"] == "head"]
    projections = [change for change in result["tensors"] if "self_attn" in change["name"]]
    assert sum(sum(layer["changed"]) for layer in heads) == sum(change["changed"] for change in projections)
    assert result["base"] == "../base" and (folder / "delta.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(folder)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "are not those of ../base" in printed and "Neurons that change most" in printed


def test_forged_bases_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from hf_pdecay.storage.compressed_file import CompressedFile

    raw = (folders["tuned_delta"] / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])

    def forged(change: Any) -> bytes:
        own = json.loads(json.dumps(header))
        manifest = json.loads(own["__metadata__"]["hf_pdecay"])
        change(manifest)
        own["__metadata__"]["hf_pdecay"] = json.dumps(manifest)
        text = json.dumps(own).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    for change, said in (
        (lambda manifest: manifest["base"].pop("revision"), "does not have exactly name, revision, sha256"),
        (lambda manifest: manifest["base"].update(name=""), "does not say which model its base is"),
        (lambda manifest: manifest["base"]["sha256"].update(nothing="0" * 64), "of which the file has no changes"),
        (lambda manifest: manifest["base"]["sha256"].update({"lm_head.weight": "0"}), "must be a SHA-256"),
        (lambda manifest: manifest["base"]["sha256"].pop("lm_head.weight"), "checksum of its header|for other tensors"),
        (lambda manifest: manifest.pop("base"), "checksum of its header|for other tensors"),
    ):
        with pytest.raises(FormatError, match=said):
            CompressedFile(forged(change))


def test_deltas_on_each_other_end(folders: dict[str, Path], tmp_path: Path) -> None:
    # Each of two deltas names the other as its base.
    for name, other in (("a", "b"), ("b", "a")):
        write_delta(folders["base"], folders["tuned"], tmp_path / name, base_name=f"../{other}")
    with pytest.raises(FormatError, match="more than 16 deltas on each other"):
        decompress(tmp_path / "a", tmp_path / "plain")


def test_a_base_on_the_hub_is_named_with_its_revision(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "hub" / "models--me--base" / "snapshots" / "0123abc"
    tf.AutoModelForCausalLM.from_pretrained(folders["base"]).save_pretrained(snapshot)
    report = write_delta(snapshot, folders["tuned"], tmp_path / "delta")
    assert (report.base, report.revision) == ("me/base", "0123abc")
    asked = []

    def fetched(name: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    decompress(tmp_path / "delta", tmp_path / "plain")
    assert set(asked) == {("me/base", "0123abc")}
    assert _same(_tensors(tmp_path / "plain"), _tensors(folders["tuned"]))


def test_a_base_whose_names_lack_the_first_part(tmp_path: Path) -> None:
    """As the files of gpt2 on the Hub do: those of the model with its head have longer names."""
    build("gpt2").transformer.save_pretrained(tmp_path / "base")
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    for name, place in (("one", 0), ("two", 1)):
        tuned = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            tuned.transformer.h[0].mlp.c_fc.weight[place] += 0.5
        tuned.save_pretrained(tmp_path / name)
        report = write_delta(tmp_path / "base", tmp_path / name, tmp_path / f"{name}_delta")
        assert report.changed == tuned.transformer.h[0].mlp.c_fc.weight.shape[1]
        decompress(tmp_path / f"{name}_delta", tmp_path / f"{name}_plain")
        plain, whole = _tensors(tmp_path / f"{name}_plain"), _tensors(tmp_path / name)
        assert plain.keys() == whole.keys() and all(torch.equal(plain[key], whole[key]) for key in whole)
    merge_deltas(tmp_path / "base", [tmp_path / "one_delta", tmp_path / "two_delta"], tmp_path / "merged")
    merged, weight = _tensors(tmp_path / "merged"), "transformer.h.0.mlp.c_fc.weight"
    assert merged.keys() == _tensors(tmp_path / "one").keys()
    assert int((merged[weight] != model.transformer.h[0].mlp.c_fc.weight).sum()) == 2 * merged[weight].shape[1]
    # The other way round: a model without the head of its base.
    model.save_pretrained(tmp_path / "whole")
    body = tf.GPT2Model.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        body.ln_f.weight[0] += 1
    body.save_pretrained(tmp_path / "body")
    assert write_delta(tmp_path / "whole", tmp_path / "body", tmp_path / "body_delta").changed == 1
