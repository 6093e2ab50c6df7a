"""Tables and texts as users have them: read as their authors meant them, or refused with the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support import tiny
from support.command import FAST, Run

import rc_probe
from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.errors import RcProbeError


def read(path: Path, content: str, **options: Any) -> Samples:
    path.write_bytes(content.encode())
    return load_samples(str(path), modality="text", **options)


def refuses(path: Path, content: str, says: str, **options: Any) -> None:
    with pytest.raises(RcProbeError) as error:
        read(path, content, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_rows_that_end_in_a_delimiter(tmp_path: Path) -> None:
    for suffix, sign in ((".csv", ","), (".tsv", "\t")):
        rows = ["text,label", "one cat runs,positive,", "two dogs sit,negative,"]
        found = read(
            tmp_path / f"a{suffix}", "\n".join(rows).replace(",", sign), column="text", label_column="label"
        )
        assert (found.items, found.labels) == (["one cat runs", "two dogs sit"], ["positive", "negative"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\na b,0\nc, d,1\n", "line 3: 3 cells, and the header has 2"),
        ("text,label\na b\n", "line 2: 1 cells, and the header has 2"),
        ("text;label\na b;0\n", "line 1: the header is separated by ';', not by ','"),
        ("text,text\na b,c d\n", "line 1: two columns are called 'text'"),
        ('text,label\n"a" b,0\n', "line 2: "),
    ],
)
def test_csv_that_cannot_be_meant(tmp_path: Path, content: str, says: str) -> None:
    refuses(tmp_path / "a.csv", content, says, column="text")


def test_a_quote_in_a_tsv_is_a_letter(tmp_path: Path) -> None:
    """IANA's text/tab-separated-values knows no quotes; spreadsheets and pandas write them. No row is swallowed."""
    lines = ["text\tlabel", '"Hi," she said.\t0', "fine words\t1", '"Bye," said he.\t0', "the end\t1"]
    found = read(tmp_path / "a.tsv", "\n".join(lines), column="text", label_column="label")
    assert found.items == ['"Hi," she said.', "fine words", '"Bye," said he.', "the end"]
    assert found.labels == [0, 1, 0, 1]
    quoted = ['text\tlabel\n"two\nlines"\t0\n', '"a ""b""\tc"\t1\n']
    assert read(tmp_path / "b.tsv", "".join(quoted), column="text").items == ["two\nlines", 'a "b"\tc']
    both = ["text\tlabel", '"one\t0', "two\t1", 'three"\t0']
    refuses(
        tmp_path / "c.tsv",
        "\n".join(both),
        "line 2: a cell begins with a quote, and this can be read as one row or",
    )


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    signs = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"]
    texts = [f"one{sign}line {number}" for number, sign in enumerate(signs)]
    assert read(tmp_path / "a.txt", "\n".join(texts) + "\n").items == texts
    rows = "".join(f'{{"text": "{text}"}}\n' for text in texts[:3])
    assert read(tmp_path / "a.jsonl", rows).items == texts[:3]
    for suffix in (".csv", ".tsv"):
        assert read(tmp_path / f"a{suffix}", "text\n" + "\n".join(texts) + "\n").items == texts


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_column_of_digits_is_a_text_if_it_is_asked_for(tmp_path: Path, suffix: str) -> None:
    frame, path = pd.DataFrame({"id": [7, 80], "body": ["a b", "c d"]}), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    assert load_samples(str(path), modality="text", column="id").items == ["7", "80"]
    found = load_samples(str(path), modality="text")  # by itself it takes none that is digits
    assert (found.items, found.column) == (["a b", "c d"], "body")


def test_labels_of_a_file_are_numbers_where_all_of_a_column_are(tmp_path: Path) -> None:
    content = "text,a,b,c\none,1,007,x\ntwo,,2.5,3\n"
    for column, wanted in (("a", [1, None]), ("b", [7, 2.5]), ("c", ["x", "3"])):
        assert read(tmp_path / "a.csv", content, column="text", label_column=column).labels == wanted
    assert read(tmp_path / "a.csv", content, column="text", label_column="c,b").labels == [
        ("x", 7),
        ("3", 2.5),
    ]


def test_a_column_that_the_program_chose_is_named(run: Run, tmp_path: Path) -> None:
    """In the settings, the notes and the report."""
    data = tmp_path / "a.csv"
    data.write_text("title,body\nFirst,Some words of a text.\nSecond,And a few more of them.\n")
    code, out, _ = run("demo", "--data", str(data), *FAST)
    says = "column 'body' was taken, of title, body; --column takes another"
    assert code == 0 and says in out
    result = rc_probe.ProbeResult.load("rc-probe-out/demo")
    assert result.settings["column"] == "body" and says in result.settings["notes"][0]
    assert "column &#39;body&#39; was taken" in Path("rc-probe-out/demo/report.html").read_text()
    run("demo", "--data", str(data), "--column", "title", "--out", "b", *FAST)
    settings = rc_probe.ProbeResult.load("b").settings
    assert settings["column"] == "title" and not any("was taken" in note for note in settings["notes"])


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "a.jsonl", '{"text": "a \\ud800 b"}\n', "row 0 holds half a character")
    with pytest.raises(RcProbeError, match="row 1 holds half a character"):
        load_samples(["a b", "c \udc00"], modality="text")


def test_numbers_and_depths_without_end(tmp_path: Path) -> None:
    refuses(tmp_path / "a.jsonl", '{"text": ' + "9" * 5000 + "}\n", "line 1 is not JSON")
    for suffix in (".jsonl", ".json"):
        refuses(tmp_path / f"b{suffix}", '{"text": ' + "[" * 100_000, "not JSON")


def test_a_long_cell(tmp_path: Path) -> None:
    """Longer than Python's csv reads by default."""
    long = "word " * 40_000
    assert read(tmp_path / "a.csv", f'text,label\n"{long}",1\n', column="text").items == [long]


def test_a_place_that_is_not_there_is_known_before_a_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from rc_probe.models import load

    monkeypatch.setattr(load, "load_model", lambda *args, **options: pytest.fail("loaded"))
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    for spec, says in (
        ("nofile.txt", "nofile.txt: no such file"), ("photos.png", "no such file"), ("./nowhere", "no such file or"),
        ("x" * 300 + ".txt", "no path (File name too long)"), ("~no-such-user/a.txt", "no path"), ("", "--data: it is empty"),
        (str(tmp_path / "pipe.csv"), "neither a file nor a folder"), (str(tmp_path / "link.txt"), "no such file"),
    ):  # fmt: skip
        code, out, err = run("demo", "--data", spec)
        assert (code, out, err.count("\n")) == (2, "", 1) and says in err, err
    with pytest.raises(RcProbeError, match="no such file"):
        rc_probe.probe("demo", "nofile.txt")


def test_a_text_that_is_missing_is_left_out_and_counted() -> None:
    model, tokenizer = tiny.bert(), tiny.tokenizer()
    data = [None, "w1 w2 w3", ""]
    result = rc_probe.probe(
        model.eval(), data, processor=tokenizer, init=False, paths=False, recursion=False, metrics="residual"
    )
    assert result.settings["samples"] == 1 and "2 empty texts left out" in result.settings["notes"][0]
