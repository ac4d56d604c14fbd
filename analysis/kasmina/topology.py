"""What may be pruned in a model: traced on a copy, tried on the copy, and written down as a `Topology`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from kasmina.channels import channel_groups
from kasmina.declare import Declaration
from kasmina.patterns import HEADS, LAYERS, HeadPattern, LayerPattern
from kasmina.trial import Trial
from leyline.ids import canonical_name, parameter_uuid
from leyline.topology import HOST, Declined, Group, Parameter, Topology

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_INTERNAL = ("past_key_values", "hidden_states", "attentions", "cross_attentions")
"""Fields of a model's output that show its inside, not its answer: a masked head still has keys and values."""


def trace_topology(
    model: nn.Module,
    example_inputs: Any,
    *,
    model_id: str,
    heads: Sequence[HeadPattern] | Literal["auto"] = "auto",
    layers: Sequence[LayerPattern] | Literal["auto", "none"] = "auto",
    seeds: Mapping[str, str] | Sequence[str] = (),
    declared_nonzero: Collection[str] = (),
) -> Topology:
    """Find the groups of `model`. The model, its gradients, hooks and mode, and the random state stay as they are.

    `example_inputs`: a tensor, a tuple of positional inputs, or a mapping of keyword inputs; small, but every path of
    the model must be taken. `heads`, `layers`: patterns that declare attention heads and residual branches; by default
    the presets of `kasmina.patterns`. `seeds`: names of modules that are domains of their own (a mapping names these).
    `declared_nonzero`: ids of groups that may be pruned although an activation with f(0) != 0 follows.
    """
    with torch.random.fork_rng(devices=_devices(model)), torch.enable_grad():
        clone = _clone(model)
        forward = _forward(example_inputs)
        parameters = _parameters(clone, model_id, _domains(seeds))
        tied = _tied(clone)
        told = Declaration(clone, tied)
        told.heads(HEADS if heads == "auto" else heads, attention_modules=heads == "auto")
        told.mlps()
        if layers != "none":
            told.layers(LAYERS if layers == "auto" else layers)
        channels, declined = channel_groups(clone, forward, taken=told.taken, tied=tied)
        tried, failed = Trial(clone, forward).check([*told.groups, *channels], declared_nonzero)
    groups, crossing = _within_domains([_canonical(group) for group in tried], parameters)
    order = {name: at for at, name in enumerate(parameters)}
    refused = [d.model_copy(update={"name": _canonical_id(d.name)}) for d in (*told.declined, *declined, *failed)]
    return Topology(
        model_id=model_id,
        parameters=parameters,
        groups=tuple(sorted(groups, key=lambda group: order[group.members[0].parameter])),
        declined=(*refused, *crossing),
    )


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _clone(model: nn.Module) -> nn.Module:
    """A copy in eval mode without wrappers, hooks or gradients, whose parameters all take part in autograd."""
    while (inner := _unwrapped(model)) is not model:
        model = inner
    try:
        clone = copy.deepcopy(model).eval()
    except RuntimeError as error:
        raise ValueError(f"the model cannot be copied for tracing: {error}; detach the tensors it keeps") from error
    for parent in list(clone.modules()):
        for name, child in list(parent.named_children()):
            if (inner := _unwrapped(child)) is not child:
                setattr(parent, name, inner)
    for module in clone.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()  # a tracker's hooks must not see this pass
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    for parameter in clone.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return clone


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return cast(nn.Module, module.module)
    return next((inner for name in _WRAPPERS if isinstance(inner := getattr(module, name, None), nn.Module)), module)


def _forward(inputs: Any) -> Callable[[nn.Module], list[Tensor]]:
    """Run a model on the example inputs and return the tensors of its answer."""

    def forward(model: nn.Module) -> list[Tensor]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        given = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)
        if isinstance(given, Mapping):
            out = model(**given)
        else:
            out = model(*given) if isinstance(given, tuple | list) else model(given)
        if isinstance(out, Mapping):
            out = [value for name, value in out.items() if name not in _INTERNAL]
        return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    return forward


def _domains(seeds: Mapping[str, str] | Sequence[str]) -> Callable[[str], str]:
    """Parameter name -> domain: of the longest seed prefix that fits, else the host."""
    if isinstance(seeds, str):
        raise TypeError(f"seeds={seeds!r} is one string; give a sequence of module names, as in [{seeds!r}]")
    named = dict(seeds) if isinstance(seeds, Mapping) else {prefix: prefix for prefix in seeds}

    def domain(name: str) -> str:
        inside = [prefix for prefix in named if name.startswith(f"{prefix}.") or name == prefix]
        return named[max(inside, key=len)] if inside else HOST

    return domain


def _parameters(model: nn.Module, model_id: str, domain: Callable[[str], str]) -> dict[str, Parameter]:
    """Every parameter once, by its first name; other names of a tied one are its aliases."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors[id(parameter)] = parameter
        names.setdefault(id(parameter), []).append(canonical_name(name))
    found = {}
    for key, (first, *aliases) in names.items():
        shape = tuple(tensors[key].shape)
        found[first] = Parameter(
            uuid=parameter_uuid(first, shape, model_id), shape=shape, domain=domain(first), aliases=tuple(aliases)
        )
    return found


def _tied(model: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _canonical(group: Group) -> Group:
    """The group with canonical names: they differ from the copy's where the model's outermost child is `module`."""
    return group.model_copy(
        update={
            "id": _canonical_id(group.id),
            "members": tuple(m.model_copy(update={"parameter": canonical_name(m.parameter)}) for m in group.members),
            "gates": tuple(canonical_name(f"{gate}.").removesuffix(".") for gate in group.gates),
            "upstream": tuple(canonical_name(name) for name in group.upstream),
        }
    )


def _canonical_id(id_: str) -> str:
    kind, colon, name = id_.rpartition(":")
    return kind + colon + canonical_name(name)


def _within_domains(groups: Sequence[Group], parameters: Mapping[str, Parameter]) -> tuple[list[Group], list[Declined]]:
    """Give every group its domain; one that crosses two is declined: their gradients and budgets are apart."""
    kept, declined = [], []
    for group in groups:
        names = [*(member.parameter for member in group.members), *group.upstream]
        domains = sorted({parameters[name].domain for name in names})
        if len(domains) == 1:
            kept.append(group.model_copy(update={"domain": domains[0]}))
        else:
            reason = f"it crosses the domains {' and '.join(domains)}, whose gradients and budgets are apart"
            declined.append(Declined(name=group.id, kind=group.kind, reason=reason))
    return kept, declined
