"""Loading weights into a network: a state dict, a file, timm's published weights."""

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

from rexnet_lit.models.variants import published_config
from rexnet_lit.utils.errors import UserError


def matching_rows(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Return which of our classes is which of theirs, by name: ``golden_retriever`` is "Golden Retriever, ..."."""

    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", " ", name.casefold()).strip()

    rows = {plain(synonym): row for row, name in reversed([*enumerate(theirs)]) for synonym in name.split(",")}
    rows |= {plain(name): row for row, name in enumerate(theirs)}
    return {row: rows[plain(name)] for row, name in enumerate(ours) if plain(name) in rows}


def describe_mismatch(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Count what keeps ``state`` from being loaded as ``own``; an empty string where nothing does."""
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
    """Copy ``state`` into ``network``; a head of another shape is left as it was built.

    Args:
        network: What `build_network` returned.
        state: A timm or rexnet_lit state dict.
        where: The file it came from, for the errors.
        keep_head: Whether the head is wanted too where it fits.
        rows: Where it is not taken over: which of its rows to take for our classes, ours to theirs (`matching_rows`).

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
    if not fits and rows and head.keys() == own_head.keys():  # of another kind of head no row is of use
        with torch.no_grad():
            last = list(own_head)[-1].rpartition(".")[0]  # of an mlp, the layers before it are kept whole
            for name in own_head:  # these share the network's memory
                if name.rpartition(".")[0] == last:
                    own[name][list(rows)] = head[name][list(rows.values())].to(own[name].dtype)
                else:
                    own[name].copy_(head[name])
    return fits


def load_pretrained(
    network: nn.Module, backbone: str, *, keep_head: bool = False, rows: Mapping[int, int] | None = None
) -> None:
    """Load timm's published weights from the local hub cache, or else from the hub; the head as in `load_weights`.

    Only ``model.safetensors`` is ever read, so nothing is unpickled.

    Raises:
        UserError: The variant has no published weights, or they can be had neither here nor there.
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
    """Return the local path of a variant's weights, downloading them when they are not in the cache."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    repository, _, revision = cfg.hf_hub_id.partition("@")
    if repository.endswith("/"):
        repository += f"{cfg.architecture}.{cfg.tag}"
    wanted = {"repo_id": repository, "filename": "model.safetensors", "revision": revision or None}
    # Not hf_hub_download(local_files_only=True): it asks the hub who we are, and waits 3 s where there is no network.
    cached = try_to_load_from_cache(**wanted)
    if isinstance(cached, str):
        return cached
    try:
        if not urllib.request.getproxies():  # fail at once, not after half a minute of retries
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
        return str(hf_hub_download(**wanted))
    except Exception as error:  # the hub's client raises dozens of kinds; all mean the same to the user
        raise UserError(
            f"model.pretrained: the weights of {backbone} are neither in the local cache nor to be had from the "
            f"hub ({type(error).__name__}); either run once with a network (or copy the cache folder here), or set "
            "model.weights to a local .safetensors file, or model.pretrained to false to train from scratch"
        ) from None
