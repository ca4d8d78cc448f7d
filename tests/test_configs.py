"""Configurations: what is read, and the message for each mistake."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

from crysdistill import encoders, objectives
from crysdistill.configs import dump_config, find_config, load_config, read_yaml
from crysdistill.errors import InputError
from crysdistill.schema import Choice, Choices, describe, list_keys, write_value


class Small:
    """An encoder of the tests.

    Args:
        width: of the embeddings.
        cutoff: Å.
        kind: of convolution.
    """

    def __init__(
        self, width: int = 64, cutoff: float = 8.0, kind: Literal["eq4", "eq5"] = "eq5"
    ) -> None: ...


class Large:
    def __init__(self, *, heads: int, width: int = 256, **more: Any) -> None: ...


class Features:
    def __init__(self, encoder_width: int, *, mask_fraction: float = 0.15) -> None: ...


def pairs(encoder_width: int, balance: float = 0.5) -> None: ...


ENCODERS = {"small": Small, "large": Large}
OBJECTIVES = {"node_features": Features, "pairs": pairs}


@dataclass
class Graph:
    cutoff: float = 8.0
    mode: Literal["shells", "nearest", "cgcnn"] = "shells"

    def __post_init__(self) -> None:
        if not self.cutoff > 0:
            raise InputError(f"`cutoff` is {self.cutoff} but must be positive")


@dataclass
class Trainer:
    """How long.

    Args:
        epochs: passes over the
            training crystals.
    """

    epochs: int = 100
    lr: float = 0.01
    patience: int | None = None
    progress: bool = True
    fractions: tuple[float, float] = (0.8, 0.2)


@dataclass
class Shared:
    weight: float = 1.0
    published: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError(f"`weight` is {self.weight} but must not be negative")


def published(name: str, shared: Shared) -> dict[str, Any]:
    return {"mask_fraction": 0.0} if shared.published and name != "pairs" else {}


@dataclass
class Run:
    """A run.

    Args:
        corpus: a store.
    """

    corpus: Path
    out: Path = Path("runs/x")
    note: str = ""
    label: str | None = None
    frozen: int | Literal["all"] | None = None
    exclude: list[Path] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=lambda: {"low": 0.0})
    graph: Graph = field(default_factory=Graph)
    trainer: Trainer = field(default_factory=lambda: Trainer(epochs=20))
    second: Trainer | None = None
    encoder: Annotated[dict[str, Any], Choice(ENCODERS)] = field(
        default_factory=lambda: {"name": "small", "width": 32}
    )
    objectives: Annotated[
        dict[str, Any],
        Choices(OBJECTIVES, ("encoder_width",), Shared, published),
    ] = field(default_factory=lambda: {"node_features": {"weight": 0.25}, "pairs": {}})


@dataclass
class Chosen:
    encoder: Annotated[dict[str, Any], Choice(ENCODERS)]


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, Run)


def refusal(tmp_path: Path, text: str, *overrides: str, schema: type = Run) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path, overrides, schema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_stand_unless_given(tmp_path):
    run = load(tmp_path, "corpus: a.h5\ntrainer: {lr: 1e-3}\n", "graph.mode=nearest")
    assert run.corpus == Path("a.h5")
    assert run.trainer == Trainer(epochs=20, lr=0.001)  # the field's own default
    assert run.graph == Graph(8.0, "nearest")
    assert run.second is None
    assert run.encoder == {"name": "small", "width": 32}
    assert run.objectives == {
        "node_features": {"weight": 0.25, "published": False},
        "pairs": {"weight": 1.0, "published": False},
    }


def test_no_file_is_needed():
    assert load_config(None, ["corpus=a.h5"], Run) == Run(
        Path("a.h5"),
        objectives={
            "node_features": {"weight": 0.25, "published": False},
            "pairs": {"weight": 1.0, "published": False},
        },
    )


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("note", "no", "no"),
        ("note", "007", "007"),
        ("note", "1e-3", "1e-3"),
        ("note", "a: b, [c", "a: b, [c"),
        ("note", "x=y", "x=y"),
        ("note", "", ""),
        ("note", "{id}.cif", "{id}.cif"),
        ("label", "null", None),
        ("label", "nullable", "nullable"),
        ("frozen", "3", 3),
        ("frozen", "all", "all"),
        ("frozen", "null", None),
        ("tags", "[a, no, 1]", ["a", "no", "1"]),
        ("exclude", "[a.h5]", [Path("a.h5")]),
        ("out", "~/runs", Path.home() / "runs"),
        ("exclude", "[~/a.h5]", [Path.home() / "a.h5"]),
        ("limits", "{low: 1e-2, high: 3}", {"low": 0.01, "high": 3.0}),
    ],
)
def test_text_is_read_by_type_on_the_command_line(key, text, value):
    found = getattr(load_config(None, ["corpus=a.h5", f"{key}={text}"], Run), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("epochs", "0x10", 16),
        ("epochs", "1_000", 1000),
        ("lr", "1e-3", 0.001),
        ("lr", "5", 5.0),
        ("lr", ".inf", float("inf")),
        ("patience", "~", None),
        ("patience", "", None),
        ("patience", "7", 7),
        ("progress", "false", False),
        ("progress", "no", False),
        ("fractions", "[0.9, 1e-1]", (0.9, 0.1)),
        ("fractions", "\n  - 0.9\n  - 0.1", (0.9, 0.1)),
    ],
)
def test_text_is_read_by_type_in_a_file(tmp_path, key, text, value):
    indented = text.replace("\n", "\n  ")
    run = load(tmp_path, f"corpus: a\ntrainer:\n  {key}: {indented}\n")
    found = getattr(run.trainer, key)
    assert found == value
    assert type(found) is type(value)


def test_plain_yaml_words_stay_text(tmp_path):
    run = load(
        tmp_path, "corpus: 2024-01-01\nnote: no\ntags: [yes, 1.10, 007, 'null']\n"
    )
    assert run.corpus == Path("2024-01-01")
    assert run.note == "no"
    assert run.tags == ["yes", "1.10", "007", "null"]


def test_later_overrides_count_and_files_give_way(tmp_path):
    run = load(tmp_path, "corpus: a\ntrainer: {epochs: 5, lr: 1}\n", "trainer.epochs=6",
               "trainer.epochs=7")  # fmt: skip
    assert run.trainer == Trainer(epochs=7, lr=1.0)


def test_overrides_make_optional_sections():
    run = load_config(None, ["corpus=a", "second.epochs=3"], Run)
    assert run.second == Trainer(epochs=3)


def test_yaml_anchors_are_not_shared_by_overrides(tmp_path):
    text = "corpus: a\ntrainer: &t {epochs: 5}\nsecond:\n  <<: *t\n  lr: 2\n"
    run = load(tmp_path, text, "trainer.epochs=6")
    assert run.trainer.epochs == 6
    assert run.second == Trainer(epochs=5, lr=2.0)


class TestNamedParts:
    def test_only_what_was_given_is_there(self, tmp_path):
        text = "corpus: a\nencoder: {name: large, heads: '4'}\n"
        assert load(tmp_path, text).encoder == {"name": "large", "heads": 4}

    def test_defaults_hold_for_the_same_name(self):
        run = load_config(None, ["corpus=a", "encoder.cutoff=5"], Run)
        assert run.encoder == {"name": "small", "width": 32, "cutoff": 5.0}

    def test_another_name_drops_the_default_settings(self):
        run = load_config(
            None, ["corpus=a", "encoder.name=large", "encoder.heads=2"], Run
        )
        assert run.encoder == {"name": "large", "heads": 2}

    def test_a_whole_part_on_one_line(self):
        run = load_config(
            None,
            ["corpus=a", "encoder={name: large, heads: 2}", "encoder.width=3"],
            Run,
        )
        assert run.encoder == {"name": "large", "heads": 2, "width": 3}

    def test_a_file_replaces_the_list_of_names(self, tmp_path):
        text = "corpus: a\nobjectives:\n  pairs:\n"
        run = load(tmp_path, text, "objectives.pairs.balance=1")
        own = {"balance": 1.0, "weight": 1.0, "published": False}
        assert run.objectives == {"pairs": own}

    def test_an_override_keeps_the_other_names(self):
        run = load_config(None, ["corpus=a", "objectives.pairs.weight=3"], Run)
        assert set(run.objectives) == {"node_features", "pairs"}
        assert run.objectives["node_features"]["weight"] == 0.25
        assert run.objectives["pairs"]["weight"] == 3.0

    @pytest.mark.parametrize("given", ["true", "{}", "null"])
    def test_names_alone(self, given):
        run = load_config(None, ["corpus=a", f"objectives.node_features={given}"], Run)
        assert run.objectives["node_features"] == {"weight": 1.0, "published": False}

    def test_shared_settings_can_decide_on_others(self):
        flag = "objectives.node_features.published=true"
        run = load_config(None, ["corpus=a", flag], Run)
        found = run.objectives["node_features"]
        assert found == {"weight": 0.25, "published": True, "mask_fraction": 0.0}
        given = "objectives.node_features.mask_fraction=0.1"
        run = load_config(None, ["corpus=a", flag, given], Run)
        assert run.objectives["node_features"]["mask_fraction"] == 0.1

    def test_false_leaves_a_name_out(self, tmp_path):
        text = "corpus: a\nobjectives: {pairs: true, node_features: {}}\n"
        run = load(tmp_path, text, "objectives.pairs=false")
        assert set(run.objectives) == {"node_features"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainr.epochs=5"],
            "unknown key `trainr`; did you mean `trainer`?",
        ),
        (
            ["encoder.cutof=5"],
            "unknown key `encoder.cutof`; did you mean `encoder.cutoff`?",
        ),
        (
            ["trainer.epoch=5"],
            "unknown key `trainer.epoch`; did you mean `trainer.epochs`?",
        ),
        (["epochs=5"], "unknown key `epochs`; did you mean `trainer.epochs`?"),
        (["trainer.mode=5"], "unknown key `trainer.mode`; did you mean `graph.mode`?"),
        (
            ["graph.xyz=5"],
            "unknown key `graph.xyz`; known: cutoff, mode",
        ),
        (
            ["objectives.pair.balance=1"],
            "unknown key `objectives.pair`; did you mean `objectives.pairs`?",
        ),
        (
            ["objectives.pairs.balanc=1"],
            "unknown key `objectives.pairs.balanc`; "
            "did you mean `objectives.pairs.balance`?",
        ),
        (
            ["objectives.pairs.encoder_width=1"],
            "unknown key `objectives.pairs.encoder_width`; "
            "known: weight, published, balance",
        ),
        (["encoder.width=many"], "`encoder.width` is 'many' but must be an integer"),
        (["encoder.width=3.5"], "`encoder.width` is 3.5 but must be an integer"),
        (["encoder.width=true"], "`encoder.width` is true but must be an integer"),
        (["encoder.width="], "`encoder.width` is '' but must be an integer"),
        (["encoder.width=null"], "`encoder.width` is null but must be an integer"),
        (
            ["encoder.width=[1, 2]"],
            "`encoder.width` is '[1, 2]' but must be an integer",
        ),
        (["trainer.lr=fast"], "`trainer.lr` is 'fast' but must be a number"),
        (
            ["trainer.patience=x"],
            "`trainer.patience` is 'x' but must be an integer or null",
        ),
        (
            ["trainer.progress=1"],
            "`trainer.progress` is 1 but must be true or false",
        ),
        (
            ["trainer.fractions=[0.8]"],
            "`trainer.fractions` is '[0.8]' but must be a list of 2 numbers",
        ),
        (["tags=a"], "`tags` is 'a' but must be a list of text"),
        (["frozen=al"], "`frozen` is 'al' but must be an integer or `all` or null"),
        (
            ["limits={a: x}"],
            "`limits` is '{a: x}' but must be a mapping from names to numbers",
        ),
        (["corpus="], "`corpus` is '' but must be a path"),
        (
            ["graph.mode=shell"],
            "`graph.mode` is 'shell' but must be one of shells, nearest, cgcnn; "
            "did you mean `shells`?",
        ),
        (
            ["encoder.name=smal"],
            "`encoder.name` is 'smal' but must be one of small, large; "
            "did you mean `small`?",
        ),
        (
            ["encoder=large"],
            "`encoder` is 'large' but must hold keys; it takes `encoder.name`",
        ),
        (
            ["encoder.name=large"],
            "`encoder.heads` is missing; "
            "give it in the config or as `encoder.heads=...`",
        ),
        (
            ["trainer=5"],
            "`trainer` is 5 but must hold keys; it takes `trainer.epochs`, "
            "`trainer.lr`, `trainer.patience`, `trainer.progress`, `trainer.fractions`",
        ),
        (
            ["note=5", "note.x=1"],
            "`note` is 5, so `note.x` cannot be set",
        ),
        (["graph.cutoff=-1"], "`graph.cutoff` is -1.0 but must be positive"),
        (
            ["objectives.pairs.weight=-1"],
            "`objectives.pairs.weight` is -1.0 but must not be negative",
        ),
        (["epochs"], "'epochs' is not KEY=VALUE"),
        (["=5"], "'=5' is not KEY=VALUE"),
        (["trainer..epochs=5"], "'trainer..epochs=5' is not KEY=VALUE"),
        (["trainer={epochs"], "`trainer`:1: expected ',' or '}', but got"),
    ],
)
def test_each_mistake_is_named(overrides, message):
    with pytest.raises(InputError) as caught:
        load_config(None, ["corpus=a.h5", *overrides], Run)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(message) if message.endswith("got") else text == message


def test_missing_keys():
    with pytest.raises(
        InputError,
        match=r"^`corpus` is missing; give it in the config or as `corpus=\.\.\.`$",
    ):
        load_config(None, [], Run)
    with pytest.raises(InputError, match=r"^`encoder\.name` is missing; give it in "):
        load_config(None, ["encoder.width=3"], Chosen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "run.yaml:3: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", "run.yaml:2: found character '\\t' that cannot start"),
        ("corpus: a\nnote: x: y\n", "run.yaml:2: mapping values are not allowed here"),
        (
            "corpus: a\n\ncorpus: b\n",
            "run.yaml:3: `corpus` is given twice, first in line 1",
        ),
        (
            "corpus: a\ntrainer:\n  lr: 1\n  lr: 2\n",
            "run.yaml:4: `lr` is given twice, first in line 3",
        ),
        (
            "corpus: !!python/name:os.system\n",
            "run.yaml:1: could not determine a constr",
        ),
        ("? [a, b]\n: 1\n", "run.yaml:1: a key is not plain text"),
        ("- corpus\n", "run.yaml must hold keys and values, one `key: value` per line"),
        ("corpus: a\n---\ncorpus: b\n", "run.yaml:2: but found another document"),
        (
            "corpus: a\ntrainer: {fractions: [0.8, x]}\n",
            "`trainer.fractions` is [0.8, 'x'] but must be a list of 2 numbers",
        ),
        (
            "corpus: a\nencoder: {name: [small]}\n",
            "`encoder.name` is ['small'] but must be one of small, large",
        ),
        (
            "corpus: [a]\n",
            "`corpus` is ['a'] but must be a path",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    found = refusal(tmp_path, text)
    assert found.removeprefix(f"{tmp_path}/").startswith(message), found


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "store.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n\xff")
    with pytest.raises(InputError, match=r"store\.h5 is not a text file"):
        read_yaml(path)


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    assert load(tmp_path, "# nothing\n", "corpus=a").corpus == Path("a")


class TestFindConfig:
    def test_the_ending_may_be_left_out(self, tmp_path):
        (tmp_path / "pretrain.yaml").write_text("")
        assert find_config(tmp_path / "pretrain") == tmp_path / "pretrain.yaml"

    def test_a_name_nearby(self, tmp_path):
        (tmp_path / "pretrain.yaml").write_text("")
        for name in ("pretran.yaml", "pretran"):
            with pytest.raises(InputError) as caught:
                find_config(tmp_path / name)
            assert str(caught.value) == (
                f"{tmp_path / name}: no such file; did you mean "
                f"`{tmp_path / 'pretrain.yaml'}`?"
            )

    def test_a_name_in_the_working_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("pretrain.yaml").write_text("")
        message = r"^pretran\.yaml: no such file; did you mean `pretrain\.yaml`\?$"
        with pytest.raises(InputError, match=message):
            find_config("pretran.yaml")

    def test_folders(self, tmp_path):
        with pytest.raises(InputError, match="is a folder but must be a YAML file"):
            find_config(tmp_path)
        with pytest.raises(InputError, match=r"b/c\.yaml: there is no folder .*a/b$"):
            find_config(tmp_path / "a" / "b" / "c.yaml")


def test_a_dumped_config_loads_back(tmp_path):
    text = """
        corpus: ~/a.h5
        note: "1e-3"
        label: 'null'
        frozen: all
        exclude: [b.h5, "c d.h5"]
        tags: ["null", no, "1", "a: b", "", "é Å", "two\\nlines"]
        limits: {low: 1e-9, high: .inf}
        trainer: {lr: 1e-5, fractions: [0.7, 0.3], patience: 3}
        second: {epochs: 2}
        encoder: {name: large, heads: 3}
        objectives: {pairs: {balance: 1}, node_features: true}
    """
    run = load(tmp_path, text)
    dumped = dump_config(run)
    assert "!" not in dumped
    assert load(tmp_path, dumped) == run
    assert dump_config(load(tmp_path, dumped)) == dumped
    assert list(read_yaml(tmp_path / "run.yaml"))[:3] == ["corpus", "out", "note"]


def test_list_keys_tells_types_defaults_and_texts():
    keys = {key.name: key for key in list_keys(Run)}
    assert keys["corpus"] == ("corpus", "a path", None, "a store.", "")
    assert keys["trainer.epochs"] == (
        "trainer.epochs",
        "an integer",
        "20",
        "passes over the training crystals.",
        "",
    )
    assert keys["encoder.name"][1:3] == ("one of small, large", "small")
    assert keys["objectives.pairs.balance"].default == "0.5"
    assert keys["objectives.node_features.weight"][1:3] == ("a number", "0.25")
    assert keys["objectives.pairs.weight"].default == "1.0"
    assert "objectives.pairs.encoder_width" not in keys
    small = next(key for key in list_keys(Run) if key.name == "encoder.width")
    assert small[:4] == ("encoder.width", "an integer", "32", "of the embeddings.")
    assert small.option == "encoder.name=small"


def test_words_for_types():
    assert describe(Literal["a"]) == "`a`"
    assert describe(int | str) == "an integer or text"
    assert describe(tuple[int, ...]) == "a list of integers"
    assert describe(list[int | None]) == "a list of integers or null"
    assert describe(Any) == "a value"


def test_values_are_written_on_one_line():
    assert write_value(Path("a")) == "a"
    assert write_value((1, 2.5)) == "[1, 2.5]"
    assert write_value({"a": None, "b": "x"}) == "{a: null, b: x}"
    assert write_value("null") == "'null'"


@dataclass
class Real:
    encoder: Annotated[dict[str, Any], Choice(encoders.ENCODERS)]
    objectives: Annotated[
        dict[str, Any],
        Choices(objectives.OBJECTIVES, ("encoder_width", "crystal_width"), Shared),
    ]


def test_the_real_tables_fit():
    """The settings of every encoder and objective of the package can be read."""
    names = [f"objectives.{name}=true" for name in objectives.OBJECTIVES]
    names += ["objectives.properties.targets=[{name: gap}]"]
    names += ["objectives.teacher.teachers=[random]"]
    for encoder in encoders.ENCODERS:
        config = load_config(None, [f"encoder.name={encoder}", *names], Real)
        assert set(config.objectives) == set(objectives.OBJECTIVES)
        assert config.encoder == {"name": encoder}
    assert "encoder.convolutions" in [key.name for key in list_keys(Real)]
    foreign = ["encoder.name=schnet", "encoder.heads=3", *names]
    with pytest.raises(InputError, match=r"unknown key `encoder\.heads`; known: width"):
        load_config(None, foreign, Real)
    wrong = ["encoder.name=cgcnn", "encoder.convoluions=5", *names]
    with pytest.raises(InputError, match=r"did you mean `encoder\.convolutions`\?"):
        load_config(None, wrong, Real)


# ---------------------------------------------------------------- lists of sections


@dataclass
class Wish:
    name: str
    weight: float | None = None
    kind: Literal["number", "class"] = "number"

    def __post_init__(self) -> None:
        if self.weight is not None and not self.weight > 0:
            raise InputError(f"`weight` is {self.weight} but must be positive")


@dataclass
class Wishes:
    wishes: list[Wish] = field(default_factory=list)


def test_a_list_of_sections_in_a_file_and_in_a_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("wishes:\n- {name: a, weight: 1e-1}\n- name: b\n  kind: class\n")
    expected = [Wish("a", 0.1), Wish("b", kind="class")]
    assert load_config(path, [], Wishes).wishes == expected
    line = "wishes=[{name: a, weight: 1e-1}, {name: b, kind: class}]"
    assert load_config(None, [line], Wishes).wishes == expected
    assert load_config(None, ["wishes={name: a}"], Wishes).wishes == [Wish("a")]
    assert load_config(None, [], Wishes).wishes == []
    written = tmp_path / "again.yaml"
    written.write_text(dump_config(Wishes(expected)))
    assert load_config(written, [], Wishes).wishes == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "wishes=[{name: a}, {nmae: b}]",
            r"unknown key `wishes\[1\].nmae`; did you mean `wishes\[1\].name`\?",
        ),
        ("wishes=[{weight: 1}]", r"`wishes\[0\].name` is missing"),
        (
            "wishes=3",
            "`wishes` is 3 but must be a list of sections with the keys name, we",
        ),
        (
            "wishes=[{name: a, kind: klass}]",
            r"`wishes\[0\].kind` is 'klass' but must be one of number, class",
        ),
        (
            "wishes=[{name: a, weight: -1}]",
            r"`wishes\[0\].weight` is -1.0 but must be positive",
        ),
    ],
)
def test_mistakes_in_a_list_of_sections_are_placed(given, message):
    with pytest.raises(InputError, match=message):
        load_config(None, [given], Wishes)


class Odd(Small):
    PUBLISHED: ClassVar = {"width": 7, "kind": "eq4"}


@dataclass
class Fashion:
    published: bool = False


def in_fashion(name: str, shared: Fashion) -> dict[str, Any]:
    return Odd.PUBLISHED if shared.published else {}


@dataclass
class Fashionable:
    encoder: Annotated[
        dict[str, Any],
        Choice(
            {"odd": Odd},
            shared=Fashion,
            defaults=in_fashion,
        ),
    ] = field(default_factory=lambda: {"name": "odd"})


def test_published_settings_of_what_is_named():
    given = ["encoder.published=true", "encoder.width=9"]
    found = load_config(None, given, Fashionable).encoder
    assert found == {"name": "odd", "published": True, "width": 9, "kind": "eq4"}
    assert load_config(None, [], Fashionable).encoder == {"name": "odd"}
    keys = {key.name: key.default for key in list_keys(Fashionable)}
    assert keys["encoder.published"] == "false"
