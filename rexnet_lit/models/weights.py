"""Loading weights into a network: a state dict, or timm's published weights."""

from __future__ import annotations

import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.models.variants import published_config
from rexnet_lit.utils.errors import MissingFileError, UserError


def matching_rows(source: Sequence[str], target: Sequence[str]) -> dict[int, int]:
    """Map the index of each target class to that of the source class with the same name or synonym.

    Case and punctuation do not matter: ``golden_retriever`` matches "Golden Retriever, ...".
    """

    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", " ", name.casefold()).strip()

    rows = {plain(synonym): row for row, name in reversed([*enumerate(source)]) for synonym in name.split(",")}
    rows |= {plain(name): row for row, name in enumerate(source)}
    return {row: rows[plain(name)] for row, name in enumerate(target) if plain(name) in rows}


def describe_mismatch(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Describe why ``state`` cannot be loaded as ``own``; an empty string if it can."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    other = sorted(k for k in own.keys() & state.keys() if getattr(state[k], "shape", None) != own[k].shape)
    if not (missing or unknown or other):
        return ""
    return (
        f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(other)} of another shape "
        f"(such as {', '.join([*missing, *unknown, *other][:3])})"
    )


def load_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    *,
    keep_head: bool = True,
    rows: Mapping[int, int] | None = None,
) -> bool:
    """Load ``state`` into ``network``; a head of another shape is left as it was built.

    Args:
        network: What `build_network` returned.
        state: A timm or rexnet_lit state dict.
        where: The file it came from, for the errors.
        keep_head: Whether to load the head too if it fits.
        rows: The rows to copy from a head that is not loaded (`matching_rows`).

    Returns:
        Whether the head was loaded.

    Raises:
        UserError: The backbone's tensors are missing, unknown or of another shape.
    """
    own = network.state_dict()
    body, given = ({k: v for k, v in s.items() if not k.startswith("head.fc.")} for s in (own, state))
    difference = describe_mismatch(body, given)
    if difference:
        raise UserError(
            f"{where} does not fit this backbone: {difference}; set model.backbone to the file's architecture"
        )
    head = {k: v for k, v in state.items() if k.startswith("head.fc.")}
    own_head = {k: v.shape for k, v in own.items() if k.startswith("head.fc.")}
    fits = keep_head and {k: v.shape for k, v in head.items()} == own_head
    network.load_state_dict({**given, **head} if fits else given, strict=fits)
    if not fits and rows and head.keys() == own_head.keys():  # rows of another kind of head do not fit
        with torch.no_grad():
            last = list(own_head)[-1].rpartition(".")[0]  # of an mlp, the layers before it are copied whole
            for name in own_head:  # these tensors share the network's memory
                if name.rpartition(".")[0] == last:
                    own[name][list(rows)] = head[name][list(rows.values())].to(own[name].dtype)
                else:
                    own[name].copy_(head[name])
    return fits


def check_own_network(spec: ModelSpec, network: nn.Module | None, where: str) -> nn.Module | None:
    """Return the network of the user's own that a model file needs; None for a ReXNet.

    Raises:
        UserError: It is needed and not given, or given and not needed.
    """
    if spec.network is not None and network is None:
        how = "in Python, build one and pass it as network="
        raise UserError(f"{where}: its network is your own ({spec.network}); {how}")
    if spec.network is None and network is not None:
        raise UserError(f"{where}: its network is a {spec.backbone}; leave network= out")
    return network


def load_trained(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load the ``state`` of a model file, head included, into a network that was built from its description.

    Raises:
        UserError: The state does not match the network.
    """
    if not load_weights(network, state, where):
        raise UserError(f"{where}: its head does not match its description; export it again")


def load_pretrained(
    network: nn.Module, backbone: str, *, keep_head: bool = False, rows: Mapping[int, int] | None = None
) -> None:
    """Load timm's published weights from the local hub cache or the hub; for the head see `load_weights`.

    Only ``model.safetensors`` is read, so nothing is unpickled.

    Raises:
        UserError: There are no published weights, or they are neither in the cache nor can be downloaded.
    """
    cfg = published_config(backbone)
    if not cfg.hf_hub_id:
        raise UserError(
            f"model.pretrained: {backbone} has no published weights; "
            "set model.pretrained to false, or choose a variant that `python -m rexnet_lit models` lists with weights"
        )
    file = _hub_file(cfg, backbone)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"model.pretrained: the weights of {backbone} in the local cache are damaged ({error}); "
            f"delete {Path(file).parents[2]} and run again"
        ) from None
    load_weights(network, state, f"the weights of {backbone}", keep_head=keep_head, rows=rows)


def _hub_file(cfg: Any, backbone: str) -> str:
    """Return the local path of a variant's weights; download them if they are not in the cache."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    repository, _, revision = cfg.hf_hub_id.partition("@")
    if repository.endswith("/"):
        repository += f"{cfg.architecture}.{cfg.tag}"
    file = {"repo_id": repository, "filename": "model.safetensors", "revision": revision or None}
    # Not hf_hub_download(local_files_only=True): it sends a request, and waits 3 s without a network.
    cached = try_to_load_from_cache(**file)
    if isinstance(cached, str):
        return cached
    try:
        if not urllib.request.getproxies():  # fail at once, not after half a minute of retries
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
        return str(hf_hub_download(**file))
    except Exception as error:  # the hub's client raises dozens of kinds
        no_network = isinstance(error, OSError) and not getattr(error, "response", None)
        why = "there is no network" if no_network else str(error).strip().partition("\n")[0] or type(error).__name__
        raise MissingFileError(
            f"model.pretrained: the weights of {backbone} are neither in the local cache nor available from "
            f"the hub ({why}); either run once with a network (or copy the cache folder here), or set "
            "model.weights to a local .safetensors file, or model.pretrained to false to train from scratch"
        ) from None
