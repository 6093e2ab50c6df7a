"""Everything about a model that must be as it was."""

import copy
from typing import Any

import torch


def state(model: Any) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
             "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "training": [m.training for m in model.modules()],
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in hooks],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "random": torch.get_rng_state(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "grad": torch.is_grad_enabled(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key == "weights":
            assert list(value) == list(after[key])
            assert all(torch.equal(value[k], after[key][k]) for k in value)
        elif key == "random":
            assert torch.equal(value, after[key])
        else:
            assert value == after[key], key
