"""What is put on a model or into torch is gone whatever ends a context."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from rc_probe.hooks.undo import Hook, entered, hook


class Plain(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_hook_goes_without_the_references_of_its_handle() -> None:
    """The garbage collector clears them before it closes the context that holds the handle."""
    module = nn.Linear(2, 2)
    handle = module.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    mine = Hook(handle)
    handle.hooks_dict_ref, handle.extra_dict_ref = (lambda: None), ()
    for _ in range(2):
        mine.remove()
        assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs


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
