"""Rows of results in their files: what replaces what, what a killed run leaves, what two runs do."""

import csv
import dataclasses
import subprocess
import sys

import pytest
import torch

from bench import rows
from bench.__main__ import main

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_round_trip_and_replace_those_of_the_same_key_alone(tmp_path):
    row = rows.Row("svd", "m", "gaussian", "ours", "startup", None, 3, 4, 2, p50_ms=1.25, angle_deg=0.5, note='a, "b"')
    with rows.Results(tmp_path, CPU) as results:
        results.add(row)
    assert rows.read(results.path) == [row]
    times = {}
    for M, ms in ((1, 1.0), (16, 2.0), (1, 3.0)):
        with rows.Results(tmp_path, CPU) as results:
            times[M] = results.add(rows.Row("linear", "m", "q_proj", "ours", "forward", M, 3, 4, p50_ms=ms))
            assert times[M] in rows.read(results.path)
    assert rows.read(results.path) == [row, times[16], times[1]] and times[1].p50_ms == 3
    with results.path.open(newline="") as file:
        assert next(csv.reader(file)) == rows.COLUMNS
        assert len(list(csv.reader(file))) == 3  # what was replaced has left the file
    with results.path.open("a") as file:
        file.write("linear,m,cut sho")  # what a killed process may leave
    assert len(rows.read(results.path)) == 3
    with rows.Results(tmp_path, CPU) as results:
        results.add(dataclasses.replace(row, layer="decaying"))
    assert len(rows.read(results.path)) == 4


def test_a_run_that_ends_early_loses_no_row(tmp_path):
    def row(ms=None, note=""):
        return rows.Row("linear", "m", "q_proj", "ours", "forward", 1, 3, 4, p50_ms=ms, note=note)

    with rows.Results(tmp_path, CPU) as results:
        old = results.add(row(1.0))
    with pytest.raises(KeyboardInterrupt), rows.Results(tmp_path, CPU):
        assert rows.read(results.path) == [old]  # and so after SIGKILL now
        raise KeyboardInterrupt
    assert rows.read(results.path) == [old]
    with rows.Results(tmp_path, CPU) as results:
        results.add(row(note="not measured: no time was left"))
    assert rows.read(results.path) == [old]
    with rows.Results(tmp_path, CPU) as results:
        wrong = results.add(row(note="wrong: y"))
    assert rows.read(results.path) == [wrong]


def test_a_second_run_into_a_folder_is_refused_until_the_first_one_ends(tmp_path, capsys):
    pytest.importorskip("fcntl")
    script = f"""
import torch; from pathlib import Path; from bench import rows
with rows.Results(Path({str(tmp_path)!r}), torch.device("cpu")) as results:
    results.add(rows.Row("linear", "m", "q_proj", "ours", "forward", 1, 3, 4, p50_ms=1.0))
    print(flush=True)
    input()
"""
    command = ["svd", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        assert main(command) == 2
        assert f"is being written by process {first.pid}" in capsys.readouterr().err
        first.kill()
    with rows.Results(tmp_path, CPU) as results:  # a killed process holds no lock
        assert len(rows.read(results.path)) == 1
        with pytest.raises(rows.Unusable), rows.Results(tmp_path, CPU):
            pass
    assert [p.name for p in tmp_path.iterdir()] == [results.path.name]


def test_a_file_edited_by_hand_is_read_or_refused_with_the_place(tmp_path, capsys):
    with rows.Results(tmp_path, CPU) as results:
        for M in (16, 64):
            results.add(rows.Row("linear", "m", "q_proj", "ours", "forward", M, 3, 4, p50_ms=1.0))
    header, first, second = results.path.read_text().splitlines()
    n = len(rows.COLUMNS)

    def written(*lines):
        results.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return rows.read(results.path)

    assert written(header, first, second) == results.rows
    assert written("\ufeff" + header, first, header, "", second) == results.rows
    assert written(header, first, second[:40]) == results.rows[:1]
    results.path.write_text("\n".join((header, first, second[:-2])))  # cut within its date: no fewer cells
    assert rows.read(results.path) == results.rows[:1]
    results.path.write_text("\n".join((header, first, second)))  # an editor may leave the last newline out
    assert rows.read(results.path) == results.rows
    results.path.write_text(header + "\n" + first + "\n", encoding="utf-16")
    with pytest.raises(rows.Unusable, match="is not UTF-8"):
        rows.read(results.path)
    for lines, message in (
        ((header, first + ",", second), f"line 2, column {n + 1}: {n + 1} cells, expected {n}"),
        ((header, first, second + first), f"line 3, column {n + 1}: {2 * n - 1} cells"),
        ((header, first[:40], second), "line 2, column"),
        ((header + ",", first, second), f"line 1, column {n + 1}: '', expected one of op, model"),
        ((header, first, second.replace(",64,", ",64.0,")), "line 3, column M: '64.0', expected a whole number"),
        ((header, first, second.replace(",1,", ",fast,", 1)), "line 3, column p50_ms: 'fast', expected a number"),
        ((header.replace("pass,", ""), first), "line 1, column pass: is missing"),
    ):
        with pytest.raises(ValueError, match=f"{results.path.name}, {message}"):
            written(*lines)
    for arguments in (["--results", str(tmp_path / "none")], ["--readme", str(tmp_path / "none")]):
        assert main(["table", *arguments]) == 2 and "none is not a f" in capsys.readouterr().err
    assert main(["table", "--results", str(tmp_path)]) == 2
    assert "column pass: is missing" in capsys.readouterr().err
    text = results.path.read_text()
    with pytest.raises(rows.Unusable), rows.Results(tmp_path, CPU):
        pass
    assert results.path.read_text() == text


def test_why_there_is_no_time_holds_until_there_is_one(tmp_path):
    def row(provider, pass_="", M=None, **values):
        return rows.Row("layer", "m", "block", provider, pass_, M, **values)

    with rows.Results(tmp_path, CPU) as results:
        results.add(row("peft", note="not measured: no module named peft"))
        results.add(row("ours", "forward", 1, p50_ms=1.0))
    assert len(rows.read(results.path)) == 2
    with rows.Results(tmp_path, CPU) as results:
        results.add(row("peft", "forward", 1, p50_ms=2.0))
    assert [(r.provider, r.p50_ms) for r in rows.read(results.path)] == [("ours", 1.0), ("peft", 2.0)]
