"""Shrinking models whose sizes stand in a config within the config, uniformly, so that they load anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import hf_pdecay
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


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0))


def siglip() -> Any:
    text = SIZES | {"max_position_embeddings": 64}
    return tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=IMAGES))


def ragged(make: Callable[[], Any], folder: Path) -> None:
    """Write a sparse model, its ragged one with another size in each layer, and that one compressed."""
    model = half_dead(make)
    params = dict(model.named_parameters())
    for place, layer in enumerate(find_layers(model, "neuron")):
        for member, site in zip(layer.units.members, layer.sites, strict=True):
            if site.part == "down":
                params[member.param].data.narrow(member.dim, 0, place + 1).normal_()
    model.save_pretrained(folder / "plain")
    shrink_folder(folder / "plain", folder / "ragged", layers="ragged")
    hf_pdecay.compress(folder / "ragged", folder / "compressed")


# The last matrices of layers of neurons.
LAST = "fc2.weight", "wo.weight", "down_proj.weight"
PARTS: list[tuple[Callable[[], Any], list[Any]]] = [
    (clip, [tf.CLIPVisionModel, tf.CLIPTextModel, tf.CLIPModel]),
    (siglip, [tf.SiglipVisionModel, tf.SiglipTextModel]),
    (t5, [tf.T5EncoderModel, tf.T5Model, tf.T5ForSequenceClassification]),
    (bart, [tf.BartForCausalLM, tf.BartModel]),
    (whisper, [tf.WhisperForAudioClassification]),
    (llava, [tf.LlavaModel, tf.LlavaForConditionalGeneration]),
]


@pytest.mark.parametrize(("make", "classes"), PARTS, ids=[make.__name__ for make, _ in PARTS])
def test_a_part_of_a_ragged_model(make: Callable[[], Any], classes: list[Any], tmp_path: Path) -> None:
    """Each part has the weights of that part of the sparse model, without dead units, also if sizes may differ."""
    ragged(make, tmp_path)
    for cls in classes:
        whole = cls.from_pretrained(tmp_path / "plain", dtype="auto")
        for name in ("ragged", "compressed"):
            for mismatched in (False, True):
                part, info = cls.from_pretrained(
                    tmp_path / name, dtype="auto", ignore_mismatched_sizes=mismatched, output_loading_info=True
                )
                assert not info["mismatched_keys"]
                assert sum(map(torch.numel, part.parameters())) < sum(map(torch.numel, whole.parameters()))
                last = [path for path, _ in part.named_parameters() if path.endswith(LAST)]
                assert last
                for path in last:
                    assert part.get_parameter(path).count_nonzero() == whole.get_parameter(path).count_nonzero() > 0
        part.save_pretrained(tmp_path / "again")
        again = cls.from_pretrained(tmp_path / "again", dtype="auto")
        assert all(map(torch.equal, part.state_dict().values(), again.state_dict().values()))
    if make is clip and not tf.__version__.startswith("4."):
        pixels = torch.randn(1, 3, 32, 32).double()
        expected, found = (
            tf.CLIPVisionModel.from_pretrained(tmp_path / name, dtype="auto").eval()(pixels)[0]
            for name in ("plain", "ragged")
        )
        assert torch.allclose(expected, found, rtol=0, atol=1e-9)


def test_a_part_whose_names_are_others_is_refused(tmp_path: Path) -> None:
    ragged(llava, tmp_path)
    for mismatched in (False, True):
        with pytest.raises(ValueError, match="which LlamaForCausalLM does not have"):
            tf.LlamaForCausalLM.from_pretrained(tmp_path / "ragged", ignore_mismatched_sizes=mismatched)


_WITHOUT = """
import sys
sys.modules["hf_pdecay"] = None
import transformers as tf
for cls in (tf.CLIPModel, tf.AutoModel, tf.CLIPVisionModel, tf.CLIPTextModel):
    for mismatched in (False, True):
        try:
            cls.from_pretrained(sys.argv[1], ignore_mismatched_sizes=mismatched)
            print("loaded", cls, mismatched)
        except ValueError as error:
            assert "quant_method" in str(error), error
print("end")
"""


@pytest.mark.slow
def test_without_this_package_no_part_of_a_ragged_model_loads(tmp_path: Path) -> None:
    """Also not with ignore_mismatched_sizes, which would make the ragged layers anew."""
    ragged(clip, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(tmp_path / "ragged")], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["end"], done.stdout + done.stderr
