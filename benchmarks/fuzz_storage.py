"""Feed damaged and forged compressed files to the readers, and count what they do.

    python benchmarks/fuzz_storage.py

Changes valid blocks, files and folders at random: flipped bits, bytes set to telling values, pieces removed, doubled
and exchanged, numbers in JSON replaced. Each input must be refused by a `FormatError`, or give bit-identical tensors;
without checksums, or with recomputed ones, it may also give other values of the declared shape. Anything else is a
crash: other errors, more memory than the process may use, a process that dies. If `atheris` is installed, `--atheris`
lets it choose the inputs by coverage. Takes about a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from hf_pdecay import FormatError, compress, decompress, write_delta
from hf_pdecay.storage import container, encoding, zstd_planes
from hf_pdecay.storage.compressed_file import CompressedFile
from hf_pdecay.storage.container import BLOCK, header_bytes, layout, read_header
from hf_pdecay.storage.encoding import decode, encode
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
NUMBERS = (0, 1, 7, 8, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    -1,
    1.5,
    1e308,
    None,
    True,
    "",
    "..",
    "/etc/passwd",
    "U8",
    "F32",
    [],
    {},
    [[]],
    "\0",
    "é",
    "\ud800",
)
# The largest tensor, and the memory that the process may use beyond what it has when fuzzing begins.
LIMIT = 1 << 22
MEMORY = 1 << 30

Outcome = str


def changed(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """Return bytes with 1 to 3 changes."""
    result = bytearray(data)
    kinds = chance.choice((4, 9))  # half of them keep the length, and get further
    for _ in range(chance.randint(1, 3)):
        place, length = chance.randrange(len(result) + 1), chance.choice((1, 4, 8, 64, 1000))
        match chance.randrange(kinds):
            case 0 | 1 if place < len(result):
                result[place] ^= 1 << chance.randrange(8)
            case 2 if place < len(result):
                result[place] = chance.choice((0, 1, 127, 128, 255))
            case 3 if len(result) >= 8:
                form, size = chance.choice((("<Q", 8), ("<I", 4), ("<H", 2)))
                at = chance.randrange(len(result) - size + 1) // size * size
                struct.pack_into(form, result, at, chance.choice(NUMBERS) % (1 << 8 * size))
            case 4:
                del result[place : place + length]
            case 5:
                result[place:place] = result[place : place + length]
            case 6:
                result = result[:place]
            case 7:
                result[place:place] = bytes(length)
            case 8:
                other = chance.choice(others)
                result[place : place + length] = other[place : place + length]
    return bytes(result)


def changed_json(value: Any, chance: random.Random) -> Any:
    """Return JSON values with one of them replaced, removed or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        result = dict(value)
        match chance.randrange(6):
            case 0:
                del result[key]
            case 1:
                result[str(chance.choice(VALUES))] = result[key]
            case _:
                result[key] = changed_json(value[key], chance)
        return result
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        return [*value[:place], changed_json(value[place], chance), *value[place + 1 :]]
    if isinstance(value, str) and chance.random() < 0.3:
        with contextlib.suppress(ValueError):
            return json.dumps(changed_json(json.loads(value), chance))
    return chance.choice(VALUES)


def judge(read: Callable[[], bool]) -> Outcome:
    """Return the outcome of an input; ``read`` returns whether it restored the original."""
    try:
        return "identical" if read() else "other values"
    except FormatError as error:
        return "refused" if str(error).endswith(".") else f"crash: no sentence: {error}"
    except Exception as error:  # noqa: BLE001  what else there may be is what is looked for
        return f"crash: {type(error).__name__}: {error}"


