"""What FSDP and DeepSpeed must be told. On a CPU they do not start: what the Trainer knows of them is set by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from hf_pdecay.trainer.engines import check_engine, check_structured, check_world_size, engine_of
from hf_pdecay.trainer.resume_checks import check_engine_of


def trainer(fsdp: int | None = None, deepspeed: dict[str, Any] | None = None) -> Any:
    plugins = {
        "fsdp_plugin": SimpleNamespace(fsdp_version=fsdp),
        "deepspeed_plugin": SimpleNamespace(hf_ds_config=None if deepspeed is None else HfDeepSpeedConfig(deepspeed)),
    }
    return SimpleNamespace(
        is_fsdp_enabled=fsdp is not None,
        is_deepspeed_enabled=deepspeed is not None,
        accelerator=SimpleNamespace(state=SimpleNamespace(**plugins)),
    )


def test_what_is_set_up_well_passes() -> None:
    for case, name in ((trainer(), ""), (trainer(fsdp=2), "FSDP"), (trainer(deepspeed=zero(2)), "DeepSpeed")):
        check_engine(case)
        assert engine_of(case) == name
    check_engine(trainer(deepspeed=zero(3, offload_optimizer={"device": "cpu"})))


def test_fsdp1_is_refused() -> None:
    with pytest.raises(ValueError, match="fsdp_version=1 flattens .* Set fsdp_version: 2"):
        check_engine(trainer(fsdp=1))


def test_an_optimizer_of_deepspeed_is_refused() -> None:
    config = zero(2) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    with pytest.raises(ValueError, match="'optimizer' would take the place of optim='adamw_lp'"):
        check_engine(trainer(deepspeed=config))


@pytest.mark.parametrize(("case", "name"), [(trainer(fsdp=2), "FSDP"), (trainer(deepspeed={}), "DeepSpeed")])
def test_moments_that_cannot_be_sharded_are_refused(case: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"moments='8bit' under {name}, whose shards"):
        check_engine(case, moments="8bit")
    check_engine(trainer(), moments="8bit")
    check_engine(case, moments="bfloat16")


def test_groups_of_weights_that_nobody_could_find_are_refused() -> None:
    with pytest.raises(ValueError, match="group='head' under DeepSpeed, which gives .* or several under DDP or FSDP2"):
        check_structured(trainer(deepspeed={}), [{}, {"group": "head"}])
    sharded = trainer(fsdp=2)
    for optim, backend in (("sgd_lp", "auto"), ("adamw_lp", "foreach"), ("adamw_lp", "reference")):
        with pytest.raises(ValueError, match=f"under FSDP with optim='{optim}' and backend='{backend}'; units of"):
            check_structured(sharded, [{}, {"group": "head"}], optim, backend)
    check_structured(sharded, [{}, {"group": "head"}])
    experts = {"group": "row", "units": [{"members": [{"param": 0, "dim": 1, "matrix": 0}]}]}
    with pytest.raises(ValueError, match="group='row' on fused experts under FSDP"):
        check_structured(sharded, [{}, experts])
    check_structured(trainer(), [experts])
    for case in (trainer(deepspeed={}), trainer(fsdp=2)):
        check_structured(case, [{}, {"group": "element"}], "sgd_lp")
    check_structured(trainer(), [{"group": "head"}], "sgd_lp", "foreach")


def test_optimizers_that_need_shapes_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="optim='muon_lp' under DeepSpeed, which gives .* flat pieces"):
        check_engine(trainer(deepspeed=zero(2)), "muon_lp")
    with pytest.raises(ValueError, match="optim='lion_lp' under FSDP, whose shards it does not know"):
        check_engine(trainer(fsdp=2), "lion_lp")
    check_engine(trainer(fsdp=2), "muon_lp")
    check_engine(trainer(deepspeed=zero(2)), "sgd_lp")


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_nvme_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=f"{part}.device='nvme'"):
        check_engine(trainer(deepspeed=zero(3, **{part: {"device": "nvme"}})))


@pytest.mark.parametrize(
    ("files", "engine", "processes", "complaint"),
    [
        (["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"], "FSDP", 4, None),
        (
            ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"],
            "",
            1,
            "under FSDP, and this run is on one process",
        ),
        (["model.safetensors", "optimizer.pt"], "", 2, None),
        (["model.safetensors", "optimizer.pt"], "FSDP", 2, "on one process or DDP, and this run is under FSDP"),
        (["latest", "global_step5/a_optim_states.pt", "global_step5/b_optim_states.pt"], "DeepSpeed", 2, None),
        (
            ["latest", "global_step5/a_optim_states.pt", "global_step5/b_optim_states.pt"],
            "DeepSpeed",
            4,
            "by 2 processes",
        ),
        (["latest", "global_step5/a_optim_states.pt"], "FSDP", 1, "under DeepSpeed, and this run is under FSDP"),
    ],
)
def test_checkpoints_are_known_by_their_engine(
    files: list[str], engine: str, processes: int, complaint: str | None, tmp_path: Path
) -> None:
    for name in [*files, "scheduler.pt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(None))
    if complaint is None:
        check_engine_of(str(tmp_path), engine, processes)
        return
    with pytest.raises(ValueError, match=complaint):
        check_engine_of(str(tmp_path), engine, processes)


def test_a_checkpoint_of_the_model_alone_is_read_by_all(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    check_engine_of(str(tmp_path), "FSDP", 2)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args: Any = SimpleNamespace(device=torch.device("cuda", 0), world_size=8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="8 processes were started on a machine of 1 GPUs"):
        check_world_size(args)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check_world_size(args)


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}
