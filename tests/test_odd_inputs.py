"""Bad inputs lead to a message or a quarantine row, never to a traceback."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from crysdistill import files
from crysdistill.cli import main
from crysdistill.corpus.build import build
from crysdistill.demo.run import DemoSize, _pretraining
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.sources import open_source
from crysdistill.store.store import Store
from crysdistill.terminal import print_anything
from crysdistill.training.inference import embed, predict
from crysdistill.training.inputs import find_inputs
from crysdistill.training.pretrained import load_pretrained
from crysdistill.training.runs import RunDirectory
from tests.conftest import random_crystal
from tests.forks import run
from tests.toy_stores import labelled, simple_cif, write_store


def cif() -> str:
    return simple_cif("x", random_crystal(5, atoms=3))


def refused(path: Path) -> dict[str, str]:
    """Return, by id, why a source refuses entries before anything is parsed."""
    return {r.material_id: r.problem for r in open_source(path).records() if r.problem}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "cifs"
    path.mkdir()
    (path / "good.cif").write_text(cif())
    return path


# ----------------------------------------------------------------------- links, pipes


def test_links_that_lead_nowhere_or_in_a_circle(folder):
    (folder / "dead.cif").symlink_to("gone.cif")
    (folder / "self.cif").symlink_to("self.cif")
    (folder / "here").symlink_to(".")  # its files are read in any case
    (folder / "up").symlink_to("..")
    (folder / "lost").symlink_to("no/such/folder")
    assert refused(folder) == {
        "dead": "dead.cif: a link to nothing (gone.cif); mend or remove it",
        "self": "self.cif: cannot be read (Too many levels of symbolic links); mend or "
        "remove it",
        "lost": "lost: a link to nothing (no/such/folder); mend or remove it",
        "up": "up: a link to a folder above it; remove it",
    }
    report = build(
        [folder], folder.parent / "s.h5", progress=False, workers=1, symmetry=None
    )
    assert (report.read, report.built) == (5, 1)


def test_links_to_folders_elsewhere_are_followed(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "linked.cif").write_text(cif())
    (folder / "more").symlink_to(other)
    (other / "back").symlink_to(folder)
    assert [r.material_id for r in open_source(folder).records()] == ["good", "linked"]


def test_named_pipes_do_not_hang(folder, tmp_path):
    os.mkfifo(folder / "pipe.cif")
    assert refused(folder) == {"pipe": "pipe.cif: a named pipe; mend or remove it"}
    os.mkfifo(tmp_path / "p.json")
    message = r"p\.json: a named pipe; give a file or a folder"
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "p.json")
    os.mkfifo(folder / "id_prop.csv")
    with pytest.raises(InputError, match=r"id_prop\.csv: a named pipe; mend"):
        open_source(folder)
    (tmp_path / "s.jsonl").write_text("{}")
    os.mkfifo(tmp_path / "properties.csv")
    with pytest.raises(InputError, match=r"properties\.csv: a named pipe; mend"):
        open_source(tmp_path / "s.jsonl")


@pytest.mark.parametrize("name", ["dead.cif", "dead.json", "self.json"])
def test_a_dead_link_as_a_source(tmp_path, name):
    (tmp_path / name).symlink_to("self.json" if "self" in name else "gone")
    with pytest.raises(
        InputError, match=rf"{name}: (a link to nothing|cannot be read)"
    ):
        open_source(tmp_path / name)


# ------------------------------------------------------------------------------- zips


def zipped(path: Path, names: list[str], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, cif())
    return path


def spoiled(path: Path, offsets: tuple[int, int], value: int, first: bool) -> Path:
    """Change a field of two bytes in the headers of a zip, or of its first file."""
    data = bytearray(path.read_bytes())
    for mark, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), offsets, strict=True):
        at = data.find(mark)
        while at >= 0:
            data[at + offset : at + offset + 2] = value.to_bytes(2, "little")
            at = -1 if first else data.find(mark, at + 4)
    path.write_bytes(data)
    return path


FLAGS, METHOD = (6, 8), (8, 10)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (FLAGS, 1, "it needs a password; unpack the zip and give the folder"),
        (METHOD, 99, "it is packed by method 99, which Python cannot unpack; unpack"),
        (METHOD, 98, "it is packed by method 98, which Python cannot unpack; unpack"),
    ],
)
@pytest.mark.parametrize("suffix", ["cif", "xyz"])
def test_zips_that_cannot_be_unpacked(tmp_path, capsys, field, value, said, suffix):
    path = zipped(tmp_path / "a.zip", [f"a.{suffix}", f"b.{suffix}"])
    spoiled(path, field, value, first=False)
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: a.{suffix}: {said}")
    assert main(["build", str(path), "-o", str(tmp_path / "s.h5")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_zip_of_which_one_file_has_a_password(tmp_path):
    path = spoiled(zipped(tmp_path / "a.zip", ["a.cif", "b.cif"]), FLAGS, 1, first=True)
    assert list(refused(path)) == ["a"]
    assert "a.cif: it needs a password" in refused(path)["a"]


def test_paths_in_zips(tmp_path):
    """No path is skipped, and none leaves the folder."""
    names = ["../up.cif", "./here.cif", "/top.cif", "win\\dows.cif", "../../POSCAR.cif"]
    path = zipped(tmp_path / "a.zip", names)
    ids = sorted(r.material_id for r in open_source(path).records())
    assert ids == ["POSCAR", "dows", "here", "top", "up"] or len(ids) == 5
    assert not (tmp_path.parent / "up.cif").exists()


# ------------------------------------------------------------ files that are not stores


@pytest.mark.parametrize("name", ["cifs", "s.jsonl", "two words.json", "x.cif"])
def test_a_source_in_the_place_of_a_store(folder, tmp_path, name):
    path = tmp_path / name
    if name != "cifs":
        path.write_text("{}")
    stem = name.split(".")[0]
    out = f"'{stem}.h5'" if " " in stem else f"{stem}.h5"
    with pytest.raises(InputError) as caught:
        Store.open(path)
    shown = f"'{path}'" if " " in str(path) else str(path)
    assert str(caught.value) == (
        f"{path}: not a store; build it first: `crysdistill build {shown} -o {out}`"
    )


def test_an_empty_or_foreign_store(tmp_path):
    (tmp_path / "a.h5").write_text("")
    with pytest.raises(
        InputError, match=r"not a readable store .no HDF5 file: damaged"
    ):
        Store.open(tmp_path / "a.h5")
    (tmp_path / "w.safetensors").write_text("")
    with pytest.raises(InputError, match=r"not a store; give the `\.h5` that `build`"):
        Store.open(tmp_path / "w.safetensors")


# ------------------------------------------------------------------ predict and embed


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An untrained predictor."""
    from crysdistill.encoders import CGCNN
    from crysdistill.transfer.heads import PropertyHead
    from crysdistill.transfer.outputs import Outputs
    from crysdistill.transfer.predictor import Predictor
    from crysdistill.transfer.targets import Normalizer, Target
    from crysdistill.transfer.weights import save_weights

    predictor = Predictor(
        CGCNN(width=8, convolutions=1),
        PropertyHead(8, 8, 1),
        Outputs([Target("gap [eV]", "[eV]")], [Normalizer(0.0, 1.0)]),
        GraphSettings(cutoff=5.0, max_neighbors=6),
    )
    return save_weights(tmp_path_factory.mktemp("w") / "w.safetensors", predictor)


