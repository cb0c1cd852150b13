"""What both HTML pages are made with: templates, thumbnails and images inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from rexnet_lit.report.tables import percent
from rexnet_lit.utils.errors import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]

THUMBNAIL = 160  # pixels of the longer side
SMALL = 64  # up to this size an image is enlarged without smoothing, and stored without loss


def render_page(template: str, view: Mapping[str, Any]) -> str:
    """Fill one of this folder's templates; every string in ``view`` is made printable and escaped."""
    import jinja2

    # StrictUndefined: a misspelt name in a template fails a test instead of leaving a gap in the page.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rexnet_lit.report", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = percent
    return environment.get_template(template).render(view)


def thumbnail(read_image: Callable[[str], Image], path: str) -> Image:
    """Read an image and shrink it to at most 160 pixels a side; an unreadable one becomes a grey square."""
    try:
        small = PIL.Image.fromarray(read_image(path))
    except Exception:  # whatever a reader raises, the rest of the report is still worth having
        return np.full((THUMBNAIL, THUMBNAIL, 3), 160, np.uint8)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)


def data_uri(data: bytes, kind: str = "png") -> str:
    """Return an image file as a URI that an HTML page can hold."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def gallery_entry(image: Image, path: str) -> dict[str, Any]:
    """Return what the templates' gallery shows of an image: small ones as PNG, photographs as JPEG (a fifth)."""
    small, file = max(image.shape) <= SMALL, io.BytesIO()
    kind = "png" if small else "jpeg"
    PIL.Image.fromarray(image).save(file, kind, quality=90)
    return {"image": data_uri(file.getvalue(), kind), "pixelated": small, "path": path}
