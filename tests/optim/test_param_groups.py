"""The list of the keys that the package adds to param groups."""

from __future__ import annotations

import torch
from torch import nn

from hf_pdecay import AdamWLp, LpDecay, SparsityControl, build_param_groups
from hf_pdecay.optim.param_groups import DecayGroup, is_decayed, steps_decay


def test_decay_group_lists_every_key() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    plain = set(torch.optim.AdamW(model.parameters()).param_groups[0]) | {"initial_lr"}
    added: set[str] = set()
    for wrapped, decay_to in ((False, "zero"), (True, "zero"), (False, "base")):
        groups = build_param_groups(model, p_norm=0.8, lambda_p=0.01, rules={"^0": {"group": "row"}}, decay_to=decay_to)
        optimizer = LpDecay(torch.optim.AdamW(groups)) if wrapped else AdamWLp(groups)
        control = SparsityControl(optimizer, 40, target_sparsity=0.5, p_norm_begin=1.0)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        control.before_step(1)
        optimizer.step()
        control.after_step(control.schedule.end)
        added |= {key for group in optimizer.param_groups for key in group} - plain
    assert added <= set(DecayGroup.__annotations__)
    assert set(DecayGroup.__annotations__) - added <= {"use_muon"}


def test_groups_with_a_target_are_decayed_in_all_phases() -> None:
    optimizer = AdamWLp([nn.Parameter(torch.ones(20, 20))], lr=0.1)
    control = SparsityControl(optimizer, 40, target_sparsity=0.5)
    (group,) = optimizer.param_groups
    phases = []
    for step in range(1, 41):
        group["params"][0].grad = torch.randn(20, 20)
        control.before_step(step)
        assert is_decayed(group) and steps_decay(group)
        assert group["phase"] == "pruning" or group["lambda_p"] == 0
        optimizer.step()
        control.after_step(step)
        phases.append(group["phase"])
    assert phases == ["dense"] * 4 + ["pruning"] * 26 + ["healing"] * 10
    copied = AdamWLp([nn.Parameter(torch.ones(20, 20))])
    copied.load_state_dict(optimizer.state_dict())
    assert copied.param_groups[0]["phase"] == "healing"
