"""Damaged and forged folders: refused clearly, before memory is taken, with nothing written and nothing run."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_pdecay import compress, decompress
from hf_pdecay.storage.container import FormatError, read_header
from hf_pdecay.storage.untrusted import on_meta

from ..helpers.storage_models import files_of, saved, write_folder
from .test_encoding import huge_block


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A compressed GPT-2 of several files."""
    saved("gpt2", tmp_path / "plain", max_shard_size="40KB")
    compress(tmp_path / "plain", tmp_path / "small")
    return tmp_path / "small"


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_header(file: Path, change: Callable[[dict[str, Any]], object], data: bytes | None = None) -> None:
    """Change a file's header, and its data too if given."""
    old = file.read_bytes()
    end = 8 + int.from_bytes(old[:8], "little")
    header = json.loads(old[8:end])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + (old[end:] if data is None else data))


def forge(folder: Path) -> None:
    """Make all checksums right again, as a forger would."""

    def checksums(file: Path) -> Callable[[dict[str, Any]], object]:
        data = file.read_bytes()
        found = {
            name: hashlib.sha256(data[entry.begin : entry.begin + entry.size]).hexdigest()
            for name, entry in read_header(file).entries.items()
        }
        manifest = json.dumps({"format_version": 2, "header": "0" * 64, "sha256": found})
        return lambda header: header["__metadata__"].update(hf_pdecay=manifest)

    for file in folder.glob("*.safetensors"):
        edit_header(file, checksums(file))
        raw = read_header(file).raw
        right = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
        file.write_bytes(file.read_bytes().replace(raw, right, 1))


def refused(folder: Path, match: str) -> None:
    """Decompressing is refused with a clear message and writes nothing."""
    with pytest.raises(FormatError, match=match) as caught:
        decompress(folder, folder.parent / "out")
    assert str(caught.value).endswith(".")
    assert not list(folder.parent.glob("*out*"))


def test_the_tools_of_these_tests_leave_a_folder_valid(small: Path) -> None:
    forge(small)
    decompress(small, small.parent / "back")
    assert files_of(small.parent / "back") == files_of(small.parent / "plain")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -8, -1])
def test_cut_files(small: Path, keep: int) -> None:
    first(small).write_bytes(first(small).read_bytes()[:keep])
    refused(small, "is not a whole file of safetensors")


def test_a_longer_file(small: Path) -> None:
    first(small).write_bytes(first(small).read_bytes() + bytes(8))
    refused(small, "where its header needs")


def test_every_flipped_bit_is_found(small: Path) -> None:
    """Of one file, at 400 places all over it: its header, its manifest, heads, places and values."""
    file = first(small)
    data = file.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 400)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        refused(small, ".")


