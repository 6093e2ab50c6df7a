"""The command: what it writes and shows, and one clear line with exit code 2 for whatever goes wrong."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny, zoo
from support.command import FAST, Run, fails

import rc_probe
from rc_probe.cli.job import folder_name
from rc_probe.models.load import Loaded

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.figures("run", "paths")
def test_files_and_summary(run: Run, texts: Path) -> None:
    code, out, _ = run("demo", "--data", str(texts), "--ablate", "mlp@3", *FAST)
    assert code == 0
    folder = Path("rc-probe-out/demo")
    assert {p.name for p in folder.iterdir()} == {
        "report.html", "results.json", "residuals.csv", "ablations.csv", "structure.csv",
    }  # fmt: skip
    result = rc_probe.ProbeResult.load(folder)
    assert result.model["id"] == "all-MiniLM-L6-v2"
    assert result.model["signature"] == "An|Mn"
    assert result.settings["samples"] == 3
    assert result.settings["data"].endswith("texts.txt (lines)")
    for word in ("SAN+skip", "transformer", "mlp@3", "▁", result.verdict["sentence"], "report.html"):
        assert word in out
    assert set(result.tables["residuals"]["layer"]) == set(range(7))


def test_json_on_standard_output_and_nothing_else(run: Run, texts: Path) -> None:
    code, out, err = run("demo", "--data", str(texts), "--json", "--quiet", "--out", "elsewhere", *FAST)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(Path("elsewhere/results.json").read_text())


def test_quiet(run: Run, texts: Path) -> None:
    assert run("demo", "--data", str(texts), "--quiet", *FAST) == (0, "", "")


def test_no_bar_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither ours nor the Hub's, which `load_model` lets through, and which is back afterwards."""
    from huggingface_hub.utils import tqdm

    from rc_probe.cli.terminal import progress_bar
    from rc_probe.models.load import quiet

    def use(hidden: bool) -> None:
        with progress_bar(hidden=hidden) as report:
            report("loading", 0, 1)
            with quiet():
                list(tqdm(range(3), desc="model.safetensors"))
            report("proving", 0, 1)

    for hidden in (False, True):
        use(hidden)
        assert capfd.readouterr() == ("", "")
    list(tqdm(range(3), desc="another"))
    assert "another" in capfd.readouterr().err


def test_downloads_have_the_line_of_a_terminal_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from rc_probe.cli import terminal as show

    screen = io.StringIO()
    monkeypatch.setattr(show, "Console", lambda **_: Console(file=screen, force_terminal=True, width=90))
    with show.progress_bar(hidden=False) as report:
        report("loading", 0, 1)
        assert screen.getvalue() == "loading …\r"
        report("proving", 0, 1)
        report("pretrained: SAN", 3, 8)
    shown = screen.getvalue()
    assert "proving" in shown and "3/8" in shown and "starting" not in shown and "0/" not in shown


def test_command_to_repeat_is_the_one_given(run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["demo", "--data", str(texts), "--ablate", "mlp@1 + mlp@2", *FAST]
    monkeypatch.setattr(sys, "argv", ["rc-probe", *arguments])
    run(*arguments)
    command = rc_probe.ProbeResult.load("rc-probe-out/demo").settings["command"]
    assert command == f"rc-probe demo --data {texts} --ablate 'mlp@1 + mlp@2' {' '.join(FAST)}"


@pytest.mark.figures("run")
def test_markup_in_names_and_texts_shows_as_text(run: Run, tmp_path: Path, demo: Loaded) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    demo.model.save_pretrained(folder)
    demo.processor.save_pretrained(folder)
    data = tmp_path / "<script>alert(2)</script>.txt"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("Some <b>words</b> here.\n[red]And[/red] there.")
    code, _, _ = run(str(folder), "--data", str(data), *FAST, "--out", "o")
    assert code == 0
    page = Path("o/report.html").read_text()
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert "&lt;img src=x" in page


# ---- bad input


def test_no_such_model(run: Run) -> None:
    fails(run, "no-such/model: .*Hub.*local folder", "no-such/model")
    fails(run, "no such folder", "./no/such/folder")


def test_misspelt_ablation_is_found_before_loading(run: Run) -> None:
    fails(run, "did you mean 'attention.skip'", "no-such/model", "--ablate", "attention.skp@2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ablate", "mlp@7"], "no block 7.*1 to 6"),
        (["--ablate", "head@2:13"], "no head 13.*1 to 12"),
        (["--ablate", "cross"], "no block has 'cross'"),
        (["--metrics", "residul"], "Did you mean 'residual'"),
        (["--samples", "0"], "at least 1"),
        (["--length", "1"], "at least 2"),
        (["--batch-size", "0"], "at least 1"),
        (["--init-seeds", "0"], "--init-seeds"),
        (["--dtype", "float8"], "no such dtype"),
        (["--device", "cuda:7"], "not available|no such device"),
        (["--data", "nothing.txt"], "nothing.txt"),
        (["--column", "body"], "column"),
        (["--label-column", "stars"], "no columns here, so no 'stars'. Leave --label-column out"),
        (["--label-column", ""], "--label-column: it is empty"),
    ],
)
def test_bad_options(run: Run, texts: Path, arguments: list[str], says: str) -> None:
    given = ["--data", str(texts)] if "--data" not in arguments else []
    fails(run, says, "demo", *given, *FAST, *arguments)


