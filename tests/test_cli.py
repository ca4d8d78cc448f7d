"""The command: its verbs, its one-line errors, its exit codes."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crysdistill import __version__
from crysdistill.cli import VERBS, main
from crysdistill.command import Verb, run
from crysdistill.configured import configured
from crysdistill.errors import InputError

PROMISED = {
    "build": "a b.cif -o store.h5",
    "pretrain": "config.yaml a=1 b.c=2",
    "fetch": "optimade:http://localhost:5000?filter=nsites=2 -o a.jsonl.gz --limit 5",
    "train": "config.yaml a=1 b.c=2",
    "distill": "config.yaml a=1 b.c=2",
    "finetune": "config.yaml a=1 b.c=2",
    "fit": "config.yaml a=1 b.c=2",
    "predict": "weights a b.cif -o predictions.csv",
    "embed": "weights a b.cif -o embeddings.parquet",
    "push": "weights.safetensors folder",
    "pull": "folder -o weights.safetensors",
    "import-cgcnn": "published.pth.tar -o weights",
    "demo": "--out folder",
    "overlap": "corpus.h5 dataset.h5 -o pairs.csv",
    "inspect": "store.h5 -o store.html",
    "split": "dataset.h5 -o split.csv --by element --elements F,Cl --train 0.8",
    "study": "config.yaml a=1 b.c=2",
    "report": "study -o report.html",
}


def refusal(capsys, *argv: str) -> str:
    """Return the one line with which a command line is refused."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def verb(body: Callable[[Namespace], None], resume: str = "") -> dict[str, Verb]:
    def arguments(parser):
        parser.add_argument("rest", nargs="*")

    return {"do": Verb("Do.", "do it", arguments, body, computes=False, resume=resume)}


def raising(error: BaseException) -> Callable[[Namespace], None]:
    def body(args):
        raise error

    return body


def command(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "crysdistill", *argv],
        text=True, timeout=120, check=False, **options,
    )  # fmt: skip


class TestCommandLines:
    @pytest.mark.parametrize(("name", "line"), PROMISED.items())
    def test_promised_ones_are_understood(self, name, line):
        VERBS[name].parser(name).parse(line.split())

    def test_every_verb_is_promised(self):
        assert set(VERBS) == set(PROMISED)

    @pytest.mark.parametrize("name", VERBS)
    def test_help_has_an_example_that_is_understood(self, name, capsys):
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        start, chosen, *rest = VERBS[name].example.split()
        assert (start, chosen) == ("crysdistill", name)
        assert VERBS[name].example in shown
        assert VERBS[name].summary in shown
        VERBS[name].parser(name).parse(rest)

    def test_options_may_stand_anywhere(self):
        parser = VERBS["pretrain"].parser("pretrain")
        args = parser.parse(["c.yaml", "a=1", "--show", "b=2"])
        assert (args.config, args.overrides, args.show) == (
            "c.yaml",
            ["a=1", "b=2"],
            True,
        )
        args = (
            VERBS["build"].parser("build").parse(["a", "-o", "s.h5", "b", "--cutoff=5"])
        )
        assert args.sources == [Path("a"), Path("b")]
        assert (args.out, args.cutoff) == (Path("s.h5"), 5.0)

    def test_what_is_not_given_is_left_to_the_library(self):
        args = VERBS["build"].parser("build").parse(["a", "-o", "s.h5"])
        assert vars(args) == {"sources": [Path("a")], "out": Path("s.h5")}
        args = VERBS["demo"].parser("demo").parse([])
        assert vars(args) == {}

    def test_a_config_is_not_needed(self):
        args = VERBS["pretrain"].parser("pretrain").parse([])
        assert (args.config, args.overrides) == (None, [])

    def test_the_overview_lists_every_verb(self, capsys):
        for argv in ([], ["--help"], ["-h"]):
            assert main(argv) == 0
            shown = capsys.readouterr().out
            assert all(f"  {name} " in shown for name in VERBS)

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"crysdistill {__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pretran", "unknown verb `pretran`; did you mean `pretrain`?"),
        ("zzz", f"unknown verb `zzz`; choose one of {', '.join(VERBS)}"),
        ("--versoin", "unknown option `--versoin`; did you mean `--version`?"),
        ("-x", "unknown option `-x`; begin with a verb"),
        (
            "build a -o s --cutof 5",
            "unknown option `--cutof`; did you mean `--cutoff`?",
        ),
        (
            "build a --oot=s",
            "unknown option `--oot`; did you mean `--out`?",
        ),
        (
            "build a -x",
            "unknown option `-x`; see `crysdistill build --help`",
        ),
        (
            "pretrain c.yaml --trainer.epochs=5",
            "unknown option `--trainer.epochs`; see `crysdistill pretrain --help`",
        ),
        (
            "build a",
            "the following arguments are required: -o/--out; "
            "see `crysdistill build --help`",
        ),
        (
            "build a -o",
            "`-o/--out` expected one argument; see `crysdistill build --help`",
        ),
        (
            "build a -o s --workers many",
            "`--workers` is 'many' but must be an integer; "
            "see `crysdistill build --help`",
        ),
        (
            "build a -o s --cutoff far",
            "`--cutoff` is 'far' but must be a number; see `crysdistill build --help`",
        ),
        ("inspect a b", "unexpected argument `b`; see `crysdistill inspect --help`"),
        ("build a -o s.h5 --cutoff -1", "`cutoff` is -1.0 but must be positive"),
        (
            "build a -o s.h5 --graph shell",
            "`mode` is 'shell' but must be one of shells, nearest, radius, "
            "cgcnn; "
            "did you mean `shells`?",
        ),
    ],
)
def test_bad_command_lines(capsys, line, message):
    assert refusal(capsys, *line.split()) == message