class Blocks:
    """Blocks of one tensor, of each encoding, with and without zstd, as :func:`decode` gets them."""

    name = "a block, no checksum"
    may_differ = True

    def __init__(self, folder: Path) -> None:
        self.seeds: list[tuple[bytes, bytes]] = []
        for dtype, size, shape in (("F32", 4, (60, 50)), ("BF16", 2, (3001,)), ("U8", 1, (10, 3, 7)), ("F64", 8, ())):
            for zeros, negative in itertools.product((0.0, 0.5, 0.9, 0.995, 1.0), (0.0, 0.5)):
                for zstd in (False, True):
                    data = sparse(int(np.prod(shape, dtype=int)), size, zeros, negative)
                    _, block = encode(data, dtype, shape, zstd)
                    if block is not None:
                        self.seeds.append((block.tobytes(), data.tobytes()))
        for zeros in (0.0, 0.5, 0.95):
            numbers = np.random.default_rng(1).integers(-7, 8, 1000).astype("<f4")
            numbers *= np.repeat([0.5, 0.75, 3, 5], 250).astype("<f4")
            numbers *= np.random.default_rng(2).random(1000) >= zeros
            coded = (numbers + np.float32(0)).view(np.uint8)
            for zstd in (False, True):
                _, block = encode(coded, "F32", (4, 250), zstd)
                if block is not None:
                    self.seeds.append((block.tobytes(), coded.tobytes()))
        self.blocks = [block for block, _ in self.seeds]

    def try_one(self, chance: random.Random) -> Outcome:
        """Decode a changed block."""
        block, data = chance.choice(self.seeds)
        return self.feed(changed(block, self.blocks, chance), data)

    def feed(self, block: bytes, data: bytes) -> Outcome:
        """Decode a block."""

        def read() -> bool:
            decoded, head = decode(np.frombuffer(block, dtype=np.uint8), LIMIT, "it")
            if decoded.nbytes != head.dense or head.dense > LIMIT:
                raise AssertionError("a tensor of another size than is told")
            return decoded.tobytes() == data

        return judge(read)