QUICK = {"accelerator": "cpu", "workers": 1, "progress": False}


@pytest.mark.parametrize("suffix", ["csv", "embed.csv", "parquet", "h5", "safetensors"])
def test_a_full_disk_leaves_an_earlier_result(
    weights, folder, tmp_path, monkeypatch, suffix
):
    infer = predict if suffix == "csv" else embed
    out = tmp_path / f"out.{suffix}"
    infer(weights, [folder], out, **QUICK)
    before = out.read_bytes()
    (folder / "bad.cif").write_text("")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    monkeypatch.setattr("crysdistill.corpus.shards.whole", writes)
    monkeypatch.setattr("crysdistill.corpus.merge.whole", writes)
    monkeypatch.setattr("crysdistill.corpus.build.whole", writes)
    monkeypatch.setattr("crysdistill.corpus.build.write_whole", write)
    for name in (out, tmp_path / f"new.{suffix}"):
        message = f"{name}: No space left on device; nothing is written and an earlier"
        with pytest.raises(InputError, match=message):
            infer(weights, [folder], name, **QUICK)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifs", f"out.{suffix}"]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class writes:  # noqa: N801 - stands for a function
    """Like `files.whole` on a disk that has room."""

    def __init__(self, path: Path, own: bool = False) -> None:
        self.path = path

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error) -> None:
        pass


