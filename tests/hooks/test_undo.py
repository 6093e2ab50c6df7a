"""What is put on a model or into torch is gone whatever ends a context."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from rc_probe.hooks.undo import entered, hook, unhook


class Plain(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_hook_goes_without_its_handle() -> None:
    """An interrupt may come before the handle is there; other hooks stay."""
    module = nn.Linear(2, 2)

    def mine(module: Any, args: Any, kwargs: Any) -> None:
        """A hook."""

    module.register_forward_pre_hook(lambda *given: None, with_kwargs=True)
    before = dict(module._forward_pre_hooks), dict(module._forward_pre_hooks_with_kwargs)
    module.register_forward_pre_hook(mine, with_kwargs=True)
    module.register_forward_hook(mine, always_call=True)
    for _ in range(2):
        unhook(module, mine)
        assert (dict(module._forward_pre_hooks), dict(module._forward_pre_hooks_with_kwargs)) == before
        assert not module._forward_hooks and not module._forward_hooks_always_called


def test_dropped_contexts_take_back_what_they_did() -> None:
    module, mode = nn.Linear(2, 2), Plain()
    seen: list[int] = []
    contexts = [hook(module.register_forward_hook, lambda *given: seen.append(1)), entered(mode)]
    for context in contexts:
        context.__enter__()
    module(torch.ones(1, 2))
    assert seen == [1] and mode in _get_current_function_mode_stack()
    del context, contexts
    module(torch.ones(1, 2))
    assert seen == [1] and mode not in _get_current_function_mode_stack() and not module._forward_hooks
