"""The command `crysdistill VERB ...`: the arguments and the function of each verb.

A verb imports its modules when it runs, so that help and errors appear at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crysdistill.arguments import cluster as _cluster
from crysdistill.arguments import integer as _integer
from crysdistill.arguments import names as _names
from crysdistill.arguments import number as _number
from crysdistill.arguments import out as _out
from crysdistill.arguments import sources as _sources
from crysdistill.arguments import split_arguments as _split_arguments
from crysdistill.arguments import work as _work
from crysdistill.command import Parser, Verb, run
from crysdistill.configured import check_config as _check_config
from crysdistill.configured import config_arguments as _config_arguments
from crysdistill.configured import configured as _configured


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return 0 (done), 2 (bad input), 130 (Ctrl-C) or 1 (our fault)."""
    return run(VERBS, sys.argv[1:] if argv is None else argv)


def _fetch_arguments(parser: Parser) -> None:
    add = parser.add_argument
    text = "a database and a query, such as `optimade:mp?filter=nelements=2`"
    add("spec", metavar="SPEC", help=text)
    text = "the `.jsonl.gz` to write; FILE.origin.json beside it names its origin"
    _out(parser, "FILE", text)
    add("--limit", type=_integer, help="stop after this many entries")
    add("--overwrite", action="store_true", help="replace a file of that name")
    add("--no-progress", dest="progress", action="store_false", help="show no bar")


def _fetch(args: argparse.Namespace) -> None:
    from crysdistill.sources.snapshot import fetch, is_fetched, read_origin

    given = vars(args)
    asked = (given["spec"], given["out"], given.get("limit"))
    done_before = not given.get("overwrite") and is_fetched(*asked)
    path = fetch(**given)
    if done_before:
        print(f"{path}: nothing to do; fetched before by the same query")
    found = read_origin(path)
    licence = found.origin.licence or "licence not known, ask its owners"
    print(f"{path}: {found.count:,} entries of {found.origin.name} ({licence})")


def _build_arguments(parser: Parser) -> None:
    _sources(parser)
    _out(parser, "STORE", "the store; STORE.quarantine.csv lists refused crystals")
    add = parser.add_argument
    add("--cutoff", type=_number, help="longest allowed edge in Å")
    add("--max-neighbors", type=_integer, help="nearest neighbours of each atom")
    text = "`shells` (whole), `nearest`, `radius` (all within), `cgcnn` (published)"
    add("--graph", "--mode", dest="mode", metavar="MODE", help=text)
    text = "finds space groups: `fast` (moyopy where it is sure), or `spglib`"
    add("--symmetry", metavar="ENGINE", help=text)
    text = "find no space groups"
    add("--no-symmetry", dest="symmetry", action="store_const", const=None, help=text)
    add("--max-atoms", type=_integer, help="refuse crystals with more atoms")
    add("--max-volume", type=_number, help="refuse more than this many Å³ per atom")
    text = "refuse crystals with two atoms closer than this many Å"
    add("--min-distance", type=_number, help=text)
    text = "symbols such as `Si,O`: refuse crystals with any other element"
    add("--elements", type=_names, metavar="SYMBOLS", help=text)
    text = "symbols: refuse crystals with one of these elements"
    add("--without", type=_names, metavar="SYMBOLS", help=text)
    text = "keep structures that have no label when others have one"
    add("--keep-unlabelled", action="store_true", help=text)
    add("--overwrite", action="store_true", help="replace a store of that name")
    text = "licence of your files that do not name one, such as `CC-BY-4.0`"
    add("--licence", metavar="SPDX", help=text)
    text = "refuse a crystal that is the same as an earlier one"
    add("--no-duplicates", dest="duplicates", action="store_false", help=text)
    text = "leave out crystals that this store or source also holds; repeatable"
    add("--exclude", action="append", type=Path, metavar="DATASET", help=text)
    text = "kinds of pairs that exclude a crystal; default `id,structure`"
    add("--exclude-kinds", type=_names, metavar="KINDS", help=text)
    _work(parser)
    _cluster(parser)


