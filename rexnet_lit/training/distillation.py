"""Knowledge distillation: a fine-tuned model teaches the one that trains (Hinton et al. 2015, arXiv:1503.02531).

Both see the same augmented images, as Beyer et al. (2022, arXiv:2106.05237) found best. Images without a label, whose
target is negative, are learnt from the teacher alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rexnet_lit.data.splits import first_few
from rexnet_lit.models import checkpoint, rexnet
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.models.weights import load_trained
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import check_range, settings_of


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """A fine-tuned model of the same classes, from whose probabilities a smaller one learns beside the labels.

    Args:
        path: Its ``.ckpt`` or ``.safetensors`` file; none by default.
        temperature: Divides the logits of both: above 1 the less likely classes count more.
        weight: The teacher's share in the loss of an image with a label; of one without, it is all.
    """

    path: str | None = None
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_range("model.teacher.temperature", self.temperature, "(0, inf)")
        check_range("model.teacher.weight", self.weight, "(0, 1]")


class Teacher:
    """The teacher: no module of the one that trains, so that neither checkpoints nor optimisers contain it.

    Args:
        settings: Its file, and how it teaches.

    Raises:
        UserError: The file is missing, damaged or unsafe, or its network is not a ReXNet.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        path = cast(str, settings.path)
        model = checkpoint.load_model(path, "model.teacher")
        if model.spec.network is not None:
            raise UserError(f"model.teacher: the network of {path} is a {model.spec.network}; only a ReXNet can teach")
        with torch.random.fork_rng(devices=[]):  # the model that trains starts as it would without a teacher
            network = rexnet.build_network(model.spec.backbone, model.spec.num_classes, model.spec.head)
        load_trained(network, model.state, f"model.teacher: {path}")
        self.spec, self._settings, self._path = model.spec, settings, path
        self._network: Any = rexnet.fuse_batchnorm(network)
        self._digest = checkpoint.digest(model.state, model.spec.to_json())[:12]

    def __str__(self) -> str:
        return (
            f"fingerprint {self._digest}, temperature {self._settings.temperature:g}, weight {self._settings.weight:g}"
        )

    def __deepcopy__(self, memo: Any) -> Teacher:
        """Return the same: it never changes, and an average of the weights copies the module."""
        return self

    def prepare(self, spec: ModelSpec, like: nn.Module | None = None) -> None:
        """Answer in the order of another model's classes, for images in that model's preprocessing.

        Args:
            spec: The model that trains.
            like: Its network, whose memory format to take.

        Raises:
            UserError: It has other classes.
        """
        theirs, ours = self.spec.class_names, spec.class_names
        differences = (("unknown to it", set(ours) - set(theirs)), ("not in the data", set(theirs) - set(ours)))
        if found := [f"{what}: {first_few(sorted(names))}" for what, names in differences if names]:
            raise UserError(f"model.teacher: the classes of {self._path} are not the data's; {'; '.join(found)}")
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(levels).view(3, 1, 1) for levels in (recipe.mean, recipe.std)]
            for recipe in (spec.eval_recipe, self.spec.eval_recipe)
        )
        self._network.scale, self._network.shift = nn.Buffer(std / own_std), nn.Buffer((mean - own_mean) / own_std)
        self._network.order = nn.Buffer(torch.tensor([theirs.index(name) for name in ours]))
        if like is not None:
            last = next(like.parameters()).is_contiguous(memory_format=torch.channels_last)
            self._network.to(memory_format=torch.channels_last if last else torch.contiguous_format)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return its logits (B, K), float32, for images (B, 3, H, W) as `prepare` was told."""
        network = self._network
        if (network.scale.device, network.scale.dtype) != (images.device, images.dtype):
            network.to(images.device, images.dtype)
        prepared = rexnet.match_memory_format(images * network.scale + network.shift, network)
        return cast(Tensor, network(prepared)[:, network.order].float())

    def loss_of(self, of_labels: nn.Module, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss for a batch of images.

        Args:
            of_labels: The loss without a teacher: maps logits and targets to the mean.
            images: (B, 3, H, W).

        Returns:
            What maps logits (B, K) and targets (B,), or (B, K) after MixUp, to the mean. The targets of images without
            a label are negative.
        """
        t, weight = self._settings.temperature, self._settings.weight
        soft = (self.logits(images) / t).softmax(1)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            # Times t * t, so that the size of the gradient does not depend on t.
            losses = functional.kl_div((logits.float() / t).log_softmax(1), soft, reduction="none").sum(1) * t * t
            labelled = (targets if targets.ndim == 1 else targets[:, 0]) >= 0
            total = (losses * torch.where(labelled, weight, 1.0)).sum()
            if labelled.any():
                total = total + (1 - weight) * labelled.sum() * of_labels(logits[labelled], targets[labelled])
            return total / len(logits)

        return loss


def build_teacher(
    settings: TeacherSettings | Mapping[str, Any] | str | None, strategy: StrategySettings, spec: ModelSpec | None
) -> Teacher | None:
    """Return the teacher that ``model.teacher`` names, or None.

    Args:
        settings: As the user gives them.
        strategy: What trains.
        spec: The model that trains, if the names of its classes are known yet.

    Raises:
        UserError: It cannot be used, or not with this strategy, or not for these classes.
    """
    found = settings_of(TeacherSettings, TeacherSettings() if settings is None else settings, "model.teacher")
    if found.path is None:
        if found != TeacherSettings():
            raise UserError("model.teacher has settings, but no path; name a fine-tuned model: --model.teacher MODEL")
        return None
    if strategy.name == "linear_probe":
        raise UserError(
            "model.teacher needs a network that trains, and model.strategy linear_probe trains the head on features; "
            "set the strategy to full"
        )
    teacher = Teacher(found)
    if spec is not None:
        teacher.prepare(spec)
    return teacher
