"""The report: its content, one self-contained file, and safe names."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from crysdistill.errors import InputError
from crysdistill.studies.findings import findings, tally
from crysdistill.studies.forest import Change, forest_figure
from crysdistill.studies.numbers import number, percent
from crysdistill.studies.report import console_table, write_report
from crysdistill.studies.tables import result_groups

ARMS = {"scratch": 1.0, "distilled": 0.9, "random-teacher": 0.97, "mean": 4.0}
ABOUT = {arm: f"what {arm} does" for arm in ARMS}
CONTROLS = ("random-teacher", "mean", "forest")


def results(seeds: int = 4, labels: int = 100, arms: dict | None = None, **columns):
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        base = 0.2 * rng.normal(1, 0.05)
        for arm, factor in (arms or ARMS).items():
            value = base * factor * rng.normal(1, 0.01)
            rows.append(
                {"arm": arm, "target": "formation_energy", "unit": "eV/atom"}
                | {"metric": "mae", "labels": labels, "seed": seed, "value": value}
                | {"validation": value, **columns}
            )
    return pd.DataFrame(rows)


def predictions(arms=("scratch", "distilled"), count: int = 30, binary: bool = False):
    rng = np.random.default_rng(1)
    truth = rng.normal(-1, 1, count)
    guess = truth + rng.normal(0, 0.2, count)
    if binary:
        truth, guess = (truth > -1).astype(float), 1 / (1 + np.exp(-guess - 1))
    rows = {"material_id": [f"mp-{i}" for i in range(count)], "seed": 0}
    rows |= {"target": "formation_energy", "truth": truth, "prediction": guess}
    return pd.concat([pd.DataFrame({**rows, "arm": arm}) for arm in arms])


def curves():
    epochs = np.arange(5)
    columns = {"epoch": epochs, "train_loss": 1.0 / (1 + epochs), "lr": 1e-3}
    return pd.concat(
        pd.DataFrame(
            {"run": f"{arm} {seed}", "val_mae": 0.5 - 0.01 * epochs, **columns}
        )
        for arm in ("scratch", "distilled")
        for seed in range(2)
    )


def pretraining():
    return pd.DataFrame(
        {"epoch": [0, 1, 2], "edge_f1": [0.3, 0.5, 0.7654], "val_loss": [3.0, 2.0, 1.0]}
        | {"edge_f1_chance": 0.321, "system_retrieval": [0.1, 0.2, 0.1]}
        | {"system_retrieval_chance": 0.25}
    )


FACTS = {
    "arms": ABOUT,
    "controls": CONTROLS,
    "corpus": "2,300 alloys",
    "overlap": {
        "status": "transductive",
        "rows": [{"kind": "same structure", "matches": 37, "status": "transductive"}],
        "checked_pairs": 12345,
    },
    "settings": {"encoder": {"width": 64}, "optimizer": {"lr": 0.001}},
    "versions": {"torch": "2.13.0"},
    "seeds": [0, 1, 2, 3],
    "duration": 254.2,
}


class Page(HTMLParser):
    """Text, tags and attributes; checks that all tags close."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, html: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    written = write_report(
        path,
        title="Does pretraining help?",
        results=results(),
        facts=FACTS,
        pretraining=pretraining(),
        curves=curves(),
        predictions=predictions(),
        next_steps=["crysdistill build cifs/ -o my.h5", "try `make bench` now"],
    )
    assert written == path
    return path.read_text(encoding="utf-8")


def test_says_what_was_found(full):
    text = Page(full).text
    for group in result_groups(results(), about=ABOUT):
        for row in group.rows:
            assert row.arm in text
            assert row.about in text
            assert number(row.mean, group.decimals) in text
            assert number(row.interval[0], group.decimals) in text
            assert row.verdict in text
            if not row.reference:
                assert percent(row.change) in text
                assert percent(row.change_interval[1]) in text
    assert "test MAE (eV/atom)" in text
    assert "distilled has the best mean" in text
    assert "Knowledge, or only regularisation?" in text


