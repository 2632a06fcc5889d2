"""The tokenizer of a model in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..storage.folder import read_json


FILE = "tokenizer.json"
_WORDS, _DIGITS = "ByteLevel", "Digits"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How llama.cpp calls the ways in which tokenizers of bytes cut text into words, by the steps in tokenizer.json.
_CUTS = {
    (_WORDS,): "gpt-2",
    (_DIGITS, _WORDS): "smollm",
    (rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}",): "llama-bpe",
    (rf"{_CONTRACTIONS}\p{{N}}{_REST}",): "qwen2",
}
_OF_PIECES = "llama"  # SentencePiece's, with a token for each byte
_OF_BYTES = "gpt2"


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError if a model has a tokenizer that cannot be written."""
    if (folder / FILE).is_file():
        _kind(read_json(folder / FILE), folder)


def add_tokenizer(writer: Any, folder: Path, count: int) -> list[str]:
    """Write a tokenizer.

    Args:
        writer: A ``GGUFWriter``.
        folder: That of the model; without ``tokenizer.json`` the file says that there is none.
        count: How many tokens the model has.

    Returns:
        What is left to say.
    """
    if not (folder / FILE).is_file():
        writer.add_tokenizer_model("none")
        return [f"The model has no {FILE}, so the GGUF file has no tokenizer: programs must give it token ids."]
    from gguf import SpecialVocab, TokenType

    said = read_json(folder / FILE)
    kind, cut = _kind(said, folder)
    tokens = [f"[PAD{place}]" for place in range(count)]
    kinds = [TokenType.UNUSED] * count
    for token, place in said["model"]["vocab"].items():
        tokens[place], kinds[place] = token, TokenType.NORMAL
        if kind == _OF_PIECES and len(token) == 6 and token.startswith("<0x"):
            kinds[place] = TokenType.BYTE
    for added in said.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = said["model"].get("unk_token")
    if kind == _OF_PIECES and unknown in tokens:
        kinds[tokens.index(unknown)] = TokenType.UNKNOWN
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if kind == _OF_PIECES:
        writer.add_token_scores(_scores(said["model"], tokens))
        writer.add_add_space_prefix("prepend" in str(said.get("normalizer")).lower() or _begins(said))
    SpecialVocab(folder, load_merges=kind == _OF_BYTES, n_vocab=count).add_to_gguf(writer, quiet=True)
    return []


def _kind(said: dict[str, Any], folder: Path) -> tuple[str, str]:
    """How llama.cpp calls a tokenizer, and its way of cutting text; raise ValueError if it has none."""
    model = said.get("model") or {}
    steps = _steps(said.get("pre_tokenizer"))
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return _OF_PIECES, "default"
    if model.get("type") == "BPE" and steps in _CUTS:
        return _OF_BYTES, _CUTS[steps]
    raise ValueError(
        f"Invalid format: format='gguf' does not know the tokenizer of {str(folder)!r}, a {model.get('type')} with the "
        f"steps {', '.join(steps) or 'none'}; known are SentencePiece's BPE, and the BPE of GPT-2, SmolLM, Llama 3 and "
        "Qwen 2. Write plain weights, which llama.cpp's convert_hf_to_gguf.py reads."
    )


def _steps(cutter: Any) -> tuple[str, ...]:
    """The steps by which a tokenizer cuts text into words: their patterns, or their types."""
    if not cutter:
        return ()
    if cutter["type"] == "Sequence":
        return tuple(step for part in cutter["pretokenizers"] for step in _steps(part))
    if cutter["type"] == "Split" and cutter.get("behavior") == "Isolated":
        return (str(cutter["pattern"].get("Regex")),)
    if cutter["type"] == _WORDS:
        return (_WORDS,) if cutter.get("use_regex", True) else ()
    return (cutter["type"] if cutter.get("individual_digits", True) else f"{cutter['type']} together",)


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """What llama.cpp merges by, the highest first: the place of a token's first merge, as SentencePiece has it."""
    ranks: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), place)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _begins(said: dict[str, Any]) -> bool:
    """Whether a tokenizer puts a space before a text."""
    return "'prepend_scheme': 'first'" in str(said) or "'prepend_scheme': 'always'" in str(said)
