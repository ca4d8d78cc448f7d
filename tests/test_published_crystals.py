"""Published predictions, crystal by crystal."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crysdistill.errors import InputError
from crysdistill.studies.statistics import compare_published, read_published

PUBLISHED = """material_id,fold,good,bad,elsewhere
a,0,1.1,2.0,
b,0,1.8,3.0,
c,1,3.1,5.0,
0012,1,4.2,3.0,7.0
"""


def ours() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "material_id": ["a", "b", "c", "d", "a"],
            "truth": [1.0, 2.0, 3.0, 9.0, 1.0],
            "prediction": [1.2, 2.1, 2.7, 0.0, 1.4],
        }
    )


def test_errors_of_common_crystals(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED)
    table = read_published(path)
    assert list(table["material_id"]) == ["a", "b", "c", "0012"]
    found = compare_published(ours(), table).set_index("model")
    assert list(found.index) == ["good", "bad"]
    mine = np.array([0.3, 0.1, 0.3])  # a: mean of two seeds
    assert list(found["crystals"]) == [3, 3]
    assert list(found["mae"]) == pytest.approx([mine.mean()] * 2)
    assert list(found["published_mae"]) == pytest.approx([0.4 / 3, 4 / 3])
    assert list(found["ahead"]) == pytest.approx([1 / 3, 1])
    theirs = np.array([1.0, 1.0, 2.0])
    assert found.loc["bad", "p"] == pytest.approx(stats.wilcoxon(mine - theirs).pvalue)
    ends = stats.ttest_rel(mine, theirs).confidence_interval()
    assert found.loc["bad", "ci_low"] == pytest.approx(ends.low)
    assert found.loc["bad", "p_holm"] == pytest.approx(
        min(1, 2 * found["p"].min()), rel=1e-6
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("id,x\na,1\n", "lacks the column `material_id`"),
        ("material_id,fold\na,1\n", "no column with predictions of a model"),
        ("material_id,x\na,1\na,2\n", "a occurs twice; keep one row"),
        ("material_id,x\na,1\nb,?\n", r"`x` of b is '\?' but must be a number"),
        ("", "not a readable CSV file"),
    ],
)
def test_what_is_no_table_of_predictions(tmp_path, text, match):
    path = tmp_path / "published.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=match):
        read_published(path)
    with pytest.raises(InputError, match="no such file of published predictions"):
        read_published(tmp_path / "absent.csv")


def test_published_errors_of_phonons(shared_data):
    folder = shared_data / "phonons"
    truth = pd.read_csv(folder / "properties.csv", dtype={"material_id": str})
    truth = truth.rename(columns={truth.columns[1]: "truth"})
    table = read_published(folder / "published_predictions.csv")
    found = compare_published(truth.assign(prediction=truth["truth"]), table)
    errors = found.set_index("model")["published_mae"]
    # Mean over five equal folds, from the leaderboard of matbench_phonons.
    assert errors["ALIGNN"] == pytest.approx(29.5385, rel=1e-3)
    assert errors["CGCNN"] == pytest.approx(57.7635, rel=1e-3)
    assert (found["ahead"] > 0.99).all()
