"""Interrupt what rc-probe does at each of its lines in turn: the model, and all that is changed for it, is as before."""

from __future__ import annotations

import copyreg
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from support import untouched
from support.by_hand import gpt2, ids
from support.tiny import tokenizer, words

import rc_probe
from rc_probe.hooks import attach as attaching
from rc_probe.hooks import undo
from rc_probe.hooks.edits import attention_interface, model_state

FOLDERS = tuple(str(Path(module.__file__ or "").resolve().parent) for module in (rc_probe, attaching))
Run = Callable[[], object]


Lines = list[tuple[str, int]]  # file and number of each line that runs, in order


def counted(run: Run) -> int:
    """How many lines of rc-probe's own `run` goes through."""
    return len(_traced(run, -1))


def first_and_last(run: Run) -> list[int]:
    """When each line of rc-probe's own that `run` goes through runs for the first and for the last time, counted from 1."""
    lines = _traced(run, -1)
    first = {line: at for at, line in reversed([*enumerate(lines, 1)])}
    last = {line: at for at, line in enumerate(lines, 1)}
    return sorted({*first.values(), *last.values()})


def interrupted(run: Run, line: int) -> bool:
    """Run it, with a KeyboardInterrupt before that line; whether it came out."""
    try:
        _traced(run, line)
    except KeyboardInterrupt:
        return True
    return False


def _traced(run: Run, line: int) -> Lines:
    seen: Lines = []

    def inside(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return inside

    def calls(frame: Any, event: str, arg: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(FOLDERS) else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        run()
    finally:
        sys.settrace(before)
    return seen


class Scene:
    """A model, and what is done with it. folder: for what its trainer writes"""

    def __init__(self, folder: Path) -> None:
        self.model = gpt2(vocab_size=32, n_layer=2).float()
        text, mask = ids(6, 4)
        text, mask = (text % 32).flip(1), mask.flip(1)  # padded on the left, as generate wants it
        self.inputs = {"input_ids": text, "attention_mask": mask}
        self.classes = type(self.model), transformers.GenerationMixin, type(self.model.transformer)
        self.tokens = tokenizer(special=False)
        self.folder = str(folder)
        self.trainer = self._trainer()
        with torch.no_grad():
            self.plain = self.model(**self.inputs).logits

    def _trainer(self) -> Any:
        arguments = transformers.TrainingArguments(
            self.folder, use_cpu=True, report_to=[], disable_tqdm=True, label_names=["labels"]
        )
        rows = [{"input_ids": row, "labels": row} for row in self.inputs["input_ids"].tolist()]
        return transformers.Trainer(self.model, arguments, eval_dataset=rows, processing_class=self.tokens)

    def state(self) -> dict[str, Any]:
        return untouched.state(self.model) | {
            "classes": [
                (cls, vars(cls).get(name))
                for cls in self.classes
                for name in ("forward", "generate", "__reduce_ex__")
            ],
            "copies": dict(copyreg.dispatch_table),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "held": (dict(undo._replaced), dict(attention_interface._held), dict(model_state._before)),
            "levels": (model_state._own.passes, model_state._own.proofs),
            "listeners": list(attention_interface.running.listeners),
            "autocast": torch.is_autocast_enabled("cpu"),
            "modes": (
                torch._C._is_torch_function_enabled(),
                torch._C._len_torch_function_stack(),
                torch.is_grad_enabled(),
            ),
            "trainer": (
                vars(self.trainer).get("evaluation_loop"),
                list(self.trainer.callback_handler.callbacks),
            ),
        }

    def check(self) -> None:
        """All is as before, and the model gives what it gave."""
        gc.collect()
        untouched.same(self.before, self.state())
        with torch.no_grad():
            assert torch.equal(self.model(**self.inputs).logits, self.plain)

    # ---- what is interrupted

    def forget(self) -> None:
        """Nothing is known of the model, so that it is proved again."""
        attaching._known.clear()

    def attach(self) -> None:
        with torch.no_grad(), rc_probe.attach(self.model):
            self.model(**self.inputs)
            self.model.generate(**self.inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)

    def ablate(self) -> None:
        with torch.no_grad(), rc_probe.ablate(self.model, "mlp@1", "attention.skip@2", "head@1:2", "block@2"):
            self.model(**self.inputs)

    def watch(self) -> None:
        watched = rc_probe.watch(self.trainer, [self.inputs])
        try:
            self.trainer.evaluate()
        finally:
            watched.remove()

    def probe(self) -> None:
        rc_probe.probe(
            self.model, [words(4), words(6)], processor=self.tokens, ablate="mlp@2", metrics="residual", recursion=False,
            length=6,
        )  # fmt: skip


SCENES = ("attach", "ablate", "watch", "probe")


def prove(
    scene: Scene, name: str, *, anew: bool, stride: int | None = None, times: int | None = None
) -> Iterator[int]:
    """Interrupt it where each line runs for the first and for the last time; yield each once all was found as before.

    stride: at every so many-th line that runs; times: at so many that lie apart alike; anew: the model is proved again each time
    """
    run = getattr(scene, name)
    run()  # what the library makes once is there
    gc.collect()
    gc.freeze()  # and is not looked through each time
    scene.before = scene.state()
    if name == "watch":
        del scene.before["random"]  # the loader of an evaluation draws its seed, watched or not
    if anew:
        scene.forget()
    chosen: Sequence[int]
    if times is not None or stride is not None:
        lines = counted(run)
        step, start = (stride, 1) if times is None else (lines // times, lines // (2 * times) + 1)
        chosen = range(start, lines + 1, step or 1)[:times]
    else:
        chosen, lines = first_and_last(run), 0
    for line in chosen:
        if anew:
            scene.forget()
        interrupted(run, line)
        try:
            scene.check()
        except AssertionError as error:
            raise AssertionError(
                f"{name}, interrupted at line {line} of {lines or chosen[-1]}: {error}"
            ) from error
        yield line
    gc.unfreeze()