def test_bad_data(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    fails(run, "no texts", "demo", "--data", str(tmp_path / "empty.txt"))
    (tmp_path / "t.csv").write_text("review,stars\ngood,5\nbad,1\n")
    fails(run, "review, stars", "demo", "--data", str(tmp_path / "t.csv"), "--column", "text")
    fails(run, "Did you mean 'stars'", "demo", "--data", str(tmp_path / "t.csv"), "--label-column", "star")
    (tmp_path / "one.txt").write_text("word\nother\n")
    fails(run, "fewer than two tokens", "demo", "--data", str(tmp_path / "one.txt"), "--no-special-tokens")


def test_long_texts_are_cut_to_the_models_positions_and_it_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("many words " * 600)
    code, out, _ = run("demo", "--data", str(tmp_path / "long.txt"), "--length", "4000", *FAST)
    assert code == 0
    settings = rc_probe.ProbeResult.load("rc-probe-out/demo").settings
    assert settings["length"] <= 512
    assert settings["truncated"] == 1
    assert "cut from 4000" in out


def saved(demo: Loaded, folder: Path, model: Any = None) -> Path:
    (model or demo.model).save_pretrained(folder)
    demo.processor.save_pretrained(folder)
    return folder


def test_not_a_transformer(run: Run, tmp_path: Path) -> None:
    import transformers

    model, _ = zoo.build("resnet")
    model.save_pretrained(tmp_path / "resnet")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    fails(run, "does not look like a transformer", str(tmp_path / "resnet"), "--quiet")


def test_a_model_that_cannot_be_proved(run: Run, tmp_path: Path, texts: Path) -> None:
    model, _ = zoo.build("deberta_v2_conv")
    folder = tiny.saved(tmp_path / "convolves", model, tiny.tokenizer())
    fails(run, r"DebertaV2Model.*encoder\.conv", folder, "--data", str(texts), "--quiet")


def test_weights_that_cannot_be_trusted(run: Run, demo: Loaded, tmp_path: Path) -> None:
    import copy

    folder = saved(demo, tmp_path / "corrupt")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails(run, "corrupt or incomplete", str(folder))
    broken = copy.deepcopy(demo.model)
    with torch.no_grad():
        broken.encoder.layer[2].output.dense.weight[3, 4] = torch.nan
    fails(run, r"NaN.*layer\.2\.output\.dense\.weight", str(saved(demo, tmp_path / "nan", broken)))
    folder = saved(demo, tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    torch.save(demo.model.state_dict(), folder / "pytorch_model.bin")
    fails(run, "--allow-pickle", str(folder))


def test_output_that_cannot_be_written(run: Run, tmp_path: Path, texts: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):  # found before anything is loaded
        fails(run, "--out .*file", "no-such/model", "--out", str(tmp_path / out))


def test_disk_full(run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run("demo", "--data", str(texts), "--quiet", *FAST)
    assert code == 2
    assert err.count("\n") == 1
    assert not [p for p in Path().rglob("*") if p.is_file()]


def test_interrupted(run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe.measures import variant_passes

    calls = []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(variant_passes, "measure_variants", interrupt)
    fails(run, "interrupted. Nothing was written", "demo", "--data", str(texts), ends=130)
    assert calls


def test_an_interrupt_that_a_library_swallows_still_ends_the_run(
    run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rc_probe.measures import variant_passes

    whole = variant_passes.measure_variants

    def swallow(*args: Any, **kwargs: Any) -> Any:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(variant_passes, "measure_variants", swallow)
    before = signal.getsignal(signal.SIGINT)
    fails(run, "interrupted. Nothing was written", "demo", "--data", str(texts), *FAST, ends=130)
    assert signal.getsignal(signal.SIGINT) is before


def test_out_of_memory(run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe.measures import variant_passes

    def exhaust(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    monkeypatch.setattr(variant_passes, "measure_variants", exhaust)
    fails(run, "smaller --batch-size", "demo", "--data", str(texts))


def test_overflow_is_no_result(run: Run, demo: Loaded, tmp_path: Path, texts: Path) -> None:
    import copy

    broken = copy.deepcopy(demo.model)
    with torch.no_grad():
        for layer in (2, 3):
            broken.encoder.layer[layer].output.dense.weight *= 1e30
            broken.encoder.layer[layer].output.LayerNorm.weight *= 1e30
    folder = saved(demo, tmp_path / "overflow", broken)
    fails(run, "NaN", str(folder), "--data", str(texts), "--quiet", *FAST)


# ---- as a process


def test_help_without_torch() -> None:
    script = (
        "import sys\nsys.argv = ['rc-probe', '--help']\nfrom rc_probe.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib', 'seaborn', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    for words in ("rc-probe demo", "--ablate", "What is measured", "The data"):
        assert words in done.stdout


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rc_probe", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"rc-probe {rc_probe.__version__}"


def test_ctrl_c_for_real(tmp_path: Path) -> None:
    """SIGINT to the process while it measures."""
    script = (
        "from rc_probe.measures import variant_passes as passes\nwhole = passes.measure_variants\ndef told(*args, **options):\n"
        "    print('measuring', flush=True)\n    return whole(*args, **options)\n"
        "passes.measure_variants = told\nfrom rc_probe.__main__ import main\nmain()"
    )
    command = [sys.executable, "-c", script, "demo", "--samples", "32", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "measuring\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "folder"),
    [("gpt2", "gpt2"), ("org/model", "model"), ("./a b/", "a_b"), ("..", None), ("<x>", "x")],
)
def test_folder_names(model: str, folder: str | None) -> None:
    found = folder_name(model)
    assert re.fullmatch(r"[\w.-]+", found)
    assert folder is None or found.strip("_") == folder


# ---- models of several stacks


def test_an_encoder_is_measured_by_name(run: Run, tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(**tiny.T5_SIZES, decoder_start_token_id=0, pad_token_id=0)
    folder = tiny.saved(tmp_path / "t5", transformers.T5Model(config), tiny.tokenizer())
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3 w4\nw5 w6 w7\n")
    for stack, chosen in ((None, "decoder.block"), ("encoder", "encoder.block")):
        out = tmp_path / str(stack)
        words = [folder, "--data", str(texts), "--out", str(out), "--no-init", "--no-recursion", "--quiet"]
        code, _, err = run(*words, *(["--stack", stack] if stack else []))
        assert (code, err) == (0, "")
        model = json.loads((out / "results.json").read_text())["model"]
        assert model["stack"] == chosen
        assert model["signature"] == ("A|M" if stack else "A|X|M")
        other = "decoder.block" if stack else "encoder.block"
        assert model["stacks"] == [other]
        assert any(other in note and "--stack" in note for note in model["notes"])


def test_a_tower_is_measured_by_itself(run: Run, tmp_path: Path) -> None:
    import transformers

    text = tiny.SIZES | {"max_position_embeddings": 20}
    vision = tiny.VIT_SIZES | {"image_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    folder = tiny.saved(tmp_path / "clip", transformers.CLIPModel(config), tiny.tokenizer())
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    out = tmp_path / "out"
    words = ("--samples", "3", "--out", str(out), "--no-recursion", "--quiet")
    assert run(folder, "--stack", "vision", *words)[0] == 0
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["modality"] == "image"
    assert found["model"]["class"] == "CLIPVisionModel"
    assert found["model"]["stacks"] == ["text_model.encoder.layers"]
    assert "init" in {row["weights"] for row in found["tables"]["residuals"]}
    code, _, err = run(folder, "--stack", "audio", *words)
    assert code == 2
    assert "no stack is named 'audio'" in err


def test_blocks_are_named_by_hand(run: Run, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "bert", tiny.bert(), tiny.tokenizer())
    out = tmp_path / "out"
    words = ("--out", str(out), "--no-init", "--no-recursion", "--quiet", "--samples", "2")
    assert run(folder, "--blocks", "encoder.layer.*", *words)[0] == 0
    assert json.loads((out / "results.json").read_text())["model"]["blocks"] == 2
    code, _, err = run(folder, "--blocks", "encoder.blocks.*", *words)
    assert code == 2
    assert "no module of this name ran" in err


def test_a_model_without_attention_says_what_does_not_apply(run: Run, tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=32, hidden_size=24, num_hidden_layers=2, state_size=4)
    folder = tiny.saved(tmp_path / "mamba", transformers.MambaModel(config), tiny.tokenizer())
    out = tmp_path / "out"
    assert run(folder, "--samples", "2", "--out", str(out), "--quiet", "--no-init")[0] == 0
    model = json.loads((out / "results.json").read_text())["model"]
    assert model["signature"] == "C"
    assert any("have no attention" in note for note in model["notes"])
    code, _, err = run(folder, "--samples", "2", "--out", str(out), "--ablate", "head@1:1")
    assert code == 2
    assert "it has no heads" in err