def _build(args: argparse.Namespace) -> None:
    from crysdistill.corpus.build import build
    from crysdistill.corpus.filters import Filters
    from crysdistill.errors import InputError
    from crysdistill.graphs.neighbors import GraphSettings

    given = vars(args)
    graph, filters = (
        {name: given.pop(name) for name in names if name in given}
        for names in (
            ("cutoff", "max_neighbors", "mode"),
            ("max_atoms", "max_volume", "min_distance", "elements", "without"),
        )
    )
    report = build(graph=GraphSettings(**graph), filters=Filters(**filters), **given)
    for remark in report.remarks:
        print(remark)
    if not report.built:
        left = f"; {report.store} is as it was" if report.store.exists() else ""
        raise InputError(
            f"none of {report.read:,} entries became a crystal; {report.quarantine} "
            f"says why{left}"
        )
    if report.done_before:
        print(f"{report.store}: nothing to do; same sources, settings and content")
    print(f"{report.store}: {report.built:,} of {report.read:,} crystals")
    if report.rejections:
        refused = len(report.rejections)
        print(f"{report.quarantine}: {refused:,} refused, and why")
        for name, number in report.filtered.items():
            print(f"  {number:,} of them by `{name}`")
    if report.overlap:
        print(f"overlap: {report.overlap}")


def _inspect_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("store", type=Path, metavar="STORE", help="a store")
    text = "also write the findings as a page with pictures"
    add("-o", "--out", type=Path, metavar="HTML", help=text)


def _inspect(args: argparse.Namespace) -> None:
    from crysdistill.corpus.inspection import inspect

    inspection = inspect(args.store)
    inspection.print()
    if "out" in args:
        from crysdistill.studies.store_page import write_page

        print(f"\n{write_page(inspection, args.out)}")


def _overlap_arguments(parser: Parser) -> None:
    add = parser.add_argument
    text = """pretraining crystals: a store, or a source as `build` reads it; or the
    weights that learned from them, which know the formulas"""
    add("corpus", type=Path, metavar="CORPUS", help=text)
    text = "labelled crystals: a store or a source"
    add("dataset", type=Path, metavar="DATASET", help=text)
    text = """the CSV of shared crystals; a JSON file beside it has the counts. With
    weights: the crystals of the dataset that can be in their corpus, if you like"""
    add("-o", "--out", type=Path, metavar="PAIRS", help=text)
    text = "kinds to find: `id,structure,prototype,formula`; all (slow) if absent"
    add("--kinds", type=_names, metavar="KINDS", help=text)
    text = "list at most N pairs of a kind for a dataset entry; count all"
    add("--pairs-per-entry", type=_integer, metavar="N", help=text)
    _work(parser)
    _cluster(parser)


def _overlap(args: argparse.Namespace) -> None:
    from crysdistill.transfer.bounds import compare

    compare(**vars(args))


def _split(args: argparse.Namespace) -> None:
    from crysdistill.splits import SplitSettings
    from crysdistill.splits.written import write_splits

    given = vars(args)
    names = ("dataset", "out", "target", "overwrite")
    rest = {name: given.pop(name) for name in names if name in given}
    write_splits(settings=SplitSettings(**given), **rest).print()


def _study(results: Any) -> None:
    """Show what a study found; exit with 1 if a run failed."""
    from crysdistill.studies.advice import conclude

    if not conclude(results):
        raise SystemExit(1)


def _inference_arguments(parser: Parser, result: str, text: str) -> None:
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="a weights file")
    _sources(parser)
    _out(parser, result, text)
    parser.add_argument("--batch-size", type=_integer, help="crystals in a batch")
    text = "`cpu`, `gpu`, or `auto`, which uses a GPU if there is one"
    parser.add_argument("--accelerator", metavar="WHERE", help=text)
    _work(parser)


def _predict_arguments(parser: Parser) -> None:
    _inference_arguments(parser, "CSV", "the predictions to write")
    text = "add the unit to the column name, as in `gap (eV)`"
    parser.add_argument("--units", action="store_true", help=text)


