"""Weights pushed to and pulled from a hub: card, checksum, and failures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from crysdistill.cli import main
from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.transfer import hub
from crysdistill.transfer.hub import pull, push
from crysdistill.transfer.weights import Provenance, load_encoder, save_weights

GRAPH = GraphSettings(6.0, 8)


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    encoder = make_encoder("cgcnn", GRAPH, width=8, convolutions=2)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"bank_radial_r2": 0.75, "n": 3}))
    source = Provenance(
        corpus="c0ffee", licence="CC-BY-4.0", origin="runs/pretrain: clean of d.h5"
    )
    return save_weights(folder / "weights.safetensors", encoder, GRAPH, source)


def test_there_and_back(weights, tmp_path, capsys):
    place = tmp_path / "shared" / "small"
    assert main(["push", str(weights), str(place)]) == 0
    assert capsys.readouterr().out.strip() == f"published: {place}/weights.safetensors"
    out = tmp_path / "pulled.safetensors"
    assert main(["pull", str(place), "-o", str(out)]) == 0
    assert out.read_bytes() == weights.read_bytes()
    assert load_encoder(out).width == 8
    checksum = (place / "weights.sha256").read_text()
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert checksum == f"{digest}  weights.safetensors\n"  # as `sha256sum -c` reads it


def test_the_card_says_what_the_file_says(weights, tmp_path):
    push(weights, str(tmp_path / "place"))
    card = (tmp_path / "place" / "README.md").read_text()
    encoder = load_encoder(weights)
    count = sum(tensor.numel() for tensor in encoder.state_dict().values())
    for line in (
        "license: cc-by-4.0",
        "# cgcnn: a pretrained encoder",
        f"- kind: encoder, {count:,} numbers",
        "- graph: shells, 6 Å, 8 neighbours",
        "- from: runs/pretrain: clean of d.h5",
        "- corpus: c0ffee",
        "- overlap with test sets: unknown",
        "- licence: CC-BY-4.0",
        "| bank_radial_r2 | 0.75 |",
    ):
        assert line in card, card
    assert "| n |" not in card


def test_pushing_twice(weights, tmp_path):
    place = str(tmp_path / "place")
    assert push(weights, place) == push(weights, place)
    torch.manual_seed(1)
    other = make_encoder("cgcnn", GRAPH, width=8, convolutions=2)
    save_weights(weights, other, GRAPH)
    with pytest.raises(InputError, match="holds other weights; give another folder"):
        push(weights, place)


def test_a_file_that_is_cut_short(weights, tmp_path):
    place, out = tmp_path / "place", tmp_path / "out.safetensors"
    push(weights, str(place))
    whole = (place / "weights.safetensors").read_bytes()
    (place / "weights.safetensors").write_bytes(whole[:-100])
    text = f"is not what was published \\({len(whole) - 100:,} bytes"
    with pytest.raises(InputError, match=text):
        pull(str(place), out)
    assert not out.exists()


def test_nothing_to_pull(weights, tmp_path):
    with pytest.raises(InputError, match=r"holds no weights.safetensors; nothing was"):
        pull(str(tmp_path), tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="no such folder; create it first"):
        pull(str(tmp_path), tmp_path / "absent" / "out.safetensors")
    with pytest.raises(InputError, match="no such file"):
        push(tmp_path / "absent.safetensors", str(tmp_path / "place"))
    assert not (tmp_path / "place").exists()


class Hub:
    """A fake Hugging Face client whose server is a folder."""

    def __init__(self, folder: Path) -> None:
        import huggingface_hub.errors

        self.folder, self.errors = folder, huggingface_hub.errors

    def HfApi(self):  # noqa: N802 - the client's name
        return self

    def create_repo(self, name, exist_ok):
        assert exist_ok
        (self.folder / name).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id, folder_path):
        for path in Path(folder_path).iterdir():
            (self.folder / repo_id / path.name).write_bytes(path.read_bytes())

    def hf_hub_download(self, name, file):
        path = self.folder / name / file
        if not path.exists():
            raise OSError(f"no {file} at {name}\nand more lines")
        return str(path)


def test_hugging_face(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_client", lambda: Hub(tmp_path / "server"))
    assert push(weights, "hf:me/small") == "https://huggingface.co/me/small"
    out = pull("hf:me/small", tmp_path / "out.safetensors")
    assert out.read_bytes() == weights.read_bytes()
    with pytest.raises(InputError) as refusal:
        pull("hf:me/absent", out)
    said = "hf:me/absent: OSError: no weights.safetensors at me/absent and more lines"
    assert str(refusal.value) == said


def test_the_real_client_is_asked_for_what_it_has():
    import inspect

    client = hub._client()
    api = inspect.signature(client.HfApi.upload_folder).parameters
    assert {"repo_id", "folder_path"} <= set(api)
    assert "exist_ok" in inspect.signature(client.HfApi.create_repo).parameters
    names = list(inspect.signature(client.hf_hub_download).parameters)
    assert names[:2] == ["repo_id", "filename"]
    for error in ("HfHubHTTPError", "HFValidationError"):
        assert issubclass(getattr(client.errors, error), Exception)


def test_without_the_client(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"`pip install crysdistill\[hf\]`"):
        pull("hf:me/small", tmp_path / "out.safetensors")
