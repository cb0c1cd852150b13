"""What all HTML pages are made with: templates, thumbnails and images inside the page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from rexnet_lit.report.tables import percent
from rexnet_lit.utils.errors import printable
from rexnet_lit.utils.files import check_output, csv_cell

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]

THUMBNAIL = 160  # pixels of the longer side
SMALL = 64  # up to this size an image is enlarged without smoothing, and stored without loss


def check_page(path: Path) -> None:
    """Raise `UserError` if ``--report`` names a folder, or a file that is no page of an earlier command."""
    check_output("--report", path, ".html", ".htm", mark=b'name="generator" content="rexnet_lit"')


def render_page(template: str, view: Mapping[str, Any]) -> str:
    """Fill one of this folder's templates; every string in ``view`` is made printable and escaped.

    The browser runs no script but decide.js, whose digest is in the page, and only if ``view["decide"]`` asks for it.
    """
    import jinja2
    import markupsafe

    # StrictUndefined: a misspelt name in a template fails a test instead of leaving a gap in the page.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rexnet_lit.report", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = percent
    script = Path(__file__).with_name("decide.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared = {"script": markupsafe.Markup(script), "script_hash": digest}  # noqa: S704 (our own file)
    return environment.get_template(template).render({"decide": None, **view, **shared})


def decidable(path: str, label: str, reason: str, sha256: str, suggested: str = "") -> dict[str, str]:
    """Return the attributes of an image that decide.js offers to keep, relabel or remove.

    Args:
        path: The image, relative to the dataset's folder.
        label: Its class now.
        reason: Why it is shown.
        sha256: Of its file; what is decided holds only for this content.
        suggested: The class that it may belong to.
    """
    texts = {"path": path, "label": label, "suggested": suggested, "reason": reason, "sha256": sha256}
    return {"class": "item", **{f"data-{name}": csv_cell(text) for name, text in texts.items()}}


def decisions(title: str, classes: Sequence[str], items: Iterable[Mapping[str, str]]) -> dict[str, Any] | None:
    """Return what the pages need for deciding: the classes, and a key for the browser's storage; None without items."""
    rows, names = [dict(item) for item in items], [csv_cell(name) for name in classes]
    key = hashlib.sha256(json.dumps([title, names, rows]).encode()).hexdigest()[:16]
    return {"key": key, "classes": names} if rows else None


def thumbnail(read_image: Callable[[str], Image], path: str, size: int = THUMBNAIL) -> Image:
    """Read an image and shrink it to at most ``size`` pixels a side; an unreadable one becomes a grey square."""
    try:
        small = PIL.Image.fromarray(read_image(path))
    except Exception:  # whatever a reader raises, the rest of the report is still worth having
        return np.full((size, size, 3), 160, np.uint8)
    small.thumbnail((size, size))
    return np.asarray(small)


def draw_heat(view: Image, heat: NDArray[np.float32]) -> Image:
    """Return a view, (S, S, 3), under the colours of a heat map, (S, S) from 0 to 1."""
    import cv2

    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return ((view.astype(np.uint16) + colours) // 2).astype(np.uint8)


def data_uri(data: bytes, kind: str = "png") -> str:
    """Return an image file as a URI that an HTML page can hold."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def gallery_entry(image: Image, path: str) -> dict[str, Any]:
    """Return what the templates' gallery shows of an image: small ones as PNG, photographs as JPEG (a fifth)."""
    small, file = max(image.shape) <= SMALL, io.BytesIO()
    kind = "png" if small else "jpeg"
    PIL.Image.fromarray(image).save(file, kind, quality=90)
    return {"image": data_uri(file.getvalue(), kind), "pixelated": small, "path": path}