def _embed_arguments(parser: Parser) -> None:
    text = "the table to write: `.parquet`, `.safetensors`, `.h5`, or `.csv`"
    _inference_arguments(parser, "TABLE", text)
    text = (
        "a vector for each of the `crystals` or `atoms`, or for atoms in all `layers`"
    )
    parser.add_argument("--level", metavar="LEVEL", help=text)


def _inferred(function: str, args: argparse.Namespace) -> None:
    """Predict or embed."""
    from crysdistill.training import inference

    print(getattr(inference, function)(**vars(args)))


def _push_arguments(parser: Parser) -> None:
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="a weights file")
    parser.add_argument("place", metavar="PLACE", help="a folder, or hf:OWNER/NAME")


def _push(args: argparse.Namespace) -> None:
    from crysdistill.transfer.hub import push

    print(f"published: {push(args.weights, args.place)}")


def _pull_arguments(parser: Parser) -> None:
    parser.add_argument("place", metavar="PLACE", help="a folder, or hf:OWNER/NAME")
    _out(parser, "WEIGHTS", "the weights file to write")


def _pull(args: argparse.Namespace) -> None:
    from crysdistill.transfer.hub import pull

    print(pull(args.place, args.out))


def _import_arguments(parser: Parser) -> None:
    parser.add_argument(
        "published", type=Path, metavar="PUBLISHED", help="a `.pth.tar` checkpoint"
    )
    _out(parser, "WEIGHTS", "the weights file to write")


def _import(args: argparse.Namespace) -> None:
    from crysdistill.files import writable
    from crysdistill.training.pretrained import described, options
    from crysdistill.transfer.published import import_cgcnn, published_provenance
    from crysdistill.transfer.weights import save_weights

    out = writable(args.out, [args.published])
    predictor = import_cgcnn(args.published)
    provenance = published_provenance(args.published, predictor)
    print(save_weights(out, predictor, provenance=provenance))
    print(
        f"it reads the graph {described(predictor.graph)}; `predict` and `embed` build "
        "that graph themselves. To fine-tune it, build the dataset with "
        f"`{options(predictor.graph)}`"
    )


def _demo_arguments(parser: Parser) -> None:
    add = parser.add_argument
    text = "the folder to write; `runs/demo` if absent"
    add("-o", "--out", type=Path, metavar="DIR", help=text)
    add("--workers", type=_integer, help="processes; all cores if absent")
    add("--overwrite", action="store_true", help="replace an earlier demo")


def _demo(args: argparse.Namespace) -> None:
    from crysdistill.demo.run import demo

    demo(**vars(args))


def _report_arguments(parser: Parser) -> None:
    add = parser.add_argument
    text = "the folder of a study; several make one report"
    add("studies", type=Path, metavar="DIR", nargs="+", help=text)
    text = "the page to write; `DIR/report.html` if absent. Tables and figures go to "
    text += "`report/` beside it"
    add("-o", "--out", type=Path, metavar="HTML", help=text)
    text = "the arm that the others are compared with; `scratch` if absent"
    add("--reference", metavar="ARM", help=text)
    text = "published predictions, `material_id` and a column for each model: compare "
    text += "crystal by crystal"
    add("--published", type=Path, metavar="CSV", help=text)


def _report(args: argparse.Namespace) -> None:
    from crysdistill.studies.collect import report_study

    given = vars(args)
    print(report_study(given.pop("studies"), **given))


_GO_ON = "the same command with `resume=true` goes on"