@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_everything_refused_exits_with_2(weights, tmp_path, capsys, verb):
    (tmp_path / "bad.cif").write_text("")
    out = tmp_path / "out.csv"
    line = [verb, str(weights), str(tmp_path / "bad.cif"), "-o", str(out)]
    assert main([*line, "--no-progress", "--accelerator", "cpu"]) == 2
    table = tmp_path / "out.csv.quarantine.csv"
    assert capsys.readouterr().err == (
        f"error: none of 1 entries became a crystal; {table} says why\n"
    )
    assert not out.exists()
    assert "empty file" in table.read_text()


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_048, 2_048))


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_a_real_limit_of_file_sizes(weights, folder, tmp_path, verb):
    """The whole command, where no file may be larger than 2,048 bytes."""
    out = tmp_path / "out.csv"
    out.write_text("an earlier result")
    store = write_store(tmp_path / "s.h5", labelled(200))
    line = [verb, weights, store, "-o", out, "--no-progress", "--accelerator", "cpu"]
    done = run(*line, prepare=small_files)
    if "temporary" in done.stderr or "TMPDIR" in done.stderr:
        return  # building the graph had no room
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {out}: File too large; nothing is written")
    assert out.read_text() == "an earlier result"


# -------------------------------------------------------------------------- terminals


@pytest.mark.parametrize("encoding", ["gbk", "cp932", "euc-kr", "cp1251", "ascii"])
def test_terminals_that_lack_characters(encoding):
    line = [sys.executable, "-m", "crysdistill", "build", "--help"]
    done = subprocess.run(
        line,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    text = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "longest allowed edge in A" in text or "longest allowed edge in Å" in text


def test_characters_near_those_that_are_lacking():
    print_anything()
    text = "5 Å³, µ × 2 – é … 中\udcff"
    assert text.encode("ascii", "crysdistill.nearest") == (
        rb"5 A3, u x 2 - e ... ?\xff"
    )


def test_names_are_no_markup(weights, folder, tmp_path, capsys):
    """Brackets and colons stay plain text in what every run prints at its end."""
    run = RunDirectory(tmp_path / "a[/b]:smile:", "seed: 0\n")
    print_anything()
    run.print_tree()
    assert "a[/b]:smile:" in capsys.readouterr().out.replace("\n", "")


# ---------------------------------------------------- resumed runs, compared by content


def test_a_run_goes_on_with_its_dataset_named_another_way(tmp_path, monkeypatch):
    store = write_store(tmp_path / "data" / "base.h5", labelled(5))
    monkeypatch.chdir(tmp_path)
    begun = "dataset: {}\nexclude:\n- {}\nseed: 0\nout: run\n"
    RunDirectory("run", begun.format("data/base.h5", "data/base.h5"))
    # The name of a label is not a path, even if a folder has that name.
    named = {"dataset": "data/base.h5", "target.name": "data", "seed": "0"}
    assert set(find_inputs(named)) == {"dataset"}
    RunDirectory("run", begun.format(store.absolute(), "data/base.h5"), resume=True)
    store.parent.rename("moved")
    RunDirectory("run", begun.format("moved/base.h5", "moved/base.h5"), resume=True)
    other = write_store(tmp_path / "other.h5", labelled(6))
    with pytest.raises(InputError, match=r"dataset: data/base.h5 -> other.h5; exclude"):
        RunDirectory("run", begun.format(other.name, other.name), resume=True)
    other.replace("moved/base.h5")
    RunDirectory("new", begun.format("moved/base.h5", "moved/base.h5"))
    Path("moved/base.h5").unlink()
    write_store(tmp_path / "moved" / "base.h5", labelled(7))
    message = "dataset: moved/base.h5 has changed since the run began"
    with pytest.raises(InputError, match=message):
        RunDirectory("new", begun.format("moved/base.h5", "moved/base.h5"), resume=True)


# -------------------------------------------------------------- graphs, and the demo


def test_weights_of_another_graph_come_with_the_command(weights, tmp_path):
    """The suggested command runs unchanged and builds the right graph."""
    other = GraphSettings(cutoff=4.0, mode="radius")
    store = write_store(tmp_path / "two words.h5", labelled(3), other)
    with pytest.raises(InputError) as caught:
        load_pretrained(weights, Store.open(store))
    said, _, command = str(caught.value).partition("; build that again with `")
    assert said == (
        f"{weights} learned on another graph (`shells` within 5 Å, 6 neighbours) than "
        f"{store} holds (`radius` within 4 Å)"
    )
    words = shlex.split(command.rstrip("`"))
    assert words[0] == "crysdistill"
    assert main([*words[1:], "--no-progress", "--workers", "1"]) == 0
    load_pretrained(weights, Store.open(tmp_path / "two words-shells.h5"))


def test_an_interrupted_demo_goes_on_with_its_pretraining(tmp_path):
    assert not _pretraining(tmp_path, DemoSize()).resume
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "config.yaml").write_text("")
    config = _pretraining(tmp_path, DemoSize())
    assert (config.resume, config.overwrite) == (True, False)