def test_checksums_can_be_switched_off_and_structure_is_looked_at_all_the_same(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = first(small)
    data = bytearray(file.read_bytes())
    data[-16] ^= 1  # of a value
    file.write_bytes(data)
    refused(small, "its checksum differs from the manifest's")
    monkeypatch.setenv("HF_PDECAY_VERIFY_CHECKSUMS", "0")
    decompress(small, small.parent / "back")
    header = read_header(file)
    block = next(entry for entry in header.entries.values() if entry.dtype == "hf_pdecay")
    data[block.begin + 32] ^= 1  # of the number of values
    file.write_bytes(data)
    refused(small, "damaged or forged")
    monkeypatch.setenv("HF_PDECAY_VERIFY_CHECKSUMS", "no")
    with pytest.raises(ValueError, match="it is 'no'; it must be 0 or 1"):
        decompress(small, small.parent / "out")


def test_tensors_and_files_that_changed_places(small: Path) -> None:
    one, other = sorted(small.glob("*.safetensors"))[:2]

    def swap(header: dict[str, Any]) -> None:
        names = [name for name in header if "attn.c_attn.weight" in name or "attn.c_proj.weight" in name][:2]
        header[names[0]], header[names[1]] = header[names[1]], header[names[0]]

    before = one.read_bytes()
    edit_header(max(small.glob("*.safetensors"), key=lambda file: file.stat().st_size), swap)
    refused(small, "the checksum of its header differs|c_attn")
    one.write_bytes(other.read_bytes())
    refused(small, "differ")
    one.write_bytes(before)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a hole": (
        lambda h: [e.update(data_offsets=[o + 8 for o in e["data_offsets"]]) for e in entries(h)[1:]],
        "begins at",
    ),
    "an overlap": (lambda h: entries(h)[1].update(data_offsets=[0, size(entries(h)[1])]), "begins at"),
    "negative offsets": (lambda h: entries(h)[0].update(data_offsets=[-size(entries(h)[0]), 0]), "begins at"),
    "true as an offset": (lambda h: entries(h)[0].update(data_offsets=[False, True]), "not two whole numbers"),
    "a shape too large": (lambda h: entries(h)[0].update(shape=[2**40, 2**40]), "no tensor can have"),
    "a shape beyond 64 bits": (lambda h: entries(h)[0].update(shape=[2**64]), "no tensor can have"),
    "a thousand dimensions": (lambda h: entries(h)[0].update(shape=[1] * 1000), "no tensor can have"),
    "a negative dimension": (lambda h: entries(h)[0].update(shape=[-1]), "a dimension of -1"),
    "a float for a dimension": (lambda h: entries(h)[0].update(shape=[1.5]), "a dimension of 1.5"),
    "another shape": (lambda h: entries(h)[0].update(shape=[3]), "where its dtype and shape need"),
    "a dtype that there is not": (lambda h: entries(h)[0].update(dtype="F31"), "has the dtype 'F31'"),
    "a list for a dtype": (lambda h: entries(h)[0].update(dtype=["U8"]), "has a wrong type"),
    "something more": (
        lambda h: entries(h)[0].update(code="import os"),
        "does not have exactly dtype, shape and data_offsets",
    ),
    "a number for a tensor": (lambda h: h.update(more=5), "does not have exactly dtype"),
    "metadata of numbers": (lambda h: h["__metadata__"].update(a=5), "does not hold strings only"),
    "half a character in a name": (
        lambda h: h.update({"\ud800": h.pop(list(h)[-1])}),
        "a name in its header is not a valid string",
    ),
    "half a character in metadata": (lambda h: h["__metadata__"].update(a="\udfff"), "does not hold strings only"),
    "no manifest": (lambda h: h["__metadata__"].pop("hf_pdecay"), "has no manifest"),
    "a manifest of text": (lambda h: h["__metadata__"].update(hf_pdecay="text"), "cannot be read as JSON"),
    "a manifest of a list": (
        lambda h: h["__metadata__"].update(hf_pdecay="[]"),
        "does not have a format_version",
    ),
    "a manifest of too little": (
        lambda h: h["__metadata__"].update(hf_pdecay='{"format_version": 2}'),
        "does not have exactly format_version, header, sha256",
    ),
    "a later manifest": (
        lambda h: h["__metadata__"].update(hf_pdecay='{"format_version": 4, "sha256": {}}'),
        "has version 4; this hf_pdecay reads 2 and 3",
    ),
    "a manifest of no tensors": (
        lambda h: h["__metadata__"].update(hf_pdecay='{"format_version": 2, "header": "", "sha256": {}}'),
        "does not list the tensors of the file",
    ),
}


def entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    found = [entry for name, entry in header.items() if name != "__metadata__"]
    return sorted(found, key=lambda entry: entry["data_offsets"][0])


def size(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)


@pytest.mark.parametrize("case", HEADERS)
def test_forged_headers(small: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, match = HEADERS[case]
    edit_header(first(small), change)
    monkeypatch.setenv("HF_PDECAY_VERIFY_CHECKSUMS", "0")
    refused(small, match)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            "twice",
        ),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a":NaN}', "NaN is not a number"),
        (b"[]", "not a table of tensors"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_headers_that_are_none(small: Path, raw: bytes, match: str) -> None:
    first(small).write_bytes(struct.pack("<Q", len(raw)) + raw)
    refused(small, match)


def test_a_header_longer_than_memory(small: Path) -> None:
    first(small).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(small, "its header would have 9223372036854775808 bytes and the file has 10")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/secret.safetensors", "a/../b.safetensors", "secret", 5, None]
)
@pytest.mark.parametrize("way", [compress, decompress])
def test_an_index_that_leads_out_of_the_folder(tmp_path: Path, way: Callable[..., object], name: object) -> None:
    folder = tmp_path / "in" / "folder"
    write_folder(folder, {"a": torch.zeros(64)}, {"b": torch.zeros(64)})
    if way is decompress:
        compress(folder, tmp_path / "in" / "small")
        folder = tmp_path / "in" / "small"
    (tmp_path / "in" / "secret.safetensors").write_bytes((first(folder)).read_bytes())
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(a=name))
    with pytest.raises(FormatError, match="it must be a plain name"):
        way(folder, tmp_path / "out")