VERBS: dict[str, Verb] = {
    "fetch": Verb(
        "Download structures from a database.",
        "crysdistill fetch 'optimade:mp?filter=nelements=2' -o mp-binary.jsonl.gz",
        _fetch_arguments,
        _fetch,
        computes=False,
        resume="the same command goes on",
    ),
    "build": Verb(
        "Read crystals and write a store of structures and graphs.",
        "crysdistill build cifs/ -o corpus.h5",
        _build_arguments,
        _build,
        computes=False,
        resume="the same command goes on",
    ),
    "inspect": Verb(
        "Check a store and describe its content.",
        "crysdistill inspect corpus.h5 -o corpus.html",
        _inspect_arguments,
        _inspect,
        computes=False,
    ),
    "overlap": Verb(
        "Find the crystals of a corpus that a dataset also holds.",
        "crysdistill overlap corpus.h5 dataset.h5 -o pairs.csv",
        _overlap_arguments,
        _overlap,
        computes=False,
    ),
    "split": Verb(
        "Write a split of crystals into train, validation and test sets.",
        "crysdistill split dataset.h5 -o split.csv --by formula",
        _split_arguments,
        _split,
        computes=False,
    ),
    "pretrain": Verb(
        "Pretrain an encoder on crystals without labels.",
        "crysdistill pretrain configs/pretrain.yaml corpus=corpus.h5 trainer.epochs=5",
        _config_arguments,
        partial(
            _configured, "crysdistill.training.pretrain", "PretrainConfig", "pretrain"
        ),
        resume=_GO_ON,
        check=_check_config,
    ),
    "train": Verb(
        "Train a predictor on labels alone.",
        "crysdistill train configs/train.yaml dataset=dataset.h5 trainer.epochs=5",
        _config_arguments,
        partial(_configured, "crysdistill.training.train", "TrainConfig", "train"),
        resume=_GO_ON,
        check=_check_config,
    ),
    "distill": Verb(
        "Train a predictor that also learns a teacher's atom embeddings.",
        "crysdistill distill configs/distill.yaml teacher=pretrained.safetensors",
        _config_arguments,
        partial(
            _configured, "crysdistill.training.distill", "DistillConfig", "distill"
        ),
        resume=_GO_ON,
        check=_check_config,
    ),
    "finetune": Verb(
        "Train a predictor that starts from pretrained weights.",
        "crysdistill finetune configs/finetune.yaml weights=pretrained.safetensors",
        _config_arguments,
        partial(
            _configured, "crysdistill.training.finetune", "FinetuneConfig", "finetune"
        ),
        resume=_GO_ON,
        check=_check_config,
    ),
    "fit": Verb(
        "Try all ways to train a predictor, and keep the best in validation.",
        "crysdistill fit dataset=d.h5 target.name=gap 'weights=[a.safetensors]'",
        _config_arguments,
        partial(_configured, "crysdistill.training.fit", "FitConfig", "fit"),
        resume=_GO_ON,
        check=_check_config,
    ),
    "predict": Verb(
        "Predict a property of crystals.",
        "crysdistill predict predictor.safetensors cifs/ -o predictions.csv",
        _predict_arguments,
        partial(_inferred, "predict"),
    ),
    "embed": Verb(
        "Write an encoder's embeddings as a table, which can also serve as a teacher.",
        "crysdistill embed pretrained.safetensors cifs/ -o embeddings.parquet",
        _embed_arguments,
        partial(_inferred, "embed"),
    ),
    "import-cgcnn": Verb(
        "Turn a checkpoint of the published CGCNN code into a weights file.",
        "crysdistill import-cgcnn band-gap.pth.tar -o band-gap.safetensors",
        _import_arguments,
        _import,
    ),
    "push": Verb(
        "Publish weights with a card and a checksum: in a folder, or on Hugging Face.",
        "crysdistill push runs/pretrain/weights.safetensors hf:OWNER/NAME",
        _push_arguments,
        _push,
    ),
    "pull": Verb(
        "Fetch published weights, and verify them.",
        "crysdistill pull hf:OWNER/NAME -o pretrained.safetensors",
        _pull_arguments,
        _pull,
    ),
    "demo": Verb(
        "Run every step on crystals that the package makes itself.",
        "crysdistill demo --out runs/demo",
        _demo_arguments,
        _demo,
        resume="the same command goes on",
    ),
    "study": Verb(
        "Compare ways of using pretrained weights: arms, labels, seeds, any setting.",
        "crysdistill study configs/study.yaml weights=w.safetensors 'axes.seed=[0,1]'",
        _config_arguments,
        partial(
            _configured,
            "crysdistill.studies.study",
            "StudyConfig",
            "study",
            show=_study,
        ),
        resume="the same command goes on",
        check=_check_config,
    ),
    "report": Verb(
        "Write the report of a study.",
        "crysdistill report runs/study -o report.html",
        _report_arguments,
        _report,
        computes=False,
    ),
}