def test_result_table_comes_before_everything_else(full):
    heads = re.findall(r"<h2>([^<]*)", full)
    assert heads[0] == "Results: formation_energy"
    assert [h.strip() for h in heads[1:]] == [
        "Gain against controls",
        "Overlap of corpus and test",
        "What pretraining learned",
        "Predictions: formation_energy",
        "Training curves",
        "How this was measured",
        "What to try next",
        "What ran",
    ]


def test_says_how_it_was_measured_and_what_ran(full):
    text = Page(full).text
    assert "selected on validation crystals only" in text
    assert "A negative result is a result" in text
    assert "Nadeau and Bengio 2003" in text
    assert "transductive" in text
    assert "same structure 37 transductive" in text
    assert "checked pairs 12,345" in text
    assert "4 min 14 s" in text
    assert "encoder.width 64" in text
    assert "torch 2.13.0" in text
    assert "<code>crysdistill build cifs/ -o my.h5</code>" in full
    assert "try <code>make bench</code> now" in full


def test_pretraining_numbers_stand_beside_chance(full):
    text = Page(full).text
    assert "edge f1 0.300 0.765 0.321" in text
    assert "system retrieval not above chance 0.100 0.100 0.250" in text
    assert "val loss 3.000 1.000 –" in text


def test_needs_nothing_from_elsewhere(full):
    page = Page(full)
    assert "http" not in full.replace("http-equiv", "")
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in full
    assert all(target.startswith("#") for target in re.findall(r"url\((.)", full))


def test_pictures_follow_the_page_and_do_not_share_ids(full):
    page = Page(full)
    assert page.tags.count("svg") == 10  # 2 results, 1 control, 3 numbers, 4 more
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"', full):
        assert target in ids
    # The style sheet defines every colour of a picture.
    svgs = "".join(re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL))
    used = set(re.findall(r"var\(--([\w-]+)\)", svgs))
    assert used <= set(re.findall(r"--([\w-]+):", full))
    assert {"ink", "muted", "reference", "better", "font"} <= used
    fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svgs))
    assert fixed <= {"#000000", "#ffffff"}  # clip paths and the like


def test_same_input_gives_the_same_file(tmp_path):
    given = {"title": "x", "results": results(), "curves": curves()}
    first = write_report(tmp_path / "a" / "page.html", **given)
    second = write_report(tmp_path / "b" / "page.html", **given)
    assert first.read_bytes() == second.read_bytes()
    for file in (tmp_path / "a" / "page-report").iterdir():
        again = tmp_path / "b" / "page-report" / file.name
        assert file.read_bytes() == again.read_bytes()


def test_leaves_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    write_report(tmp_path / "a.html", title="x", results=results(2))
    assert dict(matplotlib.rcParams) == before


def test_names_are_only_names(tmp_path):
    evil = "<script>alert(1)</script>&$x^2$"
    arms = {"scratch": 1.0, evil: 0.9, "$\\frac$": 1.1}
    table = results(arms=arms, target=evil, unit="$" + evil)
    path = write_report(
        tmp_path / "a.html",
        title=evil,
        results=table,
        facts={evil: evil, "arms": {evil: evil}, "settings": {evil: {evil: evil}}}
        | {"versions": {evil: evil}, "measured": [evil], "overlap": [{evil: evil}]},
        pretraining=pd.DataFrame({"epoch": [0, 1], evil: [1.0, 2.0]}),
        curves=curves().assign(arm=evil),
        predictions=predictions(["scratch", evil]).assign(
            target=evil, material_id=evil
        ),
        next_steps=[evil, f"`{evil}`"],
    )
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html
    page = Page(html)
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>&$x^2$") > 15


