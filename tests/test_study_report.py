"""The report of studies from their files: sections, files, joined studies."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from crysdistill.cli import main
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.studies.canvas import short
from crysdistill.studies.collect import report_study
from crysdistill.studies.distances import training_distances
from crysdistill.studies.exhibits import Exhibit, Section
from crysdistill.studies.exports import export, export_folder
from crysdistill.studies.findings import limits
from crysdistill.studies.joining import join_studies, read_study
from crysdistill.studies.run_files import judged_predictions
from crysdistill.studies.run_files import test_over_train as over_train
from crysdistill.studies.sections.crystals import error_by_distance
from crysdistill.studies.statistics import check_results
from crysdistill.studies.tables import ResultGroup, result_groups
from tests.synthetic_study import ABOUT, write_study


class Words(HTMLParser):
    """The text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def text_of(path) -> str:
    words = " ".join(Words(path.read_text("utf-8")).found)
    return " ".join(words.replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def study(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("study") / "study"
    return write_study(
        folder,
        frozen=[0, 1, "all"],
        names=list(Store.open(dataset).material_ids),
        dataset=dataset,
        tested=12,
        failed=1,
    )


@pytest.fixture(scope="module")
def page(study):
    return report_study(study)


def test_says_all_that_it_holds(page):
    text = text_of(page)
    heads = re.findall(r"<h2>([^<]*)", page.read_text("utf-8"))
    assert [head.strip() for head in heads] == [
        "Overview",
        "Results: modulus (modulus_value)",
        "Results: gap (gap_value)",
        "Gain against controls",
        "Gap to the teacher that distillation closes",
        "Which layers to freeze",
        "Overlap of corpus and test",
        "Predictions: modulus (modulus_value)",
        "Predictions: gap (gap_value)",
        "Calibration",
        "Training curves",
        "What the search chose",
        "What it cost",
        "Runs that failed",
        "How this was measured",
        "What ran",
    ]
    assert (
        "2 tasks, 2 targets, 6 arms, 3 seeds, 100 / 200 / 400 training labels" in (text)
        or "2 targets, 6 arms, 3 seeds, 100 / 200 / 400 training labels" in text
    )
    assert "finetuned convolutions=all" in text
    for about in ABOUT.values():
        assert about in text
    assert "All numbers are from crysdistill study configs/study.yaml" in text
    assert "corrected resampled t test" in text
    assert "the other crystals of the dataset = 0.43." in text  # 12 of 40
    assert "1 run of 108 failed." in text
    assert "out of memory" in text
    assert "clean of gap.h5 (3 left out)" in text
    assert "How many times as many labels scratch needs" in text
    assert "Learning curves: error = a n^-b for n labels" in text
    assert "the arms of gap have different splits" in text
    assert "8 trials for every arm" in text
    assert "scratch modulus 100 0 0.00321" in text
    assert "nan" not in text.lower().split()


def test_freezing_names_the_best_and_what_it_costs_to_be_wrong(page):
    text = text_of(page)
    best = r"(1 convolution|the embedding) frozen has the best mean"
    assert re.search(rf"gap, 400 labels: finetuned with {best}", text)
    assert re.search(
        r"worst choice, finetuned with all layers frozen, costs \+[1-4]\.\d %", text
    )
    assert "relative change of the weights" in page.read_text("utf-8")


def test_errors_by_kind_of_crystal(page, dataset):
    table = pd.read_csv(page.parent / "report" / "elements-gap.csv")
    store = Store.open(dataset)
    starts, numbers = store.atom_offsets, store.atomic_numbers
    made = pd.read_csv(page.parent / "results.csv")
    gap = made[(made["task"] == "gap") & (made["labels"] == 400)]
    runs = gap[gap["arm"] == "finetuned"]
    means = runs.groupby("freeze.convolutions")["value"].mean()
    best = runs[runs["freeze.convolutions"] == means.idxmin()]
    errors: dict[str, list[float]] = {}
    for run in best["run"]:
        rows = pd.read_csv(page.parent / run / "predictions.csv")
        for name, error in zip(
            rows["material_id"], (rows["prediction"] - rows["truth"]).abs(), strict=True
        ):
            errors.setdefault(name, []).append(error)
    for row in table.itertuples():
        mine = [
            np.mean(found)
            for number, name in enumerate(store.material_ids)
            if name in errors
            and row.element in numbers[starts[number] : starts[number + 1]]
            for found in [errors[name]]
        ]
        assert (row.size, row.mean) == (len(mine), pytest.approx(np.mean(mine)))


def test_distance_to_the_nearest_training_crystal(study, dataset):
    table = check_results(read_study(study).results)
    predictions = judged_predictions(table)
    far = training_distances(table, predictions)
    store = Store.open(dataset)
    parts = {}
    for row, name in enumerate(store.material_ids):
        atoms = store.atomic_numbers[slice(*store.atom_offsets[row : row + 2])]
        parts[name] = {z: np.mean(atoms == z) for z in set(atoms.tolist())}
    for place in (0, 50, len(predictions) - 1):
        one = predictions.loc[place]
        mine = table[(table["task"] == one["task"]) & (table["seed"] == one["seed"])]
        mine = mine[mine["labels"] == 400].iloc[0]
        split = pd.read_csv(f"{mine['run']}/split.csv")
        train = split.loc[split["subset"] == "train", "material_id"]
        shared = [
            sum(
                min(v, parts[name].get(z, 0)) for z, v in parts[one.material_id].items()
            )
            for name in train
        ]
        assert far[place] == pytest.approx(1 - max(shared))


def test_errors_by_distance_to_training():
    group = ResultGroup("gap", "eV", "mae", 100, ())
    distance = np.linspace(0, 1, 41)
    part = pd.DataFrame({"material_id": np.arange(41), "truth": 0.0})
    part = part.assign(prediction=distance, distance=distance)
    rows = error_by_distance({"scratch": part, "best": part}, group).data
    assert rows["crystals"].tolist() == [11, 10, 10, 10]
    assert rows["best"].tolist() == pytest.approx([0.125, 0.3875, 0.6375, 0.8875])
    assert error_by_distance({"a": part.assign(distance=np.nan)}, group) is None


def test_arms_may_have_other_numbers_of_labels(tmp_path):
    """The overview shows the labels with the most arms, and no arm is lost."""
    tasks, labels = ("modulus", "gap", "energy"), (100, 200, 400, 800)
    folder = write_study(tmp_path / "study", tasks=tasks, labels=labels, seeds=2)
    table = pd.read_csv(folder / "results.csv")
    here = {"random-teacher": (100, 200), "distilled": (200, 800)}
    gone = [
        labels not in here.get(arm, (labels,))
        for arm, labels in zip(table["arm"], table["labels"], strict=True)
    ]
    table.loc[~np.array(gone)].to_csv(folder / "results.csv", index=False)
    text = text_of(report_study(folder))
    assert (
        "Change of the error of each arm against scratch, in percent, with 200" in text
    )
    fewer = table["labels"] != 200
    table.loc[~np.array(gone) & fewer].to_csv(folder / "results.csv", index=False)
    text = text_of(report_study(folder))
    assert "with 800 labels" in text
    arms = pd.read_csv(folder / "report" / "over-tasks.csv")["arm"]
    assert list(arms) == ["finetuned", "distilled", "random-teacher"]


def test_every_table_and_figure_is_a_file(page):
    folder = page.parent / "report"
    listed = pd.read_csv(folder / "contents.csv")
    assert set(listed["file"]) | {"contents.csv"} == {f.name for f in folder.iterdir()}
    names = {file.split(".")[0] for file in listed["file"]}
    assert {
        "overview",
        "over-tasks",
        "controls",
        "freezing",
        "costs",
        "failed",
    } <= names
    assert {"parity-gap-scratch", "label-efficiency-gap", "results-gap-400"} <= names
    html = page.read_text("utf-8")
    assert html.count("<figure") == sum(listed["file"].str.endswith(".svg"))
    for file in folder.glob("*.svg"):
        root = ElementTree.fromstring(file.read_text("utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in file.read_text("utf-8")
    for file in folder.glob("*.csv"):
        lines = (
            (folder / f"{file.stem}.md").read_text() if file.stem != "contents" else ""
        )
        if lines:
            assert len(lines.splitlines()) > 2
            latex = file.with_suffix(".tex").read_text()
            assert latex.count(r"\begin{tabular}") == 1
            assert re.search(r"(?<!\\)%", latex) is None
    found = pd.read_csv(folder / "results-gap-400.csv").set_index("arm")
    made = pd.read_csv(page.parent / "results.csv")
    mine = made[(made["task"] == "gap") & (made["labels"] == 400)]
    scratch = mine.loc[mine["arm"] == "scratch", "value"]
    assert found.loc["scratch", "mean"] == pytest.approx(scratch.mean())


def test_files_of_an_earlier_report_go(tmp_path):
    def section(name):
        table = pd.DataFrame({"arm": ["scratch"]})
        return Section("x", exhibits=[Exhibit(name, "a|b", table, table)])

    folder = export_folder(tmp_path / "page.html")
    assert folder == tmp_path / "page-report"
    assert export_folder(tmp_path / "report.html") == tmp_path / "report"
    export([section("one"), section("one")], folder)
    (folder / "mine.txt").write_text("mine")
    assert (folder / "one-2.csv").exists()
    export([section("two")], folder)
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["contents.csv", "mine.txt", "two.csv", "two.md", "two.tex"]


def test_ratio_of_test_and_training_crystals(tmp_path):
    def ratio(name, **given):
        folder = write_study(tmp_path / name, tasks=["gap"], labels=[100], **given)
        return over_train(check_results(read_study(folder).results)).unique()

    assert ratio("a", tested=20) == pytest.approx([20 / 80])
    assert ratio("b", same_test=True) == [0]
    assert np.isnan(ratio("c", seeds=1)).all()
    table = check_results(read_study(tmp_path / "b").results).assign(test_train=0.0)
    said = limits(table, result_groups(table), "scratch", None)
    assert any("All seeds have the same test crystals" in line for line in said)


def test_a_study_without_folders_of_runs(tmp_path):
    folder = tmp_path / "s"
    write_study(folder, tasks=["gap"], labels=[100])
    table = pd.read_csv(folder / "results.csv")
    table.drop(columns=["task", "run", "processor", "error"]).to_csv(
        folder / "results.csv", index=False
    )
    (folder / "study.json").unlink()
    for row in table.itertuples():  # names of version 0.1
        name = f"{row.arm}-all-{row.seed}" if row.seed else f"{row.arm}-100-{row.seed}"
        (folder / row.run).rename(folder / "runs" / name)
    text = text_of(report_study(folder))
    assert "Results: gap_value" in text
    assert "Predictions: gap_value" in text
    assert "Training curves" in text


def test_joined_studies(tmp_path):
    one = write_study(tmp_path / "one", tasks=["gap"], labels=[100])
    two = write_study(tmp_path / "two", tasks=["modulus"], labels=[100, 200])
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(two), "-o", str(out)]) == 0
    text = text_of(out)
    assert "Studies one and two" in text
    assert "Results: gap" in text
    assert "Results: modulus" in text
    again = join_studies({"1": read_study(one), "2": read_study(one)})
    assert len(again.results) == len(read_study(one).results)
    assert again.facts == read_study(one).facts


def test_studies_that_disagree(tmp_path):
    names = {n: tmp_path / n for n in ("a", "b", "c")}
    write_study(names["a"], tasks=["gap"], labels=[100])
    write_study(names["b"], tasks=["gap"], labels=[100], factor=1.1)
    write_study(names["c"], tasks=["gap"], labels=[200])
    facts = json.loads((names["c"] / "study.json").read_text())
    facts["tasks"]["gap"]["dataset"] = "other.h5"
    (names["c"] / "study.json").write_text(json.dumps(facts))
    read = {name: read_study(folder) for name, folder in names.items()}
    with pytest.raises(InputError) as caught:
        join_studies({"a": read["a"], "b": read["b"]})
    assert re.fullmatch(
        r"a and b hold different results of the arm `scratch` for `gap` with 100 "
        r"labels, seed 0: 0\.\d+ and 0\.\d+; leave one study out",
        str(caught.value),
    )
    text = "the task `gap` has the dataset 'gap.h5' in a and 'other.h5' in c; rename"
    with pytest.raises(InputError, match=text):
        join_studies({"a": read["a"], "c": read["c"]})


def test_bad_input(tmp_path, capsys):
    good = write_study(tmp_path / "good", tasks=["gap"], labels=[100], seeds=2)
    with pytest.raises(
        InputError, match=r"absent/results\.csv: no such file; `crysdis"
    ):
        report_study(tmp_path / "absent")
    with pytest.raises(InputError, match="several studies make one page; say where"):
        report_study([good, tmp_path])
    with pytest.raises(InputError, match="good was given twice; give each study once"):
        report_study([good, good], tmp_path / "x.html")
    (tmp_path / "results.csv").write_text("arm,target\nscratch,gap\n")
    match = "lacks `metric` and `labels` and `seed` and `value`; run the study again"
    with pytest.raises(InputError, match=match):
        report_study(tmp_path)
    (tmp_path / "results.csv").write_text("")
    with pytest.raises(InputError, match=r"results\.csv: not a readable table"):
        report_study(tmp_path)
    (good / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study\.json: not readable as JSON"):
        report_study(good)
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "absent/results.csv: no such file" in capsys.readouterr().err


def test_published_predictions_stand_beside_ours(tmp_path):
    folder = write_study(tmp_path / "s", tasks=["gap"], labels=[100])
    run = pd.read_csv(folder / "results.csv")["run"][0]
    rows = pd.read_csv(folder / run / "predictions.csv")
    table = rows[["material_id"]].assign(**{"Their Model": rows["truth"] + 5})
    table.to_csv(tmp_path / "published.csv", index=False)
    given = ["--published", str(tmp_path / "published.csv")]
    assert main(["report", str(folder), "--reference", "distilled", *given]) == 0
    text = text_of(folder / "report.html")
    assert "Change vs distilled" in text
    assert "finetuned beside published predictions, paired by crystal" in text
    found = pd.read_csv(folder / "report" / "published-gap.csv")
    assert found["model"].tolist() == ["Their Model"]
    assert found["published_mae"][0] > 1
    assert found["ahead"][0] == 1


@pytest.mark.slow
def test_a_thousand_cells(tmp_path):
    names = ("elasticity", "phonons", "gap", "energy")
    arms = {f"arm-{i}": 1 + i / 20 for i in range(12)} | {"scratch": 1.0}
    folder = write_study(
        tmp_path / "s", arms=arms, tasks=names, labels=(100, 250, 500, 1000),
        seeds=5, tested=400,
    )  # fmt: skip
    page = report_study(folder)
    assert page.stat().st_size < 10e6
    assert sum(f.stat().st_size for f in (tmp_path / "s" / "report").iterdir()) < 10e6


def test_long_names_keep_what_tells_them_apart():
    names = [f"finetuned convolutions={k} weights=a" for k in (0, 1)]
    assert {len(short(name, 30)) for name in names} == {30}
    assert len({short(name, 30) for name in names}) == 2
    assert short("scratch", 7) == "scratch"
