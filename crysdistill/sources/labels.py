"""Labels from a table, and joining them to structures."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace

from crysdistill.sources.identity import same_name
from crysdistill.sources.records import Record

ID_PROP = "id_prop.csv"
PROPERTIES = "properties.csv"
ID_COLUMN = "material_id"


@dataclass(frozen=True, slots=True)
class Label:
    """One row of a table.

    Args:
        line: the line of the row.
        values: the known labels by name.
        problem: the reason why its structure goes to quarantine.
    """

    line: int
    values: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class LabelTable:
    """The labels of a source.

    Args:
        name: the name of the file.
        properties: the names of its label columns.
        labels: the first row of each material id.
        strays: ids and reasons of rows that belong to no structure, such as repeats.
        partial: whether an empty cell may mean an unknown value.
        remarks: remarks for the user on how the table is read.
    """

    name: str
    properties: tuple[str, ...]
    labels: dict[str, Label]
    strays: list[tuple[str, str]]
    partial: bool
    remarks: list[str] = field(default_factory=list)

    def join(
        self, records: Iterator[Record], source: str, keep_unlabelled: bool
    ) -> Iterator[Record]:
        """Join records with their labels; a row without a structure becomes a record.

        Args:
            records: records without labels.
            source: the name of the source, for rows without a structure.
            keep_unlabelled: whether a structure without a label is kept.
        """
        seen: set[str] = set()
        for record in records:
            name = same_name(record.material_id)
            seen.add(name)
            label = self.labels.get(name)
            if record.problem is not None:
                yield record
            elif label is None:
                yield record if keep_unlabelled else record.refuse(self._no_row())
            elif label.problem is not None:
                yield record.refuse(label.problem)
            elif label.values or self.partial or keep_unlabelled:
                yield replace(record, properties={**record.properties, **label.values})
            else:
                yield record.refuse(
                    f"no label in {self.name} (line {label.line}); fill it in or build "
                    "with `--keep-unlabelled`"
                )
        bare = {name.lstrip("0"): name for name in seen if name.startswith("0")}
        for material_id, label in self.labels.items():
            if material_id not in seen:
                meant = bare.get(material_id.lstrip("0"))
                mend = (
                    f"but the structure is called `{meant}`; a spreadsheet drops such "
                    "zeros, so write it as text"
                    if meant
                    else "but there is no such structure; add it or remove the row"
                )
                reason = f"in {self.name} (line {label.line}), {mend}"
                yield Record(source, material_id, problem=reason)
        for material_id, reason in self.strays:
            yield Record(source, material_id, problem=reason)

    def orphans(self, known: Container[str]) -> int:
        """Return the number of rows whose structure is not in `known`."""
        return sum(material_id not in known for material_id in self.labels)

    def _no_row(self) -> str:
        empty = " (empty cells mean not known)" if self.partial else ""
        return (
            f"no row in {self.name}; add one{empty} or build with `--keep-unlabelled`"
        )
