"""Shrinking models whose sizes stand in a config within the config, uniformly, so that they load anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_pdecay.layers.finding import find_layers
from hf_pdecay.shrinking.folder import shrink_folder
from hf_pdecay.shrinking.model import shrink_model


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
IMAGES = {**{key: value for key, value in SIZES.items() if key != "vocab_size"}, "image_size": 32, "patch_size": 8}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
FFN = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 48, "d_model": 32, "vocab_size": 64}


def llava() -> Any:
    vision, text = IMAGES | {"model_type": "clip_vision_model"}, GROUPED | {"model_type": "llama"}
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    )


def gemma3() -> Any:
    vision = IMAGES | {"model_type": "siglip_vision_model"}
    special = {"mm_tokens_per_image": 16, "image_token_index": 63, "boi_token_index": 60, "eoi_token_index": 61}
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=GROUPED, vision_config=vision, **special))


def clip() -> Any:
    text, vision = SIZES | {"bos_token_id": 1, "eos_token_id": 2}, IMAGES | {"intermediate_size": 48}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def two_berts() -> Any:
    bert = tf.BertConfig(**SIZES)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, tf.BertConfig(**SIZES))
    return tf.EncoderDecoderModel(config)


def vit_and_bert() -> Any:
    vit, bert = tf.ViTConfig(**IMAGES), tf.BertConfig(**SIZES)
    return tf.VisionEncoderDecoderModel(tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, bert))


def bart() -> Any:
    return tf.BartForConditionalGeneration(tf.BartConfig(**FFN, **LAYERS, **ENDS))


def whisper() -> Any:
    return tf.WhisperModel(tf.WhisperConfig(**FFN, **LAYERS, **ENDS, num_mel_bins=8, max_source_positions=16))


def inputs(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    tokens, images = torch.arange(3, 11)[None], torch.randn(1, 3, 32, 32).double()
    found: dict[str, Any] = {"input_ids": tokens}
    if isinstance(model, tf.CLIPModel):
        found["pixel_values"] = images
    if isinstance(model, tf.VisionEncoderDecoderModel):
        found = {"pixel_values": images, "decoder_input_ids": tokens}
    if isinstance(model, tf.WhisperModel):
        found = {"input_features": torch.randn(1, 8, 32).double(), "decoder_input_ids": tokens}
    if isinstance(model, tf.EncoderDecoderModel):
        found["decoder_input_ids"] = tokens
    return found


def half_dead(make: Callable[[], Any]) -> Any:
    """A model in which the first half of all neurons and heads is dead."""
    torch.manual_seed(0)
    model = make().eval().double()
    params = dict(model.named_parameters())
    for kind in ("neuron", "head"):
        try:
            layers = find_layers(model, kind)
        except ValueError:
            continue
        for layer in layers:
            for member, site in zip(layer.units.members, layer.sites, strict=True):
                if site.part in ("down", "output"):
                    size = layer.units.count // 2 * member.size
                    params[member.param].data.narrow(member.dim, member.offset, size).zero_()
    return model


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
CASES: list[tuple[Callable[[], Any], dict[str, dict[str, int]]]] = [
    (llava, {"text_config": HEADS | {"intermediate_size": 32}, "vision_config": {"intermediate_size": 32}}),
    (gemma3, {"text_config": HEADS | {"intermediate_size": 32}, "vision_config": {"intermediate_size": 32}}),
    (clip, {"text_config": {"intermediate_size": 32}, "vision_config": {"intermediate_size": 24}}),
    (two_berts, {"encoder": {"intermediate_size": 32}, "decoder": {"intermediate_size": 32}}),
    (vit_and_bert, {"encoder": {"intermediate_size": 32}, "decoder": {"intermediate_size": 32}}),
    (bart, {"": {"encoder_ffn_dim": 32, "decoder_ffn_dim": 24}}),
    (whisper, {"": {"encoder_ffn_dim": 32, "decoder_ffn_dim": 24}}),
]


@pytest.mark.parametrize(("make", "sizes"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_sizes_within_a_config(make: Callable[[], Any], sizes: dict[str, dict[str, int]], tmp_path: Path) -> None:
    if make.__name__ == "clip" and tf.__version__.startswith("4."):
        pytest.skip("CLIP of transformers 4 takes no float64: the value that masks is out of range")
    model = half_dead(make)
    model.save_pretrained(tmp_path / "sparse")
    report = shrink_folder(tmp_path / "sparse", tmp_path / "small")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("sparse", "small"))
    for path, values in sizes.items():
        assert (after[path] if path else after).items() >= values.items()
    assert before.keys() == after.keys()
    small, info = type(model).from_pretrained(tmp_path / "small", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert report.parameters[1] == sum(param.numel() for param in small.parameters()) < report.parameters[0]
    with torch.no_grad():
        expected, found = (each.eval()(**inputs(each)).to_tuple() for each in (model, small))
    for one, other in zip(expected, found, strict=True):
        if torch.is_tensor(one):  # Gemma's norms compute in float32
            assert torch.allclose(one, other, rtol=0, atol=1e-6 * float(one.abs().max()))


def test_a_model_in_memory_and_a_part_that_is_full(tmp_path: Path) -> None:
    """Only the text part has dead neurons; all configs of the modules agree afterwards, and the model can be saved."""
    model = llava()
    for name, param in model.named_parameters():
        if "language_model" in name and "down_proj" in name:
            param.data[:, :32] = 0
    assert shrink_model(model).config == {"text_config.intermediate_size": 32}
    sizes = {
        module.config.intermediate_size
        for module in model.modules()
        if isinstance(getattr(module, "config", None), tf.LlamaConfig)
    }
    assert sizes == {32} and model.config.vision_config.intermediate_size == 64
    model.save_pretrained(tmp_path / "saved")
    type(model).from_pretrained(tmp_path / "saved")