class Files:
    """Whole files of weights as the loader checks and decodes them."""

    def __init__(self, folder: Path, forged: bool) -> None:
        self.name = "a file, checksums made right" if forged else "a file"
        self.may_differ = self.forged = forged
        make_folder(folder / "plain", folder / "small")
        self.work = folder / "model.safetensors"
        self.files = [file.read_bytes() for file in sorted((folder / "small").glob("*.safetensors"))]
        self.tensors = []
        for content in self.files:
            self.work.write_bytes(content)
            self.tensors.append(self.read())

    def read(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """Check a file and decode its tensors."""
        file = CompressedFile(self.work)
        tensors = {}
        for name, entry in file.header.entries.items():
            stored = file.stored(name)
            if entry.dtype == BLOCK:
                decoded, head = decode(stored, LIMIT, name)
                tensors[name] = (head.dtype, head.shape, decoded.tobytes())
            else:
                tensors[name] = (entry.dtype, entry.shape, stored.tobytes())
        return tensors

    def try_one(self, chance: random.Random) -> Outcome:
        """Read a changed file."""
        which = chance.randrange(len(self.files))
        data = self.files[which]
        end = 8 + int.from_bytes(data[:8], "little")
        if chance.random() < 0.4:
            raw = json.dumps(changed_json(json.loads(data[8:end]), chance)).encode("utf-8", "surrogatepass")
            data = struct.pack("<Q", len(raw)) + raw + data[end:]
        elif self.forged:
            data = data[:end] + changed(data[end:], self.files, chance)
        else:
            data = changed(data, self.files, chance)
        if data in self.files:  # another whole file is not a damaged one
            return "identical"
        self.work.write_bytes(data)
        if self.forged:
            with contextlib.suppress(FormatError, ValueError):
                make_right(self.work)
        return judge(lambda: self.read() == self.tensors[which])


class Deltas(Files):
    """Files of deltas, with checksums made right, whose base is a model of two files."""

    def __init__(self, folder: Path) -> None:
        self.name, self.may_differ, self.forged = "a delta, checksums made right", True, True
        self.base, tuned = folder / "plain", folder / "tuned"
        make_folder(self.base, folder / "small")
        shutil.copytree(self.base, tuned)
        for file in sorted(tuned.glob("*.safetensors")):
            bits = bytearray(file.read_bytes())
            for place in range(len(bits) - 4000, len(bits), 97):
                bits[place] ^= 1
            file.write_bytes(bits)
        self.work = folder / "model.safetensors"
        self.files = []
        for zstd in (False, True):
            write_delta(self.base, tuned, folder / "delta", zstd=zstd, overwrite=True)
            self.files.append((folder / "delta" / "model.safetensors").read_bytes())
        self.tensors = []
        for content in self.files:
            self.work.write_bytes(content)
            self.tensors.append(self.read())

    def read(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """Check a file and put its changes into its base."""
        file = CompressedFile(self.work, base_folder=self.base)
        return {name: (*file.form(name), file.plain(name).tobytes()) for name in file.header.entries}


class Folders:
    """Folders as :func:`decompress` reads them, with one of their files changed."""

    name = "a folder"
    may_differ = False

    def __init__(self, folder: Path) -> None:
        self.plain, self.small, self.out = folder / "plain", folder / "small", folder / "out"
        make_folder(self.plain, self.small)
        self.files = {file: file.read_bytes() for file in sorted(self.small.iterdir())}
        # The config's other keys belong to the model and come back unchanged.
        self.compared = [file.name for file in sorted(self.plain.iterdir()) if file.name != "config.json"]

    def try_one(self, chance: random.Random) -> Outcome:
        """Decompress a folder with a changed file."""
        file = chance.choice(list(self.files))
        data = self.files[file]
        if file.suffix == ".json" and chance.random() < 0.7:
            value = json.loads(data)
            value = changed_json(value, chance)
            file.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        else:
            file.write_bytes(changed(data, [data], chance))

        def read() -> bool:
            decompress(self.small, self.out)
            index = "model.safetensors.index.json"
            same = [name for name in self.compared if name != index or file.name != index]
            return all((self.out / name).read_bytes() == (self.plain / name).read_bytes() for name in same)

        try:
            return judge(read)
        finally:
            file.write_bytes(data)
            shutil.rmtree(self.out, ignore_errors=True)


def sparse(numel: int, size: int, zeros: float, negative: float = 0.0) -> Any:
    """Random elements as bytes: a share of them is zero, and a share of the zeros is negative."""
    generator = np.random.default_rng(numel + size)
    data = generator.integers(0, 256, (numel, size), dtype=np.uint8)
    zero = generator.random(numel) < zeros
    data[zero] = 0
    data[zero & (generator.random(numel) < negative), -1] = 0x80
    return data.reshape(-1)


def make_folder(plain: Path, small: Path) -> None:
    """Write a model of two small files, and compress it."""
    plain.mkdir(parents=True, exist_ok=True)
    placed: dict[str, str] = {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        shapes = {"weight": (40, 25), "ids": (3,), "bias": (7,), "scale": (), "none": (0, 4)}
        tensors = {f"{part}.{number}": ("I64" if part == "ids" else "F32", shape) for part, shape in shapes.items()}
        ordered = {name: tensors[name] for name in layout(tensors)}
        raw = header_bytes(ordered, {"format": "pt"})
        data = [
            sparse(int(np.prod(shape, dtype=int)), 8 if kind == "I64" else 4, 0.9) for kind, shape in ordered.values()
        ]
        (plain / name).write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(tensor.tobytes() for tensor in data))
        placed |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (plain / "config.json").write_text('{\n  "dtype": "float32"\n}\n')
    compress(plain, small, zstd=True, overwrite=True)


def make_right(file: Path) -> None:
    """Recompute a file's checksums, as a forger would."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    parsed = json.loads(data[8:end])
    sums = {
        name: hashlib.sha256(data[entry.begin : entry.begin + entry.size]).hexdigest()
        for name, entry in read_header(file).entries.items()
    }
    if isinstance(parsed.get("__metadata__"), dict):
        manifest = {"format_version": 3, "header": "0" * 64, "sha256": sums}
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a base is not recomputed
            manifest["base"] = json.loads(parsed["__metadata__"]["hf_pdecay"])["base"]
        parsed["__metadata__"]["hf_pdecay"] = json.dumps(manifest)
    raw = json.dumps(parsed).encode("utf-8", "surrogatepass")
    raw = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[end:])


def fuzz(target: Any, inputs: int, seed: int) -> dict[str, Any]:
    """Try a number of inputs."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    crashes: list[str] = []
    begin = time.perf_counter()
    for _ in range(inputs):
        outcome = target.try_one(chance)
        if outcome == "other values" and not target.may_differ:
            outcome = "crash: other values in spite of checksums"
        if outcome.startswith("crash"):
            crashes.append(outcome)
        counts[outcome.split(":")[0]] += 1
    kinds = ("refused", "identical", "other values", "crash")
    figures = {kind: counts[kind] for kind in kinds}
    return {
        "name": target.name,
        "inputs": inputs,
        "seconds": time.perf_counter() - begin,
        **figures,
        "crashes": crashes[:20],
    }


def with_atheris(folder: Path, inputs: int) -> None:
    """Let atheris choose blocks by coverage; it ends the process."""
    import atheris

    for module in (container, encoding, zstd_planes):
        for function in vars(module).values():
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    blocks = Blocks(folder)

    def one(data: bytes) -> None:
        outcome = blocks.feed(data, b"")
        if outcome.startswith("crash"):
            raise RuntimeError(outcome)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, block in enumerate(blocks.blocks):
        (corpus / str(number)).write_bytes(block)
    atheris.Setup([sys.argv[0], f"-runs={inputs}", str(corpus)], one)
    atheris.Fuzz()


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, print the table and write it; 1 if there was a crash."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=50_000, help="for each kind; a fifth of it for folders (50000)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (0)")
    parser.add_argument("--atheris", action="store_true", help="let atheris choose blocks, and nothing else")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    words = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(words)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        folder = Path(name)
        if options.atheris:
            with_atheris(folder, options.inputs)
        files = [Files(folder / "a", False), Files(folder / "b", True), Deltas(folder / "d")]
        targets = [Blocks(folder), *files, Folders(folder / "c")]
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
        try:
            outcomes = [
                fuzz(target, options.inputs // (5 if isinstance(target, Folders) else 1), options.seed)
                for target in targets
            ]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    record = {
        **conditions("cpu", ["numpy", "zstandard"]),
        "command": command("fuzz_storage.py", words),
        "targets": outcomes,
    }
    text = report(record)
    write(record, text, options.output, "fuzz_storage")
    print(text)
    return int(any(outcome["crash"] for outcome in outcomes))


def report(record: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    kinds = ("inputs", "refused", "identical", "other values", "crash")
    rows = [
        [target["name"], *(f"{target[kind]:,}" for kind in kinds), f"{target['seconds']:.0f}"]
        for target in record["targets"]
    ]
    sums = [f"{sum(target[kind] for target in record['targets']):,}" for kind in kinds]
    rows.append(["all", *sums, f"{sum(target['seconds'] for target in record['targets']):.0f}"])
    parts = ["# Damaged and forged compressed files", describe(record)]
    parts.append(table(["changed at random", "inputs tried", *kinds[1:-1], "crashes", "seconds"], rows))
    parts.append(
        "*refused*: by a `FormatError`, a sentence. *identical*: what was changed is of no account, such as a space in "
        "JSON. *other values*: a changed value under a checksum that is made right, or under none."
    )
    parts += [
        f"- {name}: {crash}"
        for target in record["targets"]
        for name, crash in ((target["name"], c) for c in target["crashes"])
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
