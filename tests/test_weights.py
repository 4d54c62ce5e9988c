"""Weights from files, by name and by download; what must not be loaded is not."""

import argparse
import hashlib
import http.server
import io
import os
import pickle
import re
import threading

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

import torchvision.models
from safetensors.torch import save_file
from torch import nn

from fused_resnet import models
from fused_resnet.models import weights as W
from fused_resnet.models.weights import download, load_weights, read_state_dict


def small(**kwargs):
    return models.cifar_resnet20(**kwargs)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(3)
    return small().state_dict()


def assert_loaded(model, state):
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=["plain", "state_dict", "torchvision_script", "ddp", "compiled_ddp", "old"],
)
def test_weights_of_a_checkpoint(wrap, state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(state), path)
    assert_loaded(small(weights=path), state)
    assert_loaded(models.create_model("cifar_resnet20", weights=str(path)), state)


def test_weights_of_safetensors(state, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file(state, path)
    assert_loaded(small(weights=path), state)


def test_weights_of_the_old_file_format(state, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_loaded(small(weights=path), state)


def test_weights_of_torchvision_files_both_ways(tmp_path):
    theirs, path = torchvision.models.resnet18(num_classes=3), tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    ours = models.resnet18(path, num_classes=3)
    assert_loaded(ours, theirs.state_dict())
    torch.save(ours.state_dict(), path)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    assert not any(key.startswith("fc") for key in models.resnet18(path, features_only=True).state_dict())


def test_weights_with_a_digest(state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert_loaded(small(weights=f"{path}@sha256:{digest.upper()}"), state)
    with pytest.raises(RuntimeError, match=r"expected SHA-256 0000.* it is not loaded"):
        small(weights=f"{path}@sha256:{'0' * 64}")
    with pytest.raises(ValueError, match="64 hexadecimal digits, got '0123'"):
        small(weights=f"{path}@sha256:0123")


class Malicious:
    """Unpickled as usual, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "state_dict"])
@pytest.mark.parametrize("form", ["torch", "old_torch", "pickle"])
def test_weights_malicious_pickle_runs_nothing(form, nested, state, tmp_path):
    path, marker = tmp_path / "checkpoint.pth", tmp_path / "run"
    content = {**state, "conv1.weight": Malicious(str(marker))}
    content = {"state_dict": content} if nested else content
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(pickle.UnpicklingError, match="is not loaded"):
        small(weights=path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, {"a": 1}], ids=str)
def test_weights_without_a_state_dict(content, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="holds no state dict"):
        small(weights=path)


def test_weights_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        small(weights=tmp_path / "none.pth")


def test_weights_of_a_truncated_file(state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        small(weights=path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 7}, r"shape: fc.weight \(10, 64\), expected \(7, 64\).*\n.*num_classes=10, load, .* layer fc"),
        ({"in_channels": 1}, r"shape: conv1.weight \(16, 3, 3, 3\), expected \(16, 1, 3, 3\)\n.*in_channels=3"),
        ({"shortcut": "B"}, r"missing: layer2.0.downsample.0.weight; .* and \d+ more"),
    ],
    ids=["classes", "channels", "keys"],
)
def test_weights_that_do_not_fit(kwargs, message, state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    model = small(**kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        load_weights(model, path)
    assert_loaded(model, before)


def test_weights_with_unexpected_keys(state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({**state, "head.weight": torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match=r"does not fit CIFARResNet:\n  unexpected: head.weight"):
        small(weights=path)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch):
    """What would be downloaded, as (url, digest)."""
    asked = []

    def record(url, sha256, **_):
        asked.append((url, sha256))
        raise ConnectionError

    monkeypatch.setattr(W, "download", record)
    return asked


@pytest.mark.parametrize(
    ("weights", "file"),
    [
        ("IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("DEFAULT", "resnet50-11ad3fa6.pth"),
        ("ResNet50_Weights.IMAGENET1K_V1", "resnet50-0676ba61.pth"),
        (torchvision.models.ResNet50_Weights.IMAGENET1K_V1, "resnet50-0676ba61.pth"),
    ],
    ids=str,
)
def test_weights_by_name(weights, file, downloads):
    with pytest.raises(ConnectionError):
        load_weights(nn.Identity(), weights, name="resnet50")
    assert downloads == [(f"https://download.pytorch.org/models/{file}", W.KNOWN_SHA256[file])]


def test_weights_factories_know_their_names(downloads):
    with pytest.raises(ConnectionError):
        models.mobilenet_v2(weights="DEFAULT")
    assert downloads[0][0].endswith("/mobilenet_v2-7ebf99e0.pth")


def test_known_digests_begin_as_torchvision_says():
    published = {
        member.url.rpartition("/")[2]
        for name in models.list_models()
        if name in torchvision.models.list_models()
        for member in torchvision.models.get_model_weights(name)
    }
    assert set(W.KNOWN_SHA256) <= published
    for file, digest in W.KNOWN_SHA256.items():
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert digest.startswith(re.search(r"-([0-9a-f]{8})\.pth$", file).group(1))


def test_weights_without_a_known_digest(monkeypatch, tmp_path, downloads):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    name = "resnext50_32x4d"
    with pytest.raises(ValueError, match=r"full SHA-256 of resnext50_32x4d-7cdf4587.pth is not known.*@sha256:"):
        load_weights(nn.Identity(), "IMAGENET1K_V1", name=name)
    assert not downloads
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnext50_32x4d-7cdf4587.pth").write_bytes(b"abc")
    found = hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(ValueError, match=f"is there already and has {found}: give its path, or that digest"):
        load_weights(nn.Identity(), "IMAGENET1K_V1", name=name)
    with pytest.raises(ConnectionError):
        load_weights(nn.Identity(), f"IMAGENET1K_V1@sha256:{found}", name=name)
    assert downloads[0][1] == found


@pytest.mark.parametrize(
    ("weights", "name", "message"),
    [
        ("IMAGENET1K_V3", "resnet18", "neither a file nor one of ResNet18_Weights: IMAGENET1K_V1, DEFAULT"),
        ("ResNet50_Weights.DEFAULT", "resnet18", "neither a file nor one of ResNet18_Weights"),
        ("DEFAULT", "cifar_resnet20", "cifar_resnet20 has no weights known by name"),
        (3, "resnet18", "weights must be a file's path, a name"),
        ("https://example.org/model.pth", "resnet18", "an unchecked download is never used"),
    ],
    ids=["name", "other_model", "unnamed", "number", "url"],
)
def test_weights_unknown(weights, name, message, downloads):
    with pytest.raises(ValueError, match=message):
        load_weights(nn.Identity(), weights, name=name)
    assert not downloads


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(state):
    """A server on this machine's loopback; `server.url`, `server.digest` and the requests it had."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.path.startswith("/redirect"):
                self.send_response(302)
                self.send_header("Location", f"ftp://127.0.0.1{self.path}")
                return self.end_headers()
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if "short" in self.path else body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.digest = hashlib.sha256(body).hexdigest()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def fetch(url, digest, directory, progress=False):
    return download(url, digest, directory, progress=progress, _schemes=("http",))


def test_download_once(server, state, tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    path = fetch(f"{server.url}/model.pth", server.digest, folder, progress=True)
    assert path == folder / "model.pth"
    assert "model.pth" in capsys.readouterr().err
    assert_loaded(small(weights=path), state)
    assert fetch(f"{server.url}/model.pth", server.digest, folder) == path
    assert server.requests == ["/model.pth"]
    assert os.listdir(folder) == ["model.pth"]
    assert capsys.readouterr().err == ""


def test_download_with_a_wrong_digest_leaves_no_file(server, tmp_path):
    wrong = server.digest[:8] + "0" * 56  # eight right digits are not enough
    with pytest.raises(RuntimeError, match=f"expected SHA-256 {wrong}, got {server.digest}; nothing was kept"):
        fetch(f"{server.url}/model.pth", wrong, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "error"),
    [("short.pth", (RuntimeError, OSError)), ("missing.pth", OSError), ("redirect.pth", ValueError)],
    ids=["truncated", "missing", "redirect"],
)
def test_download_that_fails_leaves_no_file(path, error, server, tmp_path):
    with pytest.raises(error):
        fetch(f"{server.url}/{path}", server.digest, tmp_path)
    assert os.listdir(tmp_path) == []


def test_download_checks_a_file_that_is_there(server, tmp_path):
    (tmp_path / "model.pth").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="it is not loaded; delete it to have it fetched again"):
        fetch(f"{server.url}/model.pth", server.digest, tmp_path)
    assert (tmp_path / "model.pth").read_bytes() == b"something else"
    assert server.requests == []


@pytest.mark.parametrize("name", ["..%2F..%2Fevil.pth", "..%5Cevil.pth", "%2Fetc%2Fevil.pth", "", "evil.py", ".pth"])
def test_download_refuses_file_names(name, server, tmp_path):
    with pytest.raises(ValueError, match="must end in a plain file name"):
        fetch(f"{server.url}/{name}", server.digest, tmp_path / "in")
    assert server.requests == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.pth", "file:///a.pth", "ftp://127.0.0.1/a.pth", "a.pth"])
def test_download_refuses_other_schemes(url, tmp_path):
    with pytest.raises(ValueError, match="downloaded over https only"):
        download(url, "0" * 64, tmp_path)


def test_read_state_dict_gives_plain_tensors(state, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": small().state_dict()}, path)
    found = read_state_dict(path)
    assert type(found) is dict
    assert list(found) == list(state)