def test_one_seed(tmp_path):
    path = write_report(tmp_path / "a.html", title="x", results=results(seeds=1))
    text = Page(path.read_text(encoding="utf-8")).text
    assert "one seed: no verdict" in text
    assert "One seed gives no interval and no verdict" in text
    assert "nan" not in text.lower().split()
    assert "±" not in text.split("How this was measured")[0].replace("mean ± sd", "")


def test_one_arm_without_a_reference(tmp_path):
    table = results(arms={"finetuned": 1.0}).drop(columns=["unit", "validation"])
    path = write_report(tmp_path / "a.html", title="x", results=table)
    text = Page(path.read_text(encoding="utf-8")).text
    assert "finetuned" in text
    assert "Verdict" not in text
    assert "What to try next" not in text


def test_runs_that_failed_are_counted(tmp_path):
    table = results()
    table.loc[table["arm"] == "mean", "value"] = np.nan
    table.loc[(table["arm"] == "distilled") & (table["seed"] == 1), "value"] = np.inf
    path = write_report(tmp_path / "a.html", title="x", results=table)
    text = Page(path.read_text(encoding="utf-8")).text
    assert "5 of 16 runs gave no finite value" in text
    assert "5 runs have no scratch run of the same seed" in text
    assert "1 failed" in text
    assert "4 failed" in text


def test_several_targets_and_numbers_of_labels(tmp_path):
    auc = results(arms={"scratch": 1.0, "distilled": 1.02, "mean": 0.6})
    auc = auc.assign(target="is_metal", metric="auc", value=auc["value"] * 4, unit="")
    table = pd.concat([results(), results(labels=20), auc])
    truths = pd.concat(
        [predictions(), predictions(binary=True).assign(target="is_metal")]
    )
    path = write_report(
        tmp_path / "a.html", title="x", results=table, predictions=truths
    )
    html = path.read_text(encoding="utf-8")
    text = Page(html).text
    assert text.index("20 training labels") < text.index("How many labels it takes")
    assert "Results: is_metal" in text
    assert "test AUC" in text
    assert "false positive rate" in html
    assert re.search(r"distilled: better than scratch in \d+ of \d+ pairs of", text)
    assert re.search(r"Holm's correction better in \d of 3 comparisons", text)


def test_large_clouds_become_one_image(tmp_path):
    small, large = (
        write_report(
            tmp_path / f"{count}.html",
            title="x",
            results=results(2),
            predictions=predictions(count=count),
        ).read_text(encoding="utf-8")
        for count in (100, 20_000)
    )
    assert "data:image/png" not in small
    assert "data:image/png" in large
    assert len(large) < 500_000


@pytest.mark.parametrize(
    ("given", "word", "said"),
    [
        ("clean", "clean", ""),
        (
            "clean of dataset.h5 (3 left out)",
            "clean",
            "Clean of dataset.h5 (3 left out).",
        ),
        ("transductive (3 of 9 in both)", "transductive", "3 of 9 in both."),
        ("leaked (labels of 3)", "leaked", "learned from labels of test crystals"),
        ("not checked", "unknown", "Not checked."),
        ([{"a": 1, "status": "clean"}, {"status": "transductive"}], "transductive", ""),
        ([{"status": "leaked"}, {"status": "transductive"}], "leaked", ""),
        (pd.DataFrame({"status": ["clean"]}), "clean", ""),
    ],
)
def test_overlap_in_any_form(tmp_path, given, word, said):
    path = write_report(
        tmp_path / "a.html", title="x", results=results(2), facts={"overlap": given}
    )
    html = path.read_text(encoding="utf-8")
    assert f'<h2>Overlap of corpus and test <span class="badge {word}">' in html
    assert said in Page(html).text


