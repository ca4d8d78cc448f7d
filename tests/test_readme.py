"""The README: its blocks run, and all names in it exist."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch

from crysdistill.cli import VERBS
from crysdistill.demo import demo_sets
from crysdistill.encoders import ENCODERS
from tests.forks import Command
from tests.optimade_server import reference_server, resource
from tests.test_layers import LAYERS, ROOT
from tests.test_published_cgcnn import published_checkpoint

README = (ROOT / "README.md").read_text("utf-8")
PAGES = ("README.md", "CONTRIBUTING.md")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)

# Settings that keep a run small; later overrides win. test_ranks.py tests several
# processes on the command line; here one process runs all commands.
SMALL = ["trainer.epochs=1", "trainer.progress=false", "trainer.devices=1"]
SMALLER = {
    "pretrain": SMALL,
    "train": SMALL,
    "distill": SMALL,
    "finetune": SMALL,
    "fit": SMALL,
    "study": [
        "base.trainer.epochs=1",
        "axes.seed=[0, 1]",
        "controls=[random-teacher, mean]",
        "workers=1",
    ],
}
LABELLED, UNLABELLED, NEW = 40, 50, 10

# One process runs all lines, without a network. The reference server at argv[1] stands
# for the database in the README.
RUN = """
import json, sys
from crysdistill.cli import main
from crysdistill.sources.optimade import DATABASES
DATABASES["oqmd"] = DATABASES["oqmd"]._replace(url=sys.argv[1])
if __name__ == "__main__":  # and not in its worker processes
    for argv in json.loads(sys.argv[2]):
        print("$ crysdistill", *argv, flush=True)
        if code := main(argv):
            sys.exit(f"exit code {code}")
"""


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def commands(block: str) -> list[list[str]]:
    """Return the words of every command in a shell block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_doors(block: str) -> bool:
    return all(words[0] == "make" for words in commands(block))


