"""Folders compressed and given back: to the byte, whole or not at all, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich
import safetensors
import torch
from packaging.version import Version

from hf_pdecay import compress, decompress, save_compressed
from hf_pdecay.storage.container import FormatError, read_header

from ..helpers.reference.compressed_reader import read_block
from ..helpers.storage_models import bits, files_of, saved, sparsified, weights, write_folder
from ..helpers.warm import python


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
if Version(safetensors.__version__) >= Version("0.6"):  # which can write them
    DTYPES += [torch.uint16, torch.uint32, torch.uint64, torch.complex64]


def of_every_dtype() -> dict[str, torch.Tensor]:
    """A sparse matrix, a short vector, a scalar and an empty tensor of each dtype."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        size = torch.empty((), dtype=dtype).element_size()
        data = torch.randint(0, 256, (64 * 63, size), dtype=torch.uint8, generator=generator)
        data = data % 2 if dtype is torch.bool else data
        data[torch.rand(64 * 63, generator=generator) < 0.9] = 0
        matrix = data.view(dtype).reshape(64, 63)
        name = str(dtype).removeprefix("torch.")
        found |= {
            f"{name}.matrix": matrix,
            f"{name}.vector": matrix[0, :7].clone(),
            f"{name}.scalar": matrix[3, 3].clone(),
        }
        found[f"{name}.empty"] = torch.empty((0, 5), dtype=dtype)
    return found


