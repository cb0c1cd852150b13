"""The page of `demo`, over HTTP and in Chromium."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import json
import shutil
import threading

import cv2
import numpy as np
import pytest
from cli_tools import fails, lively_model, write_dataset
from image_tools import encode, photo
from PIL import Image

import rexnet_lit
from rexnet_lit.cli import demo
from rexnet_lit.data import image_file
from rexnet_lit.models.limits import KnownFeatures, Limits
from rexnet_lit.search.similar import build_index

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ("<b>bars</b>", "disc", "ring")  # a hostile name

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def server(tmp_path):
    """A server on a free port, of a model that is never sure and knows no image, and of a folder of three."""
    classifier = rexnet_lit.load(lively_model(tmp_path / "model.safetensors", NAMES, size=32), device="cpu")
    features = classifier.embed(photo())[0]
    basis = np.eye(len(features), 1, dtype=np.float32)
    known = KnownFeatures(features, basis, basis[:1], np.zeros((3, 1), np.float32), residual=1.0, threshold=1e-9)
    limits = Limits(9, np.linspace(0.1, 0.75, 9, dtype=np.float32), 0.95, None, known)
    classifier.spec = dataclasses.replace(classifier.spec, limits=limits)
    index = build_index(write_dataset(tmp_path / "index", train=1), classifier)
    with demo.build_server(classifier, "model.safetensors", "127.0.0.1", 0, index) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    """Return status and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def pixels(uri):
    """The RGB image of a data URI."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_answers_are_those_of_the_model(server, tmp_path):
    turned = Image.Exif()
    turned[0x112] = 6
    file = tmp_path / "photo.jpg"
    file.write_bytes(encode(photo(301, 177), "JPEG", exif=turned))
    status, content = ask(server, "POST", "/predict", file.read_bytes(), X_File_Name="caf%C3%A9%0A.jpg")
    answer = json.loads(content)
    assert (status, answer["name"]) == (200, "café\\n.jpg")
    wanted = server.classifier.predict(file)[0]
    assert [row["label"] for row in answer["classes"]] == [label for label, _ in wanted]
    np.testing.assert_allclose([row["prob"] for row in answer["classes"]], [prob for _, prob in wanted], atol=1e-6)
    view = server.classifier.view(file)
    np.testing.assert_array_equal(pixels(answer["view"]), view)
    heat = server.classifier.explain(file)
    hottest = np.unravel_index(heat.argmax(), heat.shape)
    pale_yellow = (252, 255, 164)  # the end of inferno, https://bids.github.io/colormap/
    assert abs(pixels(answer["heat"])[hottest] - (view[hottest] / 2 + np.array(pale_yellow) / 2)).max() <= 2


def test_limits_and_similar_images(server, tmp_path):
    file = tmp_path / "index" / "train" / "disc" / "disc 000.png"
    post = lambda: json.loads(ask(server, "POST", "/predict", file.read_bytes())[1])  # noqa: E731
    answer, classifier = post(), server.classifier
    assert answer["marks"] == ["unsure", "stranger"]
    assert answer["set"] == [label for label, _ in classifier.predict_set(file)[0]]
    assert (answer["similar"][0]["path"], answer["similar"][0]["label"]) == ("train/disc/disc 000.png", "disc")
    assert [row["similarity"] for row in answer["similar"]] == [
        pytest.approx(row.similarity) for row in server.index.nearest(classifier.embed(file)[0], 3)
    ]
    assert (pixels(answer["similar"][0]["image"]) == np.asarray(Image.open(file))).all()
    known = dataclasses.replace(classifier.limits.known, threshold=1e9)
    sure = dataclasses.replace(classifier.limits, confidence=0.0, known=known)
    classifier.spec = dataclasses.replace(classifier.spec, limits=sure)
    assert post()["marks"] == []
    classifier.spec, server.index = dataclasses.replace(classifier.spec, limits=None), None
    assert not {"marks", "set", "similar"} & post().keys()
    assert b"no limits" in ask(server, "GET", "/")[1]


def test_bad_requests(server, monkeypatch):
    post = lambda body, **headers: json.loads(ask(server, "POST", "/predict", body, **headers)[1])["error"]  # noqa: E731
    assert post(b"%PDF-1.7", X_File_Name="a.pdf") == "a.pdf: cannot be read as an image (PDF, which is not supported)"
    assert "cannot be read as an image" in post(b"")
    assert "the limit is 256 MiB" in post(b"", X_File_Size=str(image_file.MAX_BYTES + 1))
    assert "the limit is 256 MiB" in post(b"", Content_Length=str(image_file.MAX_BYTES + 1))
    assert "its size is unknown" in post(b"", Content_Length="many")
    assert ask(server, "GET", "/etc/passwd")[0] == 404
    assert ask(server, "GET", "/", Host="localhost:7860")[0] == 200
    for method in ("GET", "POST"):  # the page of another site, whose name leads to this computer
        assert ask(server, method, "/", Host="evil.example:7860")[0] == 403


def test_addresses(server, tmp_path, capsys):
    model, port = tmp_path / "model.safetensors", server.server_address[1]
    assert f"port {port} (" in fails(capsys, "demo", model, "--port", port)
    assert "--port is 70000" in fails(capsys, "demo", model, "--port", 70000)
    assert "there is no file" in fails(capsys, "demo", tmp_path / "gone.ckpt")
    assert "--index: there is no folder" in fails(capsys, "demo", model, "--index", tmp_path / "gone")
    assert "--host: 'no such host'" in fails(capsys, "demo", model, "--host", "no such host")


def test_ctrl_c_ends_it(tmp_path, capsys, monkeypatch):
    from rexnet_lit.cli import main

    model = lively_model(tmp_path / "model.safetensors", size=32)

    def stop(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Server, "serve_forever", stop)
    assert main.main(["demo", str(model), "--port", "0"]) == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page(server, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encode(photo(60, 40), "PNG"))
    bad.write_bytes(b"no image")
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))  # also what the policy blocks
        page.on("request", lambda r: None if r.url.startswith((address, "data:")) else errors.append(r.url))
        page.goto(address)
        page.locator("#file").set_input_files(good)
        page.locator("#answer h2", has_text="good.png").wait_for()
        assert page.locator("#heat").evaluate("image => image.decode().then(() => image.naturalWidth)") == 32
        rows = [row.split("\t") for row in page.locator("#answer tr").all_inner_texts()]
        wanted = server.classifier.predict(good)[0]
        shown = [(label, f"{100 * prob:.1f}\u00a0%") for label, prob in wanted]
        assert [(row[0], row[-1]) for row in rows] == shown
        assert page.locator("#heat-of").inner_text() == f"The evidence for {wanted[0].label}"
        assert page.locator("#unsure").is_visible()
        assert page.locator("#stranger").is_visible()
        assert page.locator("#set").inner_text() == ", ".join(
            row.label for row in server.classifier.predict_set(good)[0]
        )
        similar = page.locator("#similar figure")
        assert similar.count() == 3
        assert similar.first.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 48
        page.locator("#file").set_input_files(bad)
        page.locator("#error", has_text="bad.png: cannot be read as an image (text, not an image)").wait_for()
        assert not page.locator("#answer").is_visible()
        content = base64.b64encode(good.read_bytes()).decode()
        page.evaluate(  # dropped beside the field
            """content => {
              const data = new DataTransfer(), bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
              data.items.add(new File([bytes], "dropped.png"));
              document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
            }""",
            content,
        )
        page.locator("#answer h2", has_text="dropped.png").wait_for()
        assert errors == []
        browser.close()
