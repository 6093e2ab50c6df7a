"""Malformed texts, files of results, data and checkpoints, made from a seed; and what becomes of them.

Whatever is given, the answer is a value or one RcProbeError of one line, soon and without much memory.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError

SECONDS, BYTES = 5.0, 10**9
ODD: list[Any] = [
    None, True, -1, 0, 1e308, 10**30, "", "x", "=1+1", "a\nb", "\ud800", "\0", [], {}, [1, None], {"a": []}, "9" * 5000,
    [[[]]], "NaN", -0.5, "\u2028", ["a", 1], {"": ""},
]  # fmt: skip
PIECES = [
    "mlp", "attention", "attention.skip", "head", "block", "all", "@", ":", "=", "+", "-", ",", "0", "1", "3-5", "5-3", "99999",
    "9" * 30, "0.5", "1e400", "nan", "inf", " ", "residual", "residual_bulk", "cosine", "last", "first", "min", "mean", "SAN", "<",
    "<=", ">", ">=", "==", "²", "٣", "\u2028", "\n", "\0", "\ud800", "é", "--samples", "--no-init", "--paths", "demo", "'", '"', "#", "\\",
    "effective_rank", "5 20", "*", "[", "]", "(", "?", "a" * 400,
]  # fmt: skip


@dataclass
class Tried:
    """What went wrong: kind, what was given, how."""

    kind: str
    given: str
    how: str


def attempt(kind: str, given: str, call: Callable[[], object]) -> list[Tried]:
    """Nothing where the call returns or raises one line in time and memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    how = ""
    try:
        call()
    except RcProbeError as error:
        if len(str(error).splitlines()) != 1 or len(str(error)) > 2000:
            how = f"not one line: {str(error)[:300]!r}"
    except Exception:
        how = traceback.format_exc()
    seconds = time.process_time() - started  # of CPU: others may be at work
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if seconds > SECONDS:
        how += f" {seconds:.1f} s"
    if grown > BYTES:
        how += f" {grown / 1e9:.1f} GB"
    return [Tried(kind, given, how)] if how else []


def grammars() -> dict[str, Callable[[str], object]]:
    """What parses the words of users, by name."""
    from rc_probe.cli.app import path_numbers
    from rc_probe.cli.sweep import _parsed
    from rc_probe.data.places import check_place
    from rc_probe.interventions.grammar import parse_intervention
    from rc_probe.measures.curves import read_names
    from rc_probe.measures.paths.paths import _read_draws
    from rc_probe.models.checkpoints import checkpoints
    from rc_probe.models.load import check_device, check_device_map, check_dtype
    from rc_probe.registry import select
    from rc_probe.results.conditions import parse_condition, parse_drop
    from rc_probe.results.json_file import given_path

    return {
        "ablate": parse_intervention, "fail-if": parse_condition, "max-drop": parse_drop, "paths": _read_draws,
        "metrics": lambda text: select(read_names(text)), "data": check_place, "out": lambda text: given_path(text, "--out"),
        "revisions": lambda text: checkpoints("owner/model", text), "model": lambda text: checkpoints(text, None), "device": check_device,
        "device-map": check_device_map, "dtype": check_dtype, "line of a sweep": lambda text: _parsed(text.split(), "line 1"),
        "words": lambda text: path_numbers(text.split()),
    }  # fmt: skip


def texts(seed: int, count: int) -> Iterator[str]:
    """Random strings: pieces of the grammars in any order, and any characters."""
    rng = random.Random(seed)
    for _ in range(count):
        some = rng.choices(PIECES, k=rng.randint(0, 8))
        some += (
            [chr(rng.randrange(1, 0x3000)) for _ in range(rng.randint(0, 3))] if rng.random() < 0.3 else []
        )
        rng.shuffle(some)
        yield "".join(some)


def try_grammars(seed: int, count: int) -> list[Tried]:
    found = []
    for name, parse in grammars().items():
        for text in texts(seed, count):
            found += attempt(name, repr(text), lambda parse=parse, text=text: parse(text))  # type: ignore[misc]
    return found