@pytest.mark.parametrize("zstd", [False, True])
def test_every_dtype_comes_back_to_the_byte(tmp_path: Path, zstd: bool) -> None:
    tensors = of_every_dtype()
    write_folder(tmp_path / "plain", tensors)
    report = compress(tmp_path / "plain", tmp_path / "small", zstd=zstd)
    decompress(tmp_path / "small", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "plain")
    stored = stored_bytes(tmp_path / "small" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        dtype, data = stored[name]
        if dtype == "hf_pdecay":
            _, shape, data = read_block(data)
            assert (tensor.dtype, shape, data) == bits(tensor)
        else:
            assert data == bits(tensor)[2]
    assert report.before == sum(tensor.nbytes for tensor in tensors.values())
    assert report.after == (tmp_path / "small" / "model.safetensors").stat().st_size


def stored_bytes(file: Path) -> dict[str, tuple[str, bytes]]:
    """The dtype and the bytes of each entry of a file."""
    data = file.read_bytes()
    return {
        name: (entry.dtype, data[entry.begin : entry.begin + entry.size])
        for name, entry in read_header(file).entries.items()
    }


def test_checksums_are_those_of_what_is_stored(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", of_every_dtype())
    compress(tmp_path / "plain", tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    manifest = json.loads(read_header(file).metadata["hf_pdecay"])
    assert manifest.keys() == {"format_version", "header", "sha256"} and manifest["format_version"] == 3
    found = {name: hashlib.sha256(data).hexdigest() for name, (_, data) in stored_bytes(file).items()}
    assert manifest["sha256"] == found
    data = file.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    own = manifest["header"].encode()
    assert hashlib.sha256(header.replace(own, b"0" * 64, 1)).hexdigest() == manifest["header"]


def test_a_sharded_model_keeps_its_files(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "plain", max_shard_size="30KB")
    names = sorted(each.name for each in (tmp_path / "plain").glob("*.safetensors"))
    assert len(names) > 2
    compress(tmp_path / "plain", tmp_path / "small")
    assert sorted(each.name for each in (tmp_path / "small").glob("*.safetensors")) == names
    decompress(tmp_path / "small", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "plain")


@pytest.mark.parametrize("size", [3000, "3KB"])
def test_max_shard_size(tmp_path: Path, size: int | str) -> None:
    saved("gpt2", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small", max_shard_size=size)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names == [f"model-{each:05d}-of-{len(names):05d}.safetensors" for each in range(1, len(names) + 1)]
    for name in names:
        tensors = stored_bytes(tmp_path / "small" / name)
        assert all(index["weight_map"][tensor] == name for tensor in tensors)
        assert len(tensors) == 1 or sum(len(data) for _, data in tensors.values()) <= 3000
    decompress(tmp_path / "small", tmp_path / "back")
    plain, back = weights(tmp_path / "plain"), weights(tmp_path / "back")
    assert {name: bits(tensor) for name, tensor in back.items()} == {name: bits(each) for name, each in plain.items()}


@pytest.mark.parametrize("size", [0, -5, "5", "5 apples", 1.5, "0GB"])
def test_a_wrong_size_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        compress(tmp_path, tmp_path / "out", max_shard_size=size)


def test_what_is_not_weights_comes_along(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    saved("gpt2", plain)
    along = {"README.md": b"# card", "sparsity.json": b"{}", "tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}"}
    along |= {"1_Pooling/config.json": b"{}", "modeling_mine.py": b"import os", "training_args.bin": b"\x80\x04."}
    for name, data in along.items():
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_bytes(data)
    for name in (
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "tf_model.h5",
        "checkpoint-5/model.safetensors",
        ".git/x",
        "1_Pooling/.git/x",
        "1_Pooling/.hidden",
    ):
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_bytes(b"weights")
    report = compress(plain, tmp_path / "small")
    found = files_of(tmp_path / "small")
    card = found["README.md"]
    assert card.startswith(b"# card\n") and b"`import hf_pdecay` before `from_pretrained`" in card
    assert (found | {"README.md": b"# card"}).items() >= along.items()
    assert found.keys() - along.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    assert report.left_out == ["model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5"]
    decompress(tmp_path / "small", tmp_path / "back")
    assert files_of(tmp_path / "back").items() >= along.items()


def test_a_link_to_a_folder_is_named(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "plain")
    (tmp_path / "plain" / "runs" / "1").mkdir(parents=True)
    (tmp_path / "plain" / "runs" / "latest").symlink_to("1")
    with pytest.raises(FormatError, match="latest in .* is a folder or a link to one"):
        compress(tmp_path / "plain", tmp_path / "small")


def test_save_compressed_is_save_pretrained_and_compress(tmp_path: Path) -> None:
    model = saved("qwen3", tmp_path / "plain")
    report = save_compressed(model, tmp_path / "new" / "small", max_shard_size="10KB")
    assert report.after < 0.3 * report.before
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["small"]
    decompress(tmp_path / "new" / "small", tmp_path / "back")
    plain, back = weights(tmp_path / "plain"), weights(tmp_path / "back")
    assert {name: bits(tensor) for name, tensor in back.items()} == {name: bits(each) for name, each in plain.items()}


def test_a_config_stays_as_it_is(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "plain", {"a": torch.zeros(8, 8, dtype=torch.bfloat16), "A": torch.zeros(4, dtype=torch.int64)}
    )
    file = tmp_path / "plain" / "config.json"
    file.write_text('{\n  "model_type": "bert",\n  "layer_norm_eps": 1e-12\n}\n')
    compress(tmp_path / "plain", tmp_path / "small")
    assert (tmp_path / "small" / "config.json").read_bytes() == file.read_bytes()
    decompress(tmp_path / "small", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("installed", [True, False])
def test_zstd_is_used_where_it_is_installed(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "plain", {"a": torch.nn.functional.dropout(torch.randn(256, 512), 0.9)})
    by_default, without = (
        compress(tmp_path / "plain", tmp_path / name, **options)
        for name, options in (("default", {}), ("without", {"zstd": False}))
    )
    assert by_default.after < without.after and by_default.zstd_saves == without.zstd_saves == 0
    if installed:
        return
    monkeypatch.setattr("hf_pdecay.storage.writer.is_installed", lambda: False)
    missing = compress(tmp_path / "plain", tmp_path / "missing")
    assert missing.after == without.after
    assert missing.zstd_saves == pytest.approx(without.after - by_default.after, rel=0.05)
    rich.print(missing)
    share = (missing.after - missing.zstd_saves) / missing.before
    said = " ".join(capsys.readouterr().out.split())
    assert f"With zstandard installed it would be about {share:.1%}: pip install 'hf-pdecay[zstd]'." in said


class TestWhereItIsWritten:
    def test_a_folder_that_is_there_is_left_alone(self, tmp_path: Path) -> None:
        saved("gpt2", tmp_path / "plain")
        (tmp_path / "out").mkdir()
        compress(tmp_path / "plain", tmp_path / "out", zstd=False)  # an empty one is taken
        before = files_of(tmp_path / "out")
        with pytest.raises(ValueError, match="is there and not empty"):
            compress(tmp_path / "plain", tmp_path / "out", zstd=True)
        with pytest.raises(ValueError, match="is there and not empty"):
            save_compressed(sparsified(torch.nn.Linear(2, 2)), tmp_path / "out")  # type: ignore[arg-type]
        assert files_of(tmp_path / "out") == before
        compress(tmp_path / "plain", tmp_path / "out", zstd=True, overwrite=True)
        assert files_of(tmp_path / "out") != before

    def test_only_a_models_folder_is_replaced(self, tmp_path: Path) -> None:
        saved("gpt2", tmp_path / "plain")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "letter").write_text("dear")
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="is not a model's folder"):
            compress(tmp_path / "plain", tmp_path / "home", overwrite=True)
        with pytest.raises(ValueError, match="is not a folder"):
            compress(tmp_path / "plain", tmp_path / "file", overwrite=True)
        assert (tmp_path / "home" / "letter").read_text() == "dear"

    @pytest.mark.parametrize("out", ["", "below", ".."])
    def test_nothing_is_written_over_what_is_read(self, tmp_path: Path, out: str) -> None:
        plain = tmp_path / "above" / "plain"
        saved("gpt2", plain)
        (tmp_path / "above" / "config.json").write_text("{}")
        before = files_of(tmp_path)
        with pytest.raises(ValueError, match="lie in each other"):
            compress(plain, plain / out, overwrite=True)
        assert files_of(tmp_path) == before


# What is imported is so before memory is looked at; the peak then starts anew (Linux).
MEMORY = """
import sys
from pathlib import Path
import psutil
from hf_pdecay import compress, decompress

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

way = {"compress": compress, "decompress": decompress}[sys.argv[1]]
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
way(*sys.argv[2:])
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded_by_a_few_tensors(tmp_path: Path) -> None:
    """96 MB of weights in one file, in tensors of 4 MB: neither way takes as much as six of them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for each in range(24):
        tensor = torch.randn(1024, 1024, generator=generator)
        tensors[f"layer.{each}.weight"] = tensor.masked_fill_(torch.rand(1024, 1024, generator=generator) < 0.7, 0)
    write_folder(tmp_path / "plain", tensors)
    for way, source, out in (("compress", "plain", "small"), ("decompress", "small", "back")):
        words = [sys.executable, "-c", MEMORY, way, str(tmp_path / source), str(tmp_path / out)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert 4 * 2**20 < int(done.stdout) * 1024 < 6 * 4 * 2**20, way  # the tensor itself, at least
    assert files_of(tmp_path / "back") == files_of(tmp_path / "plain")


# Kills itself at the n-th call of something that writes.
KILLED = """
import os, signal, sys
from pathlib import Path
from hf_pdecay import compress
from hf_pdecay.storage import folder, writer
place, count = sys.argv[3], int(sys.argv[4])
owner, name = {
    "tensor": (writer.Shards, "add"), "file": (writer.Shards, "close"), "rename": (Path, "rename"),
    "removal": (folder.shutil, "rmtree"),
}[place]
real = getattr(owner, name)
calls = []
def counting(*args, **kwargs):
    calls.append(args)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, counting)
compress(sys.argv[1], sys.argv[2], zstd=True, overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count"), [("tensor", 1), ("tensor", 15), ("file", 1), ("rename", 1), ("rename", 2), ("removal", 1)]
)
def test_a_killed_process_leaves_the_old_folder_or_none(tmp_path: Path, place: str, count: int) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    saved("gpt2", plain)
    compress(plain, out)
    compress(plain, tmp_path / "new", zstd=True)
    old, new = files_of(out), files_of(tmp_path / "new")
    assert python("-c", KILLED, plain, out, place, count).returncode == -signal.SIGKILL
    # The folder is moved away by the first renaming, and the new one comes by the second.
    expected = {("rename", 2): None, ("removal", 1): new}.get((place, count), old)
    assert (files_of(out) if out.exists() else None) == expected
    # The next run clears up what was left beside it.
    compress(plain, out, overwrite=True)
    assert files_of(out) == old
    assert sorted(each.name for each in tmp_path.iterdir()) == ["new", "out", "plain"]


def test_what_a_killed_process_left_is_found_whatever_the_name(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "plain")
    out = tmp_path / "out [1]*"
    compress(tmp_path / "plain", out)
    gone = 2**22 + 1  # beyond the numbers that Linux gives to processes
    out.rename(tmp_path / f".{out.name}.{gone}.old.tmp")
    (tmp_path / f".{out.name}.{gone}.new.tmp").mkdir()
    with pytest.raises(ValueError, match="there and not empty"):  # the old folder is back
        compress(tmp_path / "plain", out)
    compress(tmp_path / "plain", out, overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == [out.name, "plain"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "plain")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"Invalid out: .*file/out' cannot be written .*name a folder"):
        compress(tmp_path / "plain", tmp_path / "file" / "out")


@pytest.mark.parametrize("size", [10, 1_000, 15_000])
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_the_old_folder_or_none(tmp_path: Path, size: int, old: bool) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    saved("gpt2", plain)
    if old:
        compress(plain, out)
    before = files_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            compress(plain, out, zstd=True, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_of(tmp_path) == before


def test_a_disk_too_small_for_the_plain_model_is_seen_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    saved("gpt2", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="114176 bytes, and only 1000 are free"):
        decompress(tmp_path / "small", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_no_plain_model_is_refused(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    out = tmp_path / "out"
    with pytest.raises(FormatError, match="The weights of .* are compressed already"):
        compress(tmp_path / "small", out)
    with pytest.raises(FormatError, match="The weights of .* are not compressed"):
        decompress(tmp_path / "plain", out)
    write_folder(tmp_path / "bnb", {"a": torch.zeros(4)}, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(FormatError, match="the method 'bitsandbytes': its weights are quantized already"):
        compress(tmp_path / "bnb", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="has no config.json"):
        compress(tmp_path / "empty", out)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="has neither model.safetensors nor"):
        compress(tmp_path / "empty", out)
    with pytest.raises(ValueError, match="is not a folder here, and cannot be downloaded from the Hub"):
        compress(tmp_path / "missing", out)
    assert not out.exists()


def test_pickles_are_refused_and_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "sprung"), "w")

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    torch.save({"a": Trap()}, plain / "pytorch_model.bin")
    with pytest.raises(
        FormatError, match="pytorch_model.bin, a pickle, which could run code.*Convert it to safetensors"
    ):
        compress(plain, tmp_path / "out")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()
