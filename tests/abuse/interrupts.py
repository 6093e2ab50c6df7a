"""Interrupt what rc-probe does at each of its lines: the model, and all that is changed for it, is as before."""

from __future__ import annotations

import copyreg
import gc
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
Moment = tuple[
    str, int, int
]  # the file and the number of a line, and the how-manieth time that it runs, from 1


def moments(run: Run) -> list[Moment]:
    """Each line of rc-probe's own that `run` goes through, in order, each time it runs."""
    seen: list[Moment] = []
    _traced(run, seen.append)
    return seen


def first_and_last(seen: Sequence[Moment]) -> list[Moment]:
    """Of these moments, those at which a line runs for the first or for the last time."""
    last = {(file, line): time for file, line, time in seen}
    return [moment for moment in seen if moment[2] in (1, last[moment[:2]])]


def interrupted(run: Run, chosen: Sequence[Moment], then: Callable[[], None]) -> Iterator[tuple[Moment, str]]:
    """Run it, with a KeyboardInterrupt at each of these moments; yield each, and what was wrong then ('': nothing).

    The process forks at each moment: the child is interrupted, and does what comes `then`; its parent runs on. A run of
    seconds is so interrupted thousands of times within minutes.
    """
    waiting, told = set(chosen), []

    def at(moment: Moment) -> None:
        if moment not in waiting:
            return
        waiting.discard(moment)
        reader, writer = os.pipe()
        drawn = random.getstate()
        if pid := os.fork():
            os.close(writer)
            with open(reader, encoding="utf-8") as answer:
                told.append((moment, answer.read()))
            os.waitpid(pid, 0)
            return
        os.close(reader)
        sys.settrace(None)
        random.setstate(drawn)  # Python seeds it anew in each child
        nonlocal child
        child = writer
        raise KeyboardInterrupt

    child = None
    try:
        _traced(run, at)
    except KeyboardInterrupt:
        if child is None:
            raise
    except BaseException as other:
        if child is None:
            raise
        _answer(child, f"{type(other).__name__} came out: {other}")
    if child is not None:
        _answer(child, then)
    yield from told
    yield from ((moment, "this moment did not come again") for moment in chosen if moment in waiting)


def _answer(writer: int, then: Callable[[], None] | str) -> None:
    """The end of a child: it tells its parent what was wrong."""
    error = then if isinstance(then, str) else ""
    try:
        if not isinstance(then, str):
            then()
    except BaseException as wrong:
        error = f"{type(wrong).__name__}: {wrong}"
    finally:
        os.write(writer, error.encode()[:4096])
        os._exit(0)


def _traced(run: Run, at: Callable[[Moment], None]) -> None:
    times: dict[tuple[str, int], int] = {}

    def inside(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            times[line] = times.get(line, 0) + 1
            at((*line, times[line]))
        return inside

    def calls(frame: Any, event: str, arg: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(FOLDERS) else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        run()
    finally:
        sys.settrace(before)


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
        self.watched: Any = None
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
            "dtype": torch.get_default_dtype(),
            "random of others": (random.getstate(), str(np.random.get_state())),
            "tokenizer": (self.tokens.backend_tokenizer.truncation, self.tokens.backend_tokenizer.padding),
            "logs": (logging.root.manager.disable, transformers.utils.logging.get_verbosity()),
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
        callbacks, loop = self.trainer.callback_handler.callbacks, vars(self.trainer).get("evaluation_loop")
        if self.watched in callbacks and loop == self.watched._evaluation_loop:
            self.watched.remove()  # its end had not begun
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
        self.watched = rc_probe.watch(self.trainer, [self.inputs])
        try:
            self.trainer.evaluate()
        finally:
            self.watched.remove()

    def probe(self) -> None:
        rc_probe.probe(
            self.model, [words(4), words(6)], processor=self.tokens, ablate="mlp@2", metrics="residual", recursion=False,
            length=6,
        )  # fmt: skip


SCENES = ("attach", "ablate", "watch", "probe")


def prove(scene: Scene, name: str, *, anew: bool, times: int | None = None) -> int:
    """Interrupt it where each line runs for the first and for the last time; all must be as before. How often it was.

    times: as many of these moments, that lie apart alike; anew: the model is proved again in it
    """
    threads, run = torch.get_num_threads(), getattr(scene, name)
    torch.set_num_threads(1)  # threads do not survive a fork
    try:
        run()  # what the library makes once is there
        run()  # a trainer prepares the model in its first evaluation, so that it is proved in the second, too
        gc.collect()
        gc.freeze()  # and is not looked through each time
        scene.before = scene.state()
        if name == "watch":
            del scene.before["random"]  # the loader of an evaluation draws its seed, watched or not
        if anew:
            scene.forget()
        chosen = first_and_last(moments(run))
        if times is not None:
            step = len(chosen) // times
            chosen = chosen[step // 2 :: step][:times]
        if anew:
            scene.forget()
        wrong = [
            f"{Path(file).name}:{line}, time {time}: {error}"
            for (file, line, time), error in interrupted(run, chosen, scene.check)
            if error
        ]
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    assert not wrong, f"{name}, interrupted at {len(wrong)} of {len(chosen)} moments:\n" + "\n".join(wrong)
    return len(chosen)