def test_an_index_that_differs_from_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    write_folder(folder, {"a": torch.zeros(64)}, {"b": torch.zeros(64)})
    index = folder / "model.safetensors.index.json"
    before = index.read_text()
    for change in (
        lambda placed: placed.update(c=placed["a"]),
        lambda placed: placed.update(a=placed["b"]),
        lambda placed: placed.update(a="model-00003-of-00002.safetensors"),
    ):
        edit_json(index, lambda value, change=change: change(value["weight_map"]))  # type: ignore[misc]
        with pytest.raises(FormatError, match="differ in where|is missing from"):
            compress(folder, tmp_path / "out")
        index.write_text(before)


@pytest.mark.parametrize("name", ["README.md", "sub/notes.txt", "model.safetensors", "config.json", "linked"])
def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    saved("gpt2", tmp_path / "plain")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes((tmp_path / "plain" / "model.safetensors").read_bytes())
    link = tmp_path / "plain" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "secret" / ("" if name == "linked" else "key"))
    with pytest.raises(FormatError, match="is a link that leads out of the folder; it is not followed"):
        compress(tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """Where a snapshot is links to files beside it."""
    saved("gpt2", tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    compress(snapshot, tmp_path / "small")
    assert not any(each.is_symlink() for each in (tmp_path / "small").iterdir())
    decompress(tmp_path / "small", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "plain")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "plain")
    os.mkfifo(tmp_path / "plain" / "pipe")
    with pytest.raises(FormatError, match="pipe in .* is not a regular file"):
        compress(tmp_path / "plain", tmp_path / "out")


def with_huge_tensor(folder: Path, zstd: bool) -> None:
    """A valid folder, except that a few kilobytes describe a tensor of 4 TB."""
    saved("gpt2", folder.parent / "plain")
    compress(folder.parent / "plain", folder)
    file = folder / "model.safetensors"
    block = huge_block(1 if zstd else 2, zstd).tobytes()

    def change(header: dict[str, Any]) -> None:
        entry = entries(header)[-1]
        begin = entry["data_offsets"][0]
        entry.update(dtype="hf_pdecay", shape=[len(block)], data_offsets=[begin, begin + len(block)])

    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    last = entries(json.loads(data[8:end]))[-1]["data_offsets"][0]
    edit_header(file, change, data[end : end + last] + block)
    forge(folder)


@pytest.mark.parametrize("zstd", [False, True])
def test_a_tensor_larger_than_memory_is_refused_before_it_is_made(
    tmp_path: Path, zstd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_huge_tensor(tmp_path / "small", zstd)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="The plain model has 4[0-9]{12} bytes, and only [0-9]+ are free"):
            decompress(tmp_path / "small", tmp_path / "out")
        # With room on the disk, but not in memory.
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 62))
        with pytest.raises(FormatError, match="is a tensor of 4[0-9]{12} bytes; at most"):
            decompress(tmp_path / "small", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists()


def test_code_in_a_model_is_copied_and_not_run(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    write_folder(plain, {"a": torch.zeros(64)}, auto_map={"AutoModel": "modeling_evil.Model"})
    (plain / "modeling_evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    compress(plain, tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(plain)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("counted", [True, False])
def test_a_config_cannot_ask_for_a_model_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    model = saved("gpt2", tmp_path / "model")
    model.config.n_layer = 10**9
    if not counted:
        (tmp_path / "model/model.safetensors").unlink()
        monkeypatch.setattr("hf_pdecay.storage.untrusted._MOST_TENSORS", 10)
    there = "the 28 that its files have" if counted else "any model has"
    with pytest.raises(FormatError, match=f"many more tensors than {there}"):
        on_meta(type(model), model.config, tmp_path / "model")


def test_damage_is_told_before_a_lack_of_space(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit in a head may declare any size."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(ValueError, match="only 1 are free"):
        decompress(small, small.parent / "out")
    data = bytearray(first(small).read_bytes())
    data[-16] ^= 1
    first(small).write_bytes(data)
    refused(small, "its checksum differs")