# ---------------------------------------------------------------------- field reports


def test_field_report_of_a_zip_with_a_password(shared_data):
    path = shared_data / "field_reports" / "encrypted.zip"
    with pytest.raises(InputError, match=r"0012\.cif: it needs a password; unpack"):
        open_source(path)


def test_field_report_of_a_source_that_builds_nothing(shared_data, tmp_path, capsys):
    source = shared_data / "field_reports" / "nothing_built.cif"
    out = tmp_path / "s.h5"
    assert main(["build", str(source), "-o", str(out), "--no-progress"]) == 2
    assert "none of 1 entries became a crystal" in capsys.readouterr().err
    assert not out.exists()


def test_field_report_of_brackets_in_a_header(shared_data, tmp_path, capsys):
    source = shared_data / "field_reports" / "brackets_in_header"
    out = tmp_path / "s.h5"
    line = ["build", str(source), "-o", str(out), "--no-progress", "--workers", "1"]
    assert main(line) == 0
    assert main(line) == 0  # over a finished store
    assert "s.h5: nothing to do; same sources, settings and content" in (
        capsys.readouterr().out
    )
    words = ["train", f"dataset={out}", "target.name=n [/cm3]", "target.unit=[/cm3]"]
    words += [f"out={tmp_path}/a[/b]", "encoder.width=8", "encoder.convolutions=1"]
    assert main([*words, "trainer.epochs=1", "trainer.progress=false"]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "train: n [/cm3] from 40 crystals" in said
    assert "a[/b]" in said


def test_a_changed_ensemble_is_noticed(tmp_path, monkeypatch):
    """Also beside a teacher that has no file."""
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        Path(f"members/{number}").mkdir(parents=True)
        Path(f"members/{number}/weights.safetensors").write_text(f"{number}")
    alone = {"teacher": "ensemble:members"}
    listed = {"objectives.teacher.teachers": ["chgnet", "ensemble:members"]}
    before = find_inputs(alone), find_inputs(listed)
    assert before[1]["objectives.teacher.teachers"][0] == "chgnet"
    assert (find_inputs(alone), find_inputs(listed)) == before
    assert find_inputs({"teacher": "ensemble:members/*"}) == before[0]
    Path("members/2").mkdir()
    Path("members/2/weights.safetensors").write_text("2")
    after = find_inputs(alone), find_inputs(listed)
    assert after[0] != before[0]
    assert after[1] != before[1]
    assert find_inputs({"teacher": "chgnet"}) == {}
    assert find_inputs({"teacher": "ensemble:nothing"}) == {}
