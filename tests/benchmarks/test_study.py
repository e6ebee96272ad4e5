"""The runner of the studies: which cells there are, which are finished, and what is reckoned from them. No models."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

from benchmarks.__main__ import selected, value_of
from benchmarks.study import HERE, Lines, Record, Study, load, names
from benchmarks.summary import borda, paired, shown, shown_paired, spread, table, tries_table

ROOT = HERE.parent


def study(**parts: Any) -> Study:
    return Study(Path("made-up"), "title", "2026-01-01", "claim", **parts)


def test_a_grid_is_every_combination_seed_by_seed() -> None:
    cells = study(seeds=[1, 2], grid={"task": ["a", "b"], "steps": 5}).cells()
    assert cells == [{"seed": seed, "task": task, "steps": 5} for seed in (1, 2) for task in ("a", "b")]


def test_blocks_replace_the_grids_values_and_the_seeds() -> None:
    blocks = [{"weight": [0, 3]}, {"weight": 9, "cut": 0.2, "seed": 2}, {"weight": 0}]
    cells = study(seeds=[1, 2], grid={"cut": 0}, runs=blocks).cells()
    assert [(cell["seed"], cell["cut"], cell["weight"]) for cell in cells] == [
        (1, 0, 0),
        (1, 0, 3),
        (2, 0, 0),
        (2, 0, 3),
        (2, 0.2, 9),
    ]


def test_a_lookup_gives_one_value_or_several_and_no_cell_where_it_has_none() -> None:
    lookup = {"lr": {"by": ["task", "method"], "a": {"x": 0.1, "y": [0.2, 0.3]}, "b": {"x": 0.4}}}
    cells = study(grid={"task": ["a", "b"], "method": ["x", "y"]}, lookup=lookup).cells()
    assert [(c["task"], c["method"], c["lr"]) for c in cells] == [
        ("a", "x", 0.1),
        ("a", "y", 0.2),
        ("a", "y", 0.3),
        ("b", "x", 0.4),
    ]


def test_other_values_replace_those_of_the_grid_the_blocks_the_lookups_and_the_settings() -> None:
    made = study(
        seeds=[1, 2],
        grid={"task": ["a", "b"]},
        runs=[{"weight": 1, "seed": 7}, {"weight": 2}],
        lookup={"lr": {"by": ["task"], "a": 0.1, "b": 0.2}},
        settings={"rows": {"a": 10, "b": 20}},
    )
    changed = made.changed({"seeds": 3, "task": "a", "weight": [0, 5], "lr": 1, "rows": {"a": 2}})
    assert changed.cells() == [{"seed": 3, "task": "a", "lr": 1, "weight": weight} for weight in (0, 5)]
    assert changed.settings == {"rows": {"a": 2, "b": 20}}
    assert made.settings == {"rows": {"a": 10, "b": 20}}
    with pytest.raises(SystemExit, match=r"made-up has no setting wieght: there are lr, rows, task, weight"):
        made.changed({"wieght": 1})


def test_a_cell_is_finished_when_a_line_has_all_its_settings() -> None:
    made = study(seeds=[1], grid={"task": "a", "cut": [0, 0.2]}, absent={"cut": 0.0})
    rows = [{"task": "a", "seed": 1, "score": 0.5}, {"task": "a", "seed": 2, "cut": 0.2}]  # one older than `cut`
    plain, cut = made.cells()
    assert [made.is_line_of(row, plain) for row in rows] == [True, False]
    assert [made.is_line_of(row, cut) for row in rows] == [False, False]
    assert made.lines_of(rows) == [{"task": "a", "seed": 1, "score": 0.5, "cut": 0.0}]
    named = study(grid={"task": "a", "rate": 3}, identity=["task"])
    assert named.is_line_of({"task": "a"}, named.cells()[0])


def test_a_torn_last_line_is_made_again_and_a_whole_one_kept(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "runs.jsonl")
    assert lines.read() == []
    lines.add({"seed": 1})
    with lines.path.open("a") as file:
        file.write('{"seed": 2, "sco')
    assert lines.read() == [{"seed": 1}]
    lines.add({"seed": 2})
    lines.path.write_text(lines.path.read_text().removesuffix("\n"))  # whole, but for its end
    lines.add({"seed": 3})
    assert lines.read() == [{"seed": 1}, {"seed": 2}, {"seed": 3}]
    assert lines.path.read_text().count("\n") == 3


def test_a_torn_line_between_others_is_an_error(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "runs.jsonl")
    lines.path.write_text('{"seed": 1\n{"seed": 2}\n')
    with pytest.raises(SystemExit, match=r"runs\.jsonl, line 1"):
        lines.read()


def test_a_record_keeps_what_other_cells_measured(tmp_path: Path) -> None:
    record = Record(tmp_path / "results.json")
    record.add({"models": {"a": {"step": 1.0}}}, {"model": "a"}, {"rounds": 2})
    record.add({"models": {"a": {"memory": 3.0}}}, {"model": "a", "part": "memory"}, {"rounds": 4})
    found = json.loads(record.path.read_text())
    assert found["models"] == {"a": {"step": 1.0, "memory": 3.0}}
    assert found["conditions"] == {"model a": {"rounds": 2}, "model a, part memory": {"rounds": 4}}


def test_cells_are_selected_by_value_and_values_are_read_as_they_look() -> None:
    cells = study(grid={"task": ["a", "b"], "rank": [1, 2, 32]}).cells()
    assert selected(cells, ["task=a", "rank=2,32"]) == [{"task": "a", "rank": 2}, {"task": "a", "rank": 32}]
    with pytest.raises(SystemExit, match="no cell has rnak: they have task, rank"):
        selected(cells, ["rnak=1"])
    given = ["3", "0.5,1", "true", "lora,dora", '["a"]', "{ a = 1 }"]
    assert [value_of(text) for text in given] == [3, [0.5, 1], True, ["lora", "dora"], ["a"], {"a": 1}]


def test_mean_deviation_and_paired_interval_against_values_worked_out_by_hand() -> None:
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "seeds": 3}
    assert spread([5.0]) == {"mean": 5.0, "std": None, "seeds": 1}
    # Differences 1, 2, 3: mean 2, deviation 1, and t(0.975, 2) = 4.30265 times 1 / sqrt(3).
    found = paired({1: 2.0, 2: 4.0, 3: 6.0, 4: 9.0}, {3: 3.0, 2: 2.0, 1: 1.0})
    assert found is not None
    assert (found["mean"], found["std"], found["seeds"]) == (2.0, 1.0, 3)
    assert found["interval_95"] == pytest.approx([2 - 2.48414, 2 + 2.48414], abs=1e-5)
    assert shown_paired(found) == "+2.0 (-0.5 to +4.5)"
    assert shown(spread([0.5, 0.7]), unit=100) == "60.0 ± 14.1"
    assert paired({1: 2.0}, {1: 1.5}) == {"mean": 0.5, "std": None, "seeds": 1}
    assert paired({1: 1.0}, {2: 1.0}) is None


def test_borda_ranks_against_values_worked_out_by_hand() -> None:
    scores = {"t": {"a": 3.0, "b": 2.0, "c": 2.0}, "u": {"a": 10.0, "b": 30.0, "c": 20.0, "d": 99.0}}
    # t: a beats two, b and c share one point. u, without d, which t has not: b beats two, c one.
    assert borda(scores) == {
        "a": {"points": 2.0, "rank": 2.0},
        "b": {"points": 2.5, "rank": 1.0},
        "c": {"points": 1.5, "rank": 3.0},
    }
    assert borda({"loss": {"a": 1.0, "b": 2.0}}, higher=False)["a"] == {"points": 1.0, "rank": 1.0}


def test_a_table_has_its_columns_aligned() -> None:
    assert table(["x", "y"], [["a", 1]], right=[1]) == "| x | y |\n|---|---:|\n| a | 1 |"


@pytest.mark.parametrize("name", names())
def test_every_study_is_whole_and_stands_in_the_index(name: str) -> None:
    made = load(name)
    assert made.cells(), "no cells"
    index = (HERE / "LOG.md").read_text(encoding="utf-8")
    assert f"| [{made.title}]({name}/README.md) | {made.date} |" in index
    assert f"| {made.claim} |" in index
    page = (made.folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert page[0] == f"# {made.title}"
    assert page[2].endswith(".")
    assert page[3].endswith(".")
    for link in links(page):
        assert (made.folder / link).exists(), link
    assert importlib.util.find_spec(f"benchmarks.{name}.run") is not None
    if made.tiny:
        assert made.changed(made.tiny).cells()
    if made.tune:
        assert made.changed(made.tune).cells()


def links(lines: list[str]) -> list[str]:
    return [link for line in lines for link in re.findall(r"\]\(([^)#:]+)\)", line)]


def test_every_folder_of_the_benchmarks_is_a_study() -> None:
    folders = {path.parent.name for path in HERE.glob("*/run.py")}
    assert folders == set(names())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "no study 'nope': there are adapter_cost, adapter_quality"),
        (["step_cost"], "pass --models: a folder with smollm2"),
        (["rank_quality", "--seeds", "5", "--list"], "seed 5 is the one that settings are chosen on: see --tune"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert said in f"{stopped.value} {capsys.readouterr().err}"


def test_without_a_name_the_studies_are_listed() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(names()) <= {line.split(" ")[0] for line in done.stdout.splitlines()}


def test_tries_have_a_column_for_each_value() -> None:
    """The mean over the tasks; the best of each arm in bold; nothing where a value was not tried."""
    rows = [
        {"arm": "a", "lr": 0.1, "accuracy": 0.5},
        {"arm": "a", "lr": 0.1, "accuracy": 0.7},
        {"arm": "a", "lr": 0.2, "accuracy": 0.55},
        {"arm": "b", "lr": 0.2, "accuracy": 0.4},
    ]
    lines = tries_table(rows, ["arm"], "lr", "accuracy").splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "arm",
        "accuracy at lr 0.1, %",
        "accuracy at lr 0.2, %",
    ]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert found == [["a", "**60.0**", "55.0"], ["b", "", "**40.0**"]]
