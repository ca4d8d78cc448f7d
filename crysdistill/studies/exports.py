"""The tables and figures of a report as files: CSV, Markdown, LaTeX and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from crysdistill.studies.canvas import alone
from crysdistill.studies.exhibits import Exhibit, Section

_LIST = "contents.csv"


def export_folder(page: Path) -> Path:
    """Return the folder of the files of a page: `report/` beside `report.html`.

    Args:
        page: the HTML file.
    """
    name = page.stem if page.stem == "report" else f"{page.stem}-report"
    return page.with_name(name)


def export(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write every table and figure, and `contents.csv`; return the files.

    Files that an earlier call wrote and this one does not are removed.

    Args:
        sections: those of the report.
        folder: where to write; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    for section in sections:
        for exhibit in section.exhibits:
            name = _free(exhibit.name, ".csv", written)
            for suffix, text in _tables(exhibit).items():
                (folder / f"{name}{suffix}").write_text(text, encoding="utf-8")
                written[f"{name}{suffix}"] = exhibit.caption
        for picture in section.pictures:
            name = f"{_free(picture.name, '.svg', written)}.svg"
            (folder / name).write_text(alone(picture.svg), encoding="utf-8")
            written[name] = section.title
    _remove_old(folder, set(written))
    listed = pd.DataFrame(written.items(), columns=["file", "shows"])
    listed.to_csv(folder / _LIST, index=False)
    return [folder / name for name in written]


def _tables(exhibit: Exhibit) -> dict[str, str]:
    """Return the texts of the files of a table, by suffix."""
    shown = exhibit.shown.map(lambda text: str(text).replace("\u00a0", " "))
    heads = [str(head) for head in shown.columns]
    sides = ["l" if i in exhibit.words else "r" for i in range(len(heads))]
    escaped = shown.map(lambda text: text.replace("|", r"\|"))
    marked = escaped.rename(columns=lambda head: str(head).replace("|", r"\|"))
    return {
        ".csv": exhibit.data.to_csv(index=False),
        ".md": marked.to_markdown(
            index=False,
            disable_numparse=True,
            colalign=[{"l": "left", "r": "right"}[side] for side in sides],
        )
        + "\n",
        ".tex": shown.to_latex(
            index=False,
            escape=True,
            column_format="".join(sides),
            caption=_plain_latex(exhibit.caption),
            label=f"tab:{exhibit.name}",
        ),
    }


def _plain_latex(text: str) -> str:
    """Return text with the signs that LaTeX reads as commands written out."""
    signs = {
        "\\": r"\textbackslash ",
        "{": r"\{",
        "}": r"\}",
        "^": r"\textasciicircum ",
    }
    signs |= {sign: rf"\{sign}" for sign in "&%$#_"}
    signs |= {"~": r"\textasciitilde ", "\u00a0": "~"}
    return "".join(signs.get(sign, sign) for sign in text)


def _free(name: str, suffix: str, taken: dict[str, str]) -> str:
    """Return a stem that no file of the suffix has yet."""
    number, found = 2, name
    while f"{found}{suffix}" in taken:
        found, number = f"{name}-{number}", number + 1
    return found


def _remove_old(folder: Path, kept: set[str]) -> None:
    """Remove what an earlier report left in the folder, and nothing else."""
    listed = folder / _LIST
    if not listed.is_file():
        return
    try:
        names = pd.read_csv(listed, dtype=str)["file"].dropna()
    except (KeyError, ValueError):
        return  # not ours
    for name in names:
        if Path(name).name == name and name not in kept:
            (folder / name).unlink(missing_ok=True)
