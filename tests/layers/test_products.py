from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from hf_pdecay.layers.matrices import decayable_parameter_names
from hf_pdecay.layers.products import Product, products_of


ROWS, COLUMNS, WHOLE = Product(True, False), Product(True, True), Product(False, None)

# Per architecture, the parameters of three dimensions by their last name: what decays, and what does not.
THREE_DIMENSIONS: dict[str, tuple[set[str], set[str]]] = {
    "xlnet": ({"q", "k", "v", "o", "r"}, {"seg_embed"}),
    "funnel": ({"r_kernel"}, {"seg_embed"}),
    "zamba": ({"x_proj_weight", "dt_proj_weight"}, {"A_log"}),
    "recurrent_gemma": ({"input_gate_weight", "recurrent_gate_weight"}, set()),
    "gemma4_vision": (set(), {"position_embedding_table"}),
    "kimi_k25_vision": (set(), {"position_embeddings"}),
    "mixtral": ({"gate_up_proj", "down_proj"}, set()),
    "csm": (set(), {"weight"}),
    "vit": (set(), {"cls_token", "position_embeddings"}),
    "perceiver": (set(), set()),
}


@pytest.mark.parametrize("name", THREE_DIMENSIONS)
def test_only_what_is_multiplied_decays(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip("this release of transformers lacks the architecture")
    config = CONFIG_MAPPING[name]()
    known = MODEL_MAPPING[type(config)]
    with torch.device("meta"):
        model = (known if isinstance(known, type) else known[0])(config)
    found = set(decayable_parameter_names(model))
    layers = (nn.modules.conv._ConvNd,)
    bare = {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        for key, param in module.named_parameters(recurse=False)
        if param.dim() == 3 and not isinstance(module, layers)
    }
    decays, rests = THREE_DIMENSIONS[name]
    if name == "mixtral" and not bare:
        pytest.skip("this release of transformers has lists of experts")
    assert {key.rpartition(".")[2] for key in bare & found} == decays
    assert rests <= {key.rpartition(".")[2] for key in bare - found}


def _stated() -> list[tuple[str, str, bool]]:
    """Module, class and layout of all experts of transformers, from the text of the decorator."""
    found = []
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for options, name in re.findall(r"^@use_experts_implementation(.*)\nclass (\w+)", file.read_text(), re.M):
            module = f"transformers.models.{file.parent.name}.{file.stem}"
            found.append((module, name, "is_transposed=True" in options))
    return found


@pytest.mark.slow
def test_all_experts_of_transformers_are_read_as_they_state() -> None:
    stated = _stated()
    if not stated:
        pytest.skip("this release of transformers does not state the layout of experts")
    for module, name, transposed in stated:
        found = products_of(getattr(importlib.import_module(module), name))
        assert {"down_proj"} <= found.keys() and found.keys() & {"gate_up_proj", "up_proj"}, name
        assert set(found.values()) == {Product(True, transposed)}, name


# All that decays of the parameters with three dimensions or more, besides experts and convolutions. Whoever adds a name
# here has read the module: it multiplies by the parameter.
MULTIPLIED = {
    "FunnelRelMultiheadAttention": {"r_kernel"},
    "JetMoeParallelExperts": {"weight"},
    "RecurrentGemmaRglru": {"input_gate_weight", "recurrent_gate_weight"},
    "XLNetRelativeAttention": {"q", "k", "v", "o", "r"},
    "ZambaMambaMixer": {"x_proj_weight", "dt_proj_weight"},
}


def _shorten(config: Any, depth: int = 0) -> None:
    for key, value in list(vars(config).items()):
        if re.search("layers?$", key) and type(value) is int and value > 4:
            setattr(config, key, 4)
        elif isinstance(value, transformers.PretrainedConfig) and depth < 3:
            _shorten(value, depth + 1)


@pytest.mark.slow
def test_all_architectures_of_transformers() -> None:
    seen: dict[tuple[str, str], set[bool]] = {}
    made = 0
    for name in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[name]()
            known = MODEL_MAPPING[type(config)]
            _shorten(config)
            with torch.device("meta"):
                model = (known if isinstance(known, type) else known[0])(config)
        except Exception:  # it needs a package, or a value that its default config lacks; its parts may be made
            continue
        made += 1
        found = set(decayable_parameter_names(model))
        for path, module in model.named_modules():
            for key, param in module.named_parameters(recurse=False):
                if param.dim() >= 3 and not isinstance(module, nn.modules.conv._ConvNd):
                    decays = (f"{path}.{key}" if path else key) in found
                    seen.setdefault((type(module).__name__, key), set()).add(decays)
    assert made > 250
    wrong = [
        f"{owner}.{key}"
        for (owner, key), decisions in seen.items()
        if decisions != {owner.endswith("Experts") and key.endswith("proj") or key in MULTIPLIED.get(owner, ())}
    ]
    assert not wrong
    assert {(owner, key) for owner, keys in MULTIPLIED.items() for key in keys} <= seen.keys()


def _helper(inputs: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
    parts = [part @ weight for part, weight in zip(inputs.split(sizes), weights, strict=False)]
    return torch.cat(parts)


class Ways(nn.Module):
    """Parameters of three dimensions in products of many kinds, and in none."""

    def forward(self, x: Tensor, index: Tensor, sizes: list[int]) -> Tensor:
        x = F.linear(x, self.linear[0]) + F.linear(input=x, weight=self.keywords[index[0]])
        x = torch.bmm(x, self.bmm) + x.bmm(self.method.transpose(-1, -2).to(x.dtype)) + x @ self.at.mT
        x = torch.baddbmm(x, x, self.added.permute(0, 2, 1)) + self.left[:, None] @ x
        chosen = torch.index_select(self.chosen, 0, index)
        x = torch.matmul(x, chosen) + _helper(x, self.helped, sizes) + self._twice(x, weight=self.own)
        for weight in self.looped:
            x = F.linear(x, weight)
        x = torch.einsum("ebi,eio->ebo", x, self.summed) + torch.einsum("bind,snd->ibns", x, self.segments)
        x = torch.einsum("bih,hnd->bind", x, self.heads)
        places = F.one_hot(index, 4).to(x.dtype)
        x = x + places @ self.table + F.embedding(index, self.embedded[0]) + self.added_only * self.scale[index]
        return x.view(self.only_its_shape.shape)

    def _twice(self, x: Tensor, weight: Tensor) -> Tensor:
        both = weight if self.training else weight.clone()
        return F.linear(F.linear(x, both[0]), both[1])


class Inherits(Ways):
    pass


@pytest.mark.parametrize("cls", [Ways, Inherits])
def test_ways_to_multiply(cls: type[nn.Module]) -> None:
    assert products_of(cls) == {
        "linear": ROWS,
        "keywords": ROWS,
        "bmm": COLUMNS,
        "method": ROWS,
        "at": ROWS,
        "added": ROWS,
        "left": ROWS,
        "chosen": COLUMNS,
        "helped": COLUMNS,
        "own": ROWS,
        "looped": ROWS,
        "summed": COLUMNS,
        "heads": WHOLE,
    }


def test_a_class_without_source_has_none() -> None:
    namespace: dict[str, type] = {}
    exec("from torch import nn\nclass Hidden(nn.Module):\n    def forward(self, x): return x @ self.w", namespace)
    assert products_of(namespace["Hidden"]) == {}
