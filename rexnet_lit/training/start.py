"""What a model starts from: its weights and classes, and whether a checkpoint or a dataset belongs to it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from rexnet_lit.models import checkpoint, variants
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.models.weights import describe_mismatch, load_pretrained, load_weights, matching_rows
from rexnet_lit.utils.errors import MissingFileError, UserError, printable


def from_scratch(weights: str | None, pretrained: bool, own_network: Any) -> bool:
    """Return whether training starts from random weights; an own network has no published ones."""
    return weights is None and not (pretrained and own_network is None)


class StartingWeights:
    """The weights that training starts from, loaded into a network by the constructor.

    If they are missing, `require` raises that later, because a resumed run does not need them.

    Args:
        network: The network; None if it starts from random weights.
        spec: Its description.
        weights: A local file, or None for timm's published weights.
        keep_matching_classes: Whether to copy the head's rows of the classes with the same names.
        keep_copy: Whether weights will be selected between these and the trained ones.
    """

    def __init__(
        self,
        network: nn.Module | None,
        spec: ModelSpec,
        weights: str | None,
        keep_matching_classes: bool,
        *,
        keep_copy: bool,
    ) -> None:
        self._notes: list[str] = []
        self.missing: MissingFileError | None = None
        """Why the network still has random weights."""
        self._keep_copy = keep_copy and spec.head.name == "linear" and network is not None and spec.network is None
        self.state: dict[str, Tensor] | None = None
        """A copy, if weights will be selected between these and the trained ones."""
        if network is None:
            return
        try:
            self._load(network, spec, weights, keep_matching_classes)
        except MissingFileError as error:
            self.missing = error
        if self._keep_copy and self.missing is None:
            self._copy(network)

    @classmethod
    def of_model(cls, network: nn.Module, spec: ModelSpec, *, keep_copy: bool) -> StartingWeights:
        """Return those of a network that holds a trained model's weights."""
        start = cls(None, spec, None, False, keep_copy=False)
        if keep_copy and spec.head.name == "linear" and spec.network is None:
            start._copy(network)
        return start

    def _copy(self, network: nn.Module) -> None:
        self.state = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def _load(self, network: nn.Module, spec: ModelSpec, weights: str | None, keep_matching_classes: bool) -> None:
        if spec.network is not None:
            raise UserError("model.weights is for a ReXNet; load the weights into your own model.network yourself")
        if weights is not None:
            self._notes += _load_file(network, spec, weights, keep_matching_classes)
            return
        rows: dict[int, int] = {}
        if keep_matching_classes:
            same_head = spec.head.shape == HeadSpec().shape
            names = variants.published_names(spec.backbone) if same_head else None
            rows, note = _matching_rows(spec, names, same_head, "the published model")
            self._notes.append(note)
        load_pretrained(network, spec.backbone, rows=rows)

    def require(self, *, resumes: bool) -> None:
        """Print what became of the head, before a new run starts.

        Args:
            resumes: Whether a checkpoint is resumed, which holds the weights.

        Raises:
            UserError: The weights are missing and needed.
        """
        if self.missing is not None and (self._keep_copy or not resumes):
            raise self.missing
        self.missing = None  # a checkpoint has the weights
        notes, self._notes = self._notes, []
        for note in () if resumes else notes:
            rank_zero_only(print)(note, flush=True)

    def settings(self) -> dict[str, str]:
        """Return what identifies these weights, if they decide what ships; the head is solved again."""
        if self.state is None:
            return {}
        backbone = {name: tensor for name, tensor in self.state.items() if not name.startswith("head.fc.")}
        return {"weights": checkpoint.digest(backbone)[:12]}


def _load_file(network: nn.Module, spec: ModelSpec, path: str, keep_matching_classes: bool) -> list[str]:
    """Load a file; return what to say about the head."""
    state, source = checkpoint.load_starting_weights(path)
    if source is not None and source.backbone.partition(".")[0] != spec.backbone.partition(".")[0]:
        raise UserError(f"model.weights: {path} is a {source.backbone}, but model.backbone is {spec.backbone}")
    same_head = source is None or source.head.shape == spec.head.shape
    same_classes = same_head and (source is None or source.class_names == spec.class_names)
    rows: dict[int, int] = {}
    notes = []
    if keep_matching_classes:
        rows, note = _matching_rows(spec, None if source is None else source.class_names, same_head, path)
        notes.append(note)
    kept = load_weights(network, state, f"model.weights: {path}", keep_head=same_classes, rows=rows)
    old = f"{len(state['head.fc.weight'])} classes" if "head.fc.weight" in state else "of another kind"
    head = "with its head" if kept else f"its head ({old}) is replaced by a new one ({spec.num_classes})"
    return [*notes, f"Starting from {path}: {head}."]