def test_bad_input(tmp_path):
    good = results(2)

    def write(**given):
        return write_report(
            given.pop("path", tmp_path / "a.html"),
            **{"title": "x", "results": good, **given},
        )

    with pytest.raises(InputError, match="is a folder; give the name of an HTML file"):
        write(path=tmp_path)
    with pytest.raises(InputError, match="the results lack `value`"):
        write(results=good.drop(columns="value"))
    with pytest.raises(InputError, match="the pretraining table lacks `epoch`"):
        write(pretraining=pd.DataFrame({"edge_f1": [1.0]}))
    with pytest.raises(InputError, match="the curves lack `run`; needed are"):
        write(curves=curves().drop(columns="run"))
    with pytest.raises(InputError, match="predictions lack `arm` and `truth`; needed"):
        write(predictions=predictions().drop(columns=["truth", "arm"]))
    with pytest.raises(InputError, match=r"status is 'claen'.*did you mean `clean`"):
        write(facts={"overlap": {"status": "claen"}})
    assert not (tmp_path / "a.html").exists()


def test_findings_name_a_control_that_is_better():
    table = results(arms={**ARMS, "forest": 0.5})
    (group,) = result_groups(table, controls=CONTROLS)
    said = findings(group, table)
    assert said[0].startswith("distilled has the best mean, MAE 0.")
    assert said[0].endswith("against scratch: better.")
    assert said[1].startswith("The control forest has a better mean than distilled: 0.")
    assert said[2].startswith("Knowledge, or only regularisation? distilled is at −")
    row = next(row for row in group.rows if row.arm == "distilled")
    assert all(change < 0 for change in row.changes)  # errors
    pairs, gain = 2 * len(row.changes), -sum(row.changes) / len(row.changes)
    assert tally([group, group]) == [
        f"distilled: better than scratch in {pairs} of {pairs} pairs of runs, mean "
        f"gain +{gain:.1f} %. After Holm's correction better in 2 of 2 comparisons, "
        "worse in 0."
    ]


def test_a_tally_of_arms_that_help_and_harm_where_higher_is_better():
    table = results(arms={"scratch": 0.6, "distilled": 0.5, "finetuned": 0.9})
    (group,) = result_groups(table.assign(metric="auc", unit=""))
    first, second = tally([group])
    assert re.match(
        r"finetuned: better than scratch in (\d) of \1 pairs of runs, mean gain \+",
        first,
    )
    assert re.match(
        r"distilled: better than scratch in 0 of \d pairs of runs, mean gain −", second
    )


def test_findings_when_nothing_helps():
    table = results(arms={"scratch": 1.0, "distilled": 1.2, "finetuned": 1.5})
    (group,) = result_groups(table)
    (said,) = findings(group, table)
    assert said.startswith("no arm has a better mean than scratch; next is distilled")
    assert said.endswith("against scratch: worse.")


def test_console_table():
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(console_table(results()))
    text = console.file.getvalue()
    (group,) = result_groups(results())
    for row in group.rows:
        line = next(line for line in text.splitlines() if f"│ {row.arm} " in line)
        assert number(row.mean, group.decimals) in line
        assert number(row.sd, group.decimals) in line
        assert row.judgement in line
    order = [text.index(f"│ {row.arm} ") for row in group.rows]
    assert order == sorted(order)


def test_console_table_takes_names_as_they_are():
    console = Console(width=100, file=io.StringIO(), color_system=None)
    table = results(seeds=1, arms={"scratch": 1.0, "[bold]x[/]": 2.0})
    console.print(console_table(pd.concat([table, table.assign(labels=20)])))
    assert "[bold]x[/]" in console.file.getvalue()
    assert "20 labels" in console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(-0.1234, 2, "−0.12"), (12345.6, 0, "12,346"), (float("nan"), 3, "–")],
)
def test_numbers_as_people_write_them(value, decimals, text):
    assert number(value, decimals) == text


def test_a_large_fall_is_drawn_and_a_large_rise_becomes_an_arrow():
    middles = {"best": -60.0, "a": -8.0, "b": 5.0, "c": 7.0, "mean": 300.0}
    changes = [Change(row, "", m, (m - 1, m + 1)) for row, m in middles.items()]
    figure = str(forest_figure(changes, "change (%)"))
    assert "+300 % →" in figure
    assert "←" not in figure