def run(folder: Path, code: str, *words: str) -> str:
    """Run a script in a folder; return what it prints."""
    script = folder / "block.py"
    script.write_text(code)
    done = Command(*words, script=script).wait(500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def crystals(tmp_path_factory) -> Path:
    """The folders of CIFs that the README names."""
    folder = tmp_path_factory.mktemp("crystals")
    corpus, dataset = demo_sets(
        seed=0, corpus_size=UNLABELLED + NEW, dataset_size=LABELLED
    )
    sets = {
        "my_crystals": dataset,
        "unlabelled": corpus[:UNLABELLED],
        "new": corpus[UNLABELLED:],
    }
    for name, found in sets.items():
        (folder / name).mkdir()
        for crystal in found:
            path = folder / name / f"{crystal.material_id}.cif"
            crystal.to_pymatgen().to(str(path))
    with (folder / "my_crystals" / "id_prop.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            (c.material_id, c.properties["formation_energy"]) for c in dataset
        )
    return folder


def prepared(crystals: Path, folder: Path) -> Path:
    """Return a checkout in which the README's commands work."""
    shutil.copytree(crystals, folder, dirs_exist_ok=True)
    shutil.copytree(ROOT / "configs", folder / "configs")
    checkpoint = folder / "formation-energy-per-atom.pth.tar"
    torch.save(published_checkpoint(), checkpoint)
    return folder


def predictions(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).set_index("material_id")


@pytest.mark.slow
def test_the_shell_blocks_do_what_they_say(crystals, tmp_path):
    pytest.importorskip("optimade.server", reason="needs the extra `dev`")
    folder = prepared(crystals, tmp_path)
    lines = []
    for words in [w for b in blocks("sh") if not is_doors(b) for w in commands(b)]:
        assert words[0] == "crysdistill", f"cannot check `{' '.join(words)}`"
        stops = {"--keys", "--show"} & set(words)
        lines.append(words[1:] + ([] if stops else SMALLER.get(words[1], [])))
    if find_spec("chgnet") is None:  # no part of the extra `dev`, as dftd4 is
        lines = [
            [word.replace("teachers=[chgnet]", "teachers=[dftd4]") for word in argv]
            for argv in lines
        ]
    assert {argv[0] for argv in lines} >= {
        "build", "fetch", "overlap", "split", "pretrain", "distill", "finetune",
        "train", "predict", "embed", "study", "report", "import-cgcnn",
    }  # fmt: skip
    alloys = [crystal.to_pymatgen() for crystal in demo_sets(1, 8, 1)[0]]
    binary = sum(len(alloy.elements) == 2 for alloy in alloys)
    (folder / "server").mkdir()
    served = [resource(f"oqmd-{n}", alloy) for n, alloy in enumerate(alloys)]
    with reference_server(folder / "server", served) as port:
        address = f"http://127.0.0.1:{port}"
        shown = run(folder, RUN, address, json.dumps(lines))
    assert 0 < binary < len(alloys)
    assert f"oqmd.jsonl.gz: {binary} entries of OQMD (CC-BY-4.0)" in shown
    assert f"oqmd.h5: {binary} of {binary} crystals" in shown
    assert f"{UNLABELLED} of {UNLABELLED} crystals" in shown
    assert f"{LABELLED} of {LABELLED} crystals" in shown

    new = {path.stem for path in (folder / "new").iterdir()}
    table = predictions(folder / "predictions.csv")
    assert (set(table.index), list(table.columns)) == (new, ["target"])
    assert table["target"].notna().all()
    assert set(predictions(folder / "published.csv").index) == new
    embeddings = pd.read_parquet(folder / "embeddings.parquet")
    assert set(embeddings["material_id"]) == new
    assert (folder / "overlap.csv").read_text().startswith("corpus_id,dataset_id,kind")
    assert (folder / "runs" / "study" / "report.html").stat().st_size > 10_000

    others = [b for b in blocks("python") if "build(" not in b]
    assert len(others) == 2
    for block in others:
        assert "eV/atom" in run(folder, block)


@pytest.mark.slow
def test_the_long_python_block_does_the_same(crystals, tmp_path):
    folder = prepared(crystals, tmp_path)
    (block,) = [b for b in blocks("python") if "build(" in b]
    small, count = re.subn(r"epochs=\d+", "epochs=1", block)
    assert count == 1
    assert "clean" in run(folder, small)
    for name in ("pretrain", "distill", "finetune", "train"):
        assert (folder / "runs" / name / "weights.safetensors").exists()
    assert len(predictions(folder / "predictions.csv")) == NEW
    assert len(pd.read_parquet(folder / "embeddings.parquet")) == NEW


@pytest.mark.parametrize("page", PAGES)
def test_the_doors_are_in_the_makefile(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    text = (ROOT / page).read_text("utf-8")
    shell = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    named = re.findall(r"`make ([\w-]+)`", text)
    for words in [w for block in shell if is_doors(block) for w in commands(block)]:
        assert words[2:] in ([], ["&&", ".", ".venv/bin/activate"])
        named.append(words[1])
    assert set(named) <= set(targets)
    assert named


def test_every_block_is_run():
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}
    assert README.count("```") == 2 * len(BLOCKS)


def test_the_first_screen_has_the_two_commands():
    assert commands(blocks("sh")[0]) == [["make", "demo"], ["make", "test"]]
    assert README.index("make test") < 1000


def named_in(section: str) -> list[str]:
    """Return the first column of the table of a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w-]+)` \|", text, re.M)


def test_every_verb_is_in_the_table():
    assert sorted(named_in("What each verb does")) == sorted(VERBS)


def test_every_encoder_is_in_the_table_with_its_graphs():
    assert sorted(named_in("Encoders")) == sorted(ENCODERS)
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", README, re.M)
    graphs = dict(rows)
    for name, kind in ENCODERS.items():
        said = graphs[name].strip().replace("as `cgcnn`", graphs["cgcnn"].strip())
        assert said == ", ".join(kind.NEEDS.graphs), name


def test_what_is_where():
    (tree,) = blocks("text")
    paths = [line.split()[0] for line in tree.splitlines()]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    named = [Path(p).stem for p in paths if p.startswith("crysdistill/")]
    assert named == [name for name in LAYERS if name != "__main__"]
    recipes = {p for p in paths if p.startswith(("pretrain/", "finetune/"))}
    assert recipes == {
        str(path.relative_to(ROOT))
        for name in ("pretrain", "finetune")
        for path in (ROOT / name).glob("[!_]*.py")
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)  # code has no links
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), f"{page}: no {target}"
