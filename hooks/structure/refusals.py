"""Why a model has no stack of blocks that can be read, in the words of its user."""

from __future__ import annotations

from typing import Any

from torch import nn

from rc_probe.hooks.errors import RcProbeError

from .side_by_side import list_of, mixed_streams, streams_side_by_side
from .structure import REPORT, is_attention_op
from .tape import ADDS, PRODUCTS, Call, Node, Tape

NAME_THEM = (
    "rc-probe needs a stack of blocks whose branches are added to a stream; "
    "name them by hand if it has one (--blocks 'encoder.layer.*')"
)
WRAP = "Give each block a module of its own that takes the stream and returns it"


def no_blocks(tape: Tape, spine: list[Node]) -> RcProbeError:
    """The refusal of a model none of whose modules hold the residual adds `spine` of one stream."""
    if count := streams_side_by_side(tape, spine):
        return mixed_streams(count, tape.model)
    if lists := parts_in_lists(tape, spine):
        what = (
            f"its blocks are no modules: {lists[0]} itself adds to the stream what the modules in "
            f"{' and in '.join(lists[1:])} return"
        )
        todo = WRAP
    elif not attends(tape):
        held = f"its residual adds ({places(spine)}) are not held by modules that repeat, one call for each block"
        what = f"no attention was found in it, and {held if spine else 'no residual adds'}: this does not look like a transformer"
        todo = NAME_THEM
    elif not spine:
        what, todo = (
            "no add in it joins a value and what is computed from that value: it has no skips",
            NAME_THEM,
        )
    else:
        what = f"its blocks hand on no stream as it is: what the skip of the add at {spine[0].where} carries is {made(tape, spine[0])}"
        todo = f"rc-probe needs blocks that add their branches to the stream that they are given. {REPORT}"
    return RcProbeError(what, where=type(tape.model).__name__, todo=todo)


def places(nodes: list[Node]) -> str:
    return ", ".join(dict.fromkeys(node.where for node in nodes))


def attends(tape: Tape) -> bool:
    """Whether anything like attention runs: a softmax over tokens, or a product of two computed values."""
    products = (node for node in tape.nodes if node.op in PRODUCTS and len(set(node.inputs)) > 1)
    return any(is_attention_op(node.op, node.shape) for node in tape.nodes) or any(products)


def made(tape: Tape, node: Node) -> str:
    """By what the value was made that a stream carries at `node`, as far back as it is carried."""
    first = tape.nodes[(node.carried & -node.carried).bit_length() - 1]
    if first.op in ADDS and first.where:
        return f"made anew by the add at {first.where}, neither operand of which is the stream as it was"
    name = tape.calls[first.call].name if first.call >= 0 else ""
    where = f" in {name}" if name else ""
    by = "put together from parts" if first.op in {"cat", "stack"} else "made"
    return f"{by} anew by `{first.op}`{where}"


def parts_in_lists(tape: Tape, spine: list[Node]) -> list[str]:
    """The module whose own code makes all adds, then its lists that hold the branches; empty where it is not so."""
    owners = {node.call for node in spine}
    if len(owners) != 1 or len(spine) < 2:
        return []
    owner = owners.pop()
    lists: dict[str, None] = {}
    for node in spine:
        assert node.operands is not None
        value = tape.nodes[node.operands[1 - node.skip]]
        while value.call == owner and value.keeps >= 0:
            value = tape.nodes[value.keeps]
        call = value.call
        while call >= 0 and tape.calls[call].parent != owner:
            call = tape.calls[call].parent
        found = list_of(tape.calls[call].name) if call >= 0 else ""
        if not found:
            return []
        lists[found] = None
    return [type(tape.calls[owner].module).__name__, *lists]


def run_past_hooks(tape: Tape) -> str:
    """A module of a list whose parts were called and it was not, as its `forward` was called instead; else ""."""
    called = {call.name for call in tape.calls}
    modules: dict[str, nn.Module] = dict(tape.model.named_modules())
    for name, module in modules.items():
        lists = list_of(name)
        if not lists or name in called or not isinstance(modules[lists], nn.ModuleList):
            continue
        own: Any = type(module).forward
        if own is not nn.Module.forward and any(c.startswith(f"{name}.") for c in called):
            return str(name)
    return ""


def past_hooks(tape: Tape) -> RcProbeError | None:
    """The refusal of a model that calls the `forward` of its blocks, if it does."""
    name = run_past_hooks(tape)
    if not name:
        return None
    what = f"it runs its blocks ({list_of(name)}.*) by their `forward` method, past all hooks"
    return RcProbeError(
        what,
        where=type(tape.model).__name__,
        todo=f"The model's code has to call the module itself. {REPORT}",
    )


def not_through(tape: Tape, call: Call, node: Node, *, entry: bool) -> str:
    """Why the stream of the add `node` is none of the tensors that enter (or leave) the block `call`."""
    if not entry:
        shapes = sorted({tape.nodes[n].shape for n in call.outputs.values()})
        named = " and ".join(map(str, shapes))
        return "" if node.shape in shapes else f": it adds to {node.shape}, and what leaves is {named}"
    widths = {
        tape.nodes[n].shape[-1] for n in call.args.values() if len(tape.nodes[n].shape) == len(node.shape)
    }
    changed = (
        f", where its width changes to {node.shape[-1]}" if widths and node.shape[-1] not in widths else ""
    )
    return f": it is {made(tape, node)}{changed}"


def normed_before(tape: Tape, call: Call, stream: int, first: Node) -> str:
    """The norm inside the block through which the stream goes before its first add, by its name; "" for none."""
    chain = [
        n for n in tape.nodes[max(stream + 1, call.first) : first.index] if n.bit & first.carried and n.norm
    ]
    return next((tape.calls[n.call].name if n.call != call.index else n.op for n in chain), "")
