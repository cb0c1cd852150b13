"""A folder that timm loads by its path, or by its name once it is on a hub: weights, configuration and model card.

timm writes ``config.json``; nothing is uploaded. The card's header is made with huggingface_hub, which timm depends on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from rexnet_lit.export.export import Check, Deployed
from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.report.tables import percent, wilson_interval
from rexnet_lit.utils.errors import UserError, printable


def write(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write ``model.safetensors``, ``config.json`` and ``README.md`` into a new folder, as a `export.Writer`.

    Raises:
        UserError: timm's ReXNets have no such head.
    """
    spec, state = classifier.spec, classifier.network.state_dict()
    if spec.head.name != "linear":
        raise UserError(
            f"export: timm's ReXNets have a linear head, and this model's is {spec.head.name}; "
            "use another --format, such as onnx"
        )
    recipe, card = spec.eval_recipe, _card(spec, _test_results(model, checkpoint.digest(state)))
    pretrained_cfg = {
        "num_classes": spec.num_classes,
        "input_size": (3, recipe.image_size, recipe.image_size),
        "fixed_input_size": False,
        "interpolation": recipe.interpolation,
        "crop_pct": recipe.crop_pct,
        "crop_mode": recipe.crop_mode,
        "mean": recipe.mean,
        "std": recipe.std,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        # Facts about the published weights, which timm would copy.
        **dict.fromkeys(("test_input_size", "test_crop_pct", "tag", "license", "custom_load")),
    }
    config = {"label_names": spec.class_names, "pretrained_cfg": pretrained_cfg}
    arguments = {"global_pool": spec.head.pool}
    timm.models.save_for_hf(classifier.network, str(target), config, arguments, safe_serialization=True)
    checkpoint.save_model(target / "model.safetensors", spec, state)  # with class names and preprocessing
    (target / "README.md").write_text(card, encoding="utf-8")
    return Deployed(classifier, timm.create_model(f"local-dir:{target}", pretrained=True)).check


def _test_results(model: Path, weights: str) -> dict[str, Any]:
    """Return the run's ``report/metrics.json`` if it is about weights of this digest, otherwise an empty dict."""
    run = model.absolute().parent
    report = (run.parent if run.name == "checkpoints" else run) / "report"
    try:
        if (report / "weights.sha256").read_text(encoding="ascii").strip() != weights:
            return {}
        found = dict(json.loads((report / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    return found if found.pop("split", "test") == "test" else {}


def _card(spec: ModelSpec, figures: dict[str, Any]) -> str:
    """Return the model card, with the test results if there are any."""
    import jinja2
    from huggingface_hub import EvalResult, ModelCardData

    measured = (("top1", "accuracy", "Top-1"), ("macro_f1", "f1", "Macro F1"))
    results = [
        EvalResult("image-classification", "imagefolder", "the test split", kind, figures[key], metric_name=title)
        for key, kind, title in measured
        if key in figures
    ]
    name = f"{spec.backbone}, {spec.num_classes} classes"
    header = ModelCardData(
        library_name="timm", pipeline_tag="image-classification", tags=["image-classification", "timm", "rexnet"],
        model_name=name, eval_results=results or None,
    )  # fmt: skip
    count = figures.get("count", 0)
    interval = wilson_interval(round(figures["top1"] * count), count) if count else None
    environment = jinja2.Environment(  # noqa: S701 (Markdown; names are escaped by `_code`)
        loader=jinja2.PackageLoader("rexnet_lit.export", ""), undefined=jinja2.StrictUndefined, trim_blocks=True,
    )  # fmt: skip
    return environment.get_template("model_card.md").render(
        card_data=header.to_yaml(), model_name=name, spec=spec, recipe=spec.eval_recipe, figures=figures, code=_code,
        percent=percent, interval=interval,
    )  # fmt: skip


def _code(name: str) -> str:
    """Return a class name as code, so that neither Markdown nor HTML interprets it."""
    return f"`{printable(name).replace('`', chr(39)).replace('|', '/')}`"