def _matching_rows(
    spec: ModelSpec, names: Sequence[str] | None, same_head: bool, source: str
) -> tuple[dict[int, int], str]:
    """Return the rows to copy from the head of ``source``, and what to say about them."""
    if names is None or not same_head:
        why = "has another kind of head" if not same_head else "does not name its classes"
        return {}, f"model.keep_matching_classes: {source} {why}; none is kept."
    rows = matching_rows(names, spec.class_names)
    known = tuple(spec.class_names[row] for row in rows)
    return rows, f"The starting weights know these classes by name ({_short(known)})."


def settings_of_model(spec: ModelSpec, kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which a class of module is built for the weights of a model file.

    Args:
        spec: The model's description.
        kind: `RexNetModule`, or a subclass of the user's.
        settings: Further settings.

    Raises:
        UserError: One of them is fixed by the model, or the class does not take what describes the model.
    """
    recipe = spec.eval_recipe
    own: dict[str, Any] = {"backbone": spec.backbone, "head": spec.head, "class_names": spec.class_names}
    own |= {"image_size": recipe.image_size, "crop_mode": recipe.crop_mode, "pretrained": False}
    fixed = [name for name in (*own, "num_classes", "weights") if name in settings]
    if fixed:
        raise UserError(
            f"load_from_checkpoint: {', '.join(fixed)}: the model file decides this; to train another model from its "
            f"weights, use {kind.__name__}(weights=FILE, ...)"
        )
    taken = inspect.signature(kind).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        missing = [name for name in (*own, *settings) if name not in taken]
        if missing:
            raise UserError(
                f"load_from_checkpoint: the constructor of {kind.__name__} does not take {', '.join(missing)}; let it "
                "take **settings, and pass them on to RexNetModule's"
            )
    return own | dict(settings)


def initial_names(num_classes: int | None, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names, or numbers where there are no names yet."""
    if class_names is None:
        if num_classes is None:
            raise UserError("RexNetModule needs num_classes or class_names: pass the data module's")
        return tuple(str(i) for i in range(num_classes))
    wrong = [name for name in class_names if not isinstance(name, str)]
    if isinstance(class_names, str) or wrong:
        given = repr(class_names) if isinstance(class_names, str) else f"{wrong[0]!r} among them"
        raise UserError(f"class_names: expected a list of texts, got {given}")
    if len({*class_names}) < len(class_names):
        name = next(name for name in class_names if list(class_names).count(name) > 1)
        raise UserError(f"class_names: {name!r} is there twice; each class needs a name of its own")
    if num_classes is not None and num_classes != len(class_names):
        raise UserError(f"num_classes is {num_classes}, but there are {len(class_names)} class_names")
    return tuple(class_names)


def adopt_classes(spec: ModelSpec, names: Sequence[str], numbered: bool) -> ModelSpec:
    """Return ``spec`` with the data's class names, which it takes over only while its classes are numbered.

    Raises:
        UserError: The model has other classes.
    """
    if len(names) != spec.num_classes:
        raise UserError(f"the data has {len(names)} classes, but the model was made for {spec.num_classes}")
    if not numbered:
        raise UserError(
            f"the data's classes ({_short(names)}) are not the model's, in its order "
            f"({_short(spec.class_names)}); to test it, pass class_names=module.spec.class_names to "
            "ImageFolderDataModule; to train it on other classes, pass its file to RexNetModule as weights"
        )
    return dataclasses.replace(spec, class_names=tuple(names))


def check_checkpoint(content: Mapping[str, Any], spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
    """Refuse to resume from the checkpoint of another model.

    Args:
        content: The checkpoint.
        spec: The model that is to be resumed.
        state: The tensors of its module.

    Raises:
        UserError: The architecture, the classes or the tensors differ.
    """
    theirs, _ = checkpoint.read_record(content, "ckpt_path")
    pairs: dict[str, tuple[object, object]] = {
        "network": (theirs.network, spec.network),
        "backbone": (theirs.backbone, spec.backbone),
    }
    pairs |= {f"head.{k}": (v, getattr(spec.head, k)) for k, v in dataclasses.asdict(theirs.head).items()}
    for name, (then, now) in pairs.items():
        if then != now:
            raise UserError(
                f"ckpt_path: the checkpoint's model.{name} is {then}, this run's is {now}; set it to the "
                "checkpoint's, or start a new run with model.weights"
            )
    if theirs.class_names != spec.class_names:
        raise UserError(
            f"ckpt_path: the checkpoint's classes ({_short(theirs.class_names)}) differ from the folder's "
            f"({_short(spec.class_names)}); to start a new run from its weights, use model.weights instead"
        )
    difference = describe_mismatch(_without_loss(state), _without_loss(content.get("state_dict")))
    if difference:
        raise UserError(f"ckpt_path: the checkpoint's weights do not fit: {difference}")


def _without_loss(tensors: Any) -> dict[str, Any]:
    """Leave out a user's own loss, which is not built yet when the command line compares."""
    return {k: v for k, v in tensors.items() if not str(k).startswith("loss.")} if isinstance(tensors, Mapping) else {}


def _short(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(map(printable, names[:5]))}{', ...' if len(names) > 5 else ''}"