def mutated(document: Any, rng: random.Random) -> Any:
    """The document with one to three of its values replaced, lost or renamed."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        holder, key = document, None
        while isinstance(holder, dict | list) and holder and (key is None or rng.random() < 0.8):
            place = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            if key is not None and not isinstance(holder[place], dict | list):
                key = place
                break
            key, inside = place, holder[place]
            if not (isinstance(inside, dict | list) and inside) or rng.random() < 0.2:
                break
            holder = inside
        if key is None or not isinstance(holder, dict | list) or not holder:
            return rng.choice(ODD)
        key = (
            key
            if (isinstance(holder, dict) and key in holder) or isinstance(holder, list)
            else next(iter(holder))
        )
        if isinstance(holder, list) and not (isinstance(key, int) and key < len(holder)):
            key = 0
        what = rng.random()
        if what < 0.2:
            del holder[key]
        elif what < 0.3 and isinstance(holder, dict):
            holder[rng.choice(["x", "", "a\nb", "=1"])] = holder.pop(key)
        else:
            holder[key] = rng.choice(ODD)
    return document


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes cut short, with some changed, doubled, or with others between them."""
    what, place = rng.random(), rng.randrange(len(content) + 1)
    if what < 0.3:
        return content[:place]
    if what < 0.7:
        changed = bytearray(content)
        for _ in range(rng.randint(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    between = rng.choice(
        [b"\0", b'"', b"\n", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"{", b"NaN", b"\r", b"\t,", content]
    )
    return content[:place] + between + content[place:]


def written(document: Any, rng: random.Random) -> bytes:
    """A JSON document, mutated or damaged."""
    if rng.random() < 0.6:
        return json.dumps(mutated(document, rng)).encode("utf-8", "surrogatepass")
    return damaged(json.dumps(document).encode(), rng)


def try_results(seed: int, count: int, place: Path, good: Any, *, pages: bool) -> list[Tried]:
    """Files of results, read by all that reads them. pages: reports, too."""
    from rc_probe.comparison import compare
    from rc_probe.result import ProbeResult
    from rc_probe.results.saving import is_whole

    document, rng, found = json.loads(good.to_json()), random.Random(seed), []
    folder = place / "results"
    folder.mkdir()
    for number in range(count):
        content = written(document, rng)
        (folder / "results.json").write_bytes(content)

        def read() -> None:
            is_whole(folder)
            result = ProbeResult.load(folder)
            str(result.verdict)
            compared = compare(good, result)
            compared.to_json()
            good.fail_if(baseline=result, max_drop="residual=2")
            if pages:
                result.to_html()
                compared.to_html()

        def checked(read: Callable[[], None] = read) -> None:
            try:
                read()
            except AssertionError as error:  # a check that failed, as it may
                assert "FAIL" in str(error), error

        found += attempt("results", f"{seed}:{number} {content[:2000]!r}", checked)
    return found


def try_data(seed: int, count: int, place: Path) -> list[Tried]:
    """Tables, texts, images and sounds, read into batches."""
    import numpy as np
    import pandas as pd
    import soundfile
    from PIL import Image
    from support import tiny
    from support.audio import held

    from rc_probe.data.batches import batches, long_enough
    from rc_probe.data.samples import load_samples
    from rc_probe.models.load import Loaded

    texts_of = tiny.bert().eval()
    text = Loaded(texts_of, texts_of.config, "bert", None, "text", tiny.tokenizer())
    import transformers

    vit = transformers.ViTModel(transformers.ViTConfig(**tiny.VIT_SIZES)).eval()
    small = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    image = Loaded(vit, vit.config, "vit", None, "image", small)
    models = {"text": text, "image": image, "audio": held("Wav2Vec2")}
    frame = pd.DataFrame(
        {"text": ["w1 w2 w3", 'w4 "w5", w6', "w7\nw8"], "label": [0, 1, 2], "t": ["a", "", "é"]}
    )
    good = place / "good"
    good.mkdir()
    frame.to_csv(good / "a.csv", index=False)
    frame.to_csv(good / "a.tsv", index=False, sep="\t")
    frame.to_json(good / "a.jsonl", orient="records", lines=True)
    frame.to_json(good / "a.json", orient="records")
    frame.to_parquet(good / "a.parquet")
    (good / "a.txt").write_text("w1 w2 w3\nw4 w5\n\nw6 w7\n")
    for name in ("a.png", "a.jpg", "a.gif", "a.tif", "a.bmp", "a.webp"):
        Image.effect_noise((9, 7), 50).save(good / name)
    for name in ("a.wav", "a.flac", "a.ogg"):
        soundfile.write(good / name, np.sin(np.arange(2000) / 9) / 2, 16000)
    rng, found = random.Random(seed), []
    names = sorted(good.iterdir())
    for number in range(count):
        file = names[number % len(names)]
        content = damaged(file.read_bytes(), rng)
        if file.suffix in (".json", ".jsonl") and rng.random() < 0.5:
            content = written(json.loads(frame.to_json(orient="records")), rng)
        bad = place / f"bad{file.suffix}"
        bad.write_bytes(content)
        kind = "image" if file.suffix in (".png", ".jpg", ".gif", ".tif", ".bmp", ".webp") else "text"
        kind = "audio" if file.suffix in (".wav", ".flac", ".ogg") else kind
        options = {"label_column": "label"} if file.suffix in (".csv", ".tsv") and rng.random() < 0.5 else {}

        def read(kind: str = kind, bad: Path = bad, options: dict[str, str] = options) -> None:
            loaded = models[kind]
            samples = load_samples(str(bad), modality=kind, fits=long_enough(loaded), **options)
            list(batches(samples, loaded))

        found += attempt("data", f"{seed}:{number} {bad.name} {content[:2000]!r}", read)
    return found


def try_checkpoints(seed: int, count: int, place: Path) -> list[Tried]:
    """Folders of a model with one file damaged, measured."""
    from support import tiny

    import rc_probe

    good = place / "model"
    tiny.saved(good, tiny.bert("BertForMaskedLM"), tiny.tokenizer())
    rng, found = random.Random(seed), []
    files = ["config.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for number in range(count):
        bad = place / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        name = files[number % len(files)]
        content = (good / name).read_bytes()
        if name.endswith(".json"):
            document = json.loads(content)
            if name == "config.json" and rng.random() < 0.4:  # sizes that no one has
                key = rng.choice([key for key, value in document.items() if type(value) is int])
                document[key] = rng.choice([10**9, 10**30, -5, 0, 7, 2**31, 65537])
                content = json.dumps(document).encode()
            else:
                content = written(document, rng)
        else:
            content = damaged(content, rng)
        (bad / name).write_bytes(content)

        def measure(bad: Path = bad) -> None:
            rc_probe.probe(
                str(bad), ["w1 w2 w3"], init=False, paths=False, recursion=False, metrics=["residual"]
            )

        found += attempt("checkpoints", f"{seed}:{number} {name} {content[:1500]!r}", measure)
    return found


def long_run(seed: int) -> int:
    """3,000 strings through each grammar, 500 files of results, 150 of data, 60 checkpoints; how many went wrong."""
    import tempfile
    import warnings

    from support.made_results import make_result

    warnings.simplefilter("ignore")
    found: list[Tried] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, made in {
            "strings through each grammar": lambda: try_grammars(seed, 3000),
            "files of results": lambda: try_results(seed, 500, place, make_result(blocks=2), pages=False),
            "files of data": lambda: try_data(seed, 150, place),
            "checkpoints": lambda: try_checkpoints(seed, 60, place),
        }.items():
            started, wrong = time.monotonic(), made()
            print(f"{name}: {len(wrong)} wrong, {time.monotonic() - started:.0f} s", flush=True)
            found += wrong
    for each in found:
        print(f"\n{each.kind}: {each.given[-500:]}\n{each.how[-2000:]}")
    return len(found)