class TestExitCodes:
    def test_done(self):
        assert run(verb(lambda args: None), ["do"]) == 0

    def test_bad_input(self, capsys):
        assert run(verb(raising(InputError("`x` is 1 but must be 2"))), ["do"]) == 2
        assert capsys.readouterr().err == "error: `x` is 1 but must be 2\n"

    def test_our_fault(self, capsys):
        assert run(verb(raising(KeyError("lost"))), ["do"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback")
        assert lines[-2] == "KeyError: 'lost'"
        assert "please report it" in lines[-1]

    def test_interrupted(self, capsys):
        verbs = verb(raising(KeyboardInterrupt()), resume="the same command goes on")
        assert run(verbs, ["do"]) == 130
        assert capsys.readouterr().err == "interrupted; the same command goes on\n"

    def test_interrupted_inside_lightning(self, capsys):
        def body(args):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)

        assert run(verb(body), ["do"]) == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_exits_of_others_keep_their_code(self):
        assert run(verb(raising(SystemExit(3))), ["do"]) == 3

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (
                PermissionError(errno.EACCES, "Permission denied", "/x"),
                "/x: Permission",
            ),
            (
                OSError(errno.ENOSPC, "No space left on device"),
                "No space left on device",
            ),
            (IsADirectoryError(errno.EISDIR, "Is a directory", "given"), "given: Is a"),
        ],
    )
    def test_what_the_system_refuses_is_no_fault_of_ours(self, capsys, error, text):
        assert run(verb(raising(error)), ["do", "given"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {text}")

    def test_a_file_nobody_named_is_our_fault(self):
        error = FileNotFoundError(errno.ENOENT, "No such file", "/inside")
        assert run(verb(raising(error)), ["do", "given"]) == 1

    def test_a_reader_that_has_gone(self):
        read, write = os.pipe()
        os.close(read)
        done = command("--help", stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert done.returncode == 141
        assert done.stderr == ""


def test_help_does_not_import_torch():
    code = (
        "import sys; from crysdistill.cli import main; main(['--help']); "
        "main(['build', '--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'jsonargparse')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0


def test_the_module_is_the_command():
    done = command("train", "nosuch.yaml", capture_output=True)
    assert done.returncode == 2
    assert done.stderr == "error: nosuch.yaml: no such file\n"


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"),
     ({"GOMP_SPINCOUNT": "10"}, None)],
)  # fmt: skip
def test_waiting_threads_are_calm_unless_told_otherwise(monkeypatch, given, policy):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = []
    run(verb(lambda args: found.append(os.environ.get("OMP_WAIT_POLICY"))), ["do"])
    assert found == [policy]


def test_runs_flush_denormal_numbers():
    import torch

    def body(args):
        found.append((torch.tensor(1e-38) * 1e-3).item())

    found: list[float] = []
    verbs = {"do": Verb("Do.", "do", lambda parser: None, body)}
    try:
        assert run(verbs, ["do"]) == 0
    finally:
        torch.set_flush_denormal(False)
    assert found == [0.0]


@dataclass
class Inner:
    epochs: int = 3


@dataclass
class Config:
    corpus: Path
    trainer: Inner = field(default_factory=Inner)


calls: list[Config] = []


def work(config: Config) -> None:
    calls.append(config)


class TestConfiguredVerbs:
    def do(self, tmp_path, *argv: str) -> int:
        def body(args):
            configured(__name__, "Config", "work", args)

        arguments = VERBS["pretrain"].arguments
        verbs = {"do": Verb("Do.", "do", arguments, body, computes=False)}
        calls.clear()
        return run(verbs, ["do", *argv])

    def test_a_file_and_overrides(self, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text("corpus: a.h5\n")
        assert self.do(tmp_path, str(path), "trainer.epochs=5") == 0
        assert calls == [Config(Path("a.h5"), Inner(5))]

    def test_overrides_alone(self, tmp_path):
        assert self.do(tmp_path, "corpus=a.h5", "trainer.epochs=5") == 0
        assert calls == [Config(Path("a.h5"), Inner(5))]

    def test_nothing(self, tmp_path, capsys):
        assert self.do(tmp_path) == 2
        assert capsys.readouterr().err == (
            "error: `corpus` is missing; give it in the config or as `corpus=...`\n"
        )

    def test_show(self, tmp_path, capsys):
        assert self.do(tmp_path, "corpus=a.h5", "--show") == 0
        assert capsys.readouterr().out == "corpus: a.h5\ntrainer:\n  epochs: 3\n"
        assert calls == []

    def test_keys(self, tmp_path, capsys):
        assert self.do(tmp_path, "--keys") == 0
        lines = [
            line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()
        ]
        assert ["corpus", "(required)", "a path"] in [
            [part.strip() for part in line] for line in lines
        ]
        assert lines[-1][:2] == ["trainer.epochs", "3"]
        assert calls == []


@pytest.mark.parametrize(
    "name", ["pretrain", "train", "distill", "finetune", "fit", "study"]
)
def test_every_run_lists_its_keys(name, capsys):
    assert main([name, "--keys"]) == 0
    shown = capsys.readouterr().out
    assert "trainer.epochs" in shown
    # Weights carry their own architecture.
    assert ("encoder.convolutions" in shown) == (name != "finetune")


CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_command_at_the_top_of_each_config_is_understood(path, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines[0].removeprefix("#")
    if first.endswith("\\"):
        first = first.removesuffix("\\") + lines[1].removeprefix("#")
    start, *argv = shlex.split(first)
    assert start == "crysdistill"
    assert argv[1] == f"configs/{path.name}"
    assert main([*argv, "--show"]) == 0
    assert f"out: runs/{path.stem}\n" in capsys.readouterr().out
