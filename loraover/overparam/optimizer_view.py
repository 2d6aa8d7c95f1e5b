"""The cores as an optimizer sees them: parameters that it holds in the matrices' place, only while it steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.core_group import CoreGroup, is_alike
from loraover.overparam.eigenbases import Followers
from loraover.overparam.optimizers import ELEMENTWISE, LINEAR, PLAIN, SQUARED, converted
from loraover.overparam.sharding import Piece, all_reduced, full, gathered, in_any_process, is_sharded, local, summed
from loraover.overparam.sites import Site


class OptimizerView:
    """The cores in one optimizer.

    Between `enter` and `leave`, the optimizer holds the cores in copies (twins) of the parameter groups of their
    matrices. At other times its parameter groups and its state are those of an ordinary LoRA, and each group of cores
    keeps the state of its cores.
    """

    def __init__(self, optimizer: Optimizer, config: LoraOverConfig) -> None:
        self.optimizer = optimizer
        self.config = config
        self._hosted: list[tuple[int, CoreGroup]] = []  # with the parameter group of the matrices
        self._stacks: list[nn.Parameter] = []  # of experts that all have cores
        self._layout: list[list[int]] = []  # identities of each parameter group's parameters, when last arranged
        self._twins: list[tuple[int, dict[str, Any], dict[str, Any]]] = []  # host's place, twin, and its options before
        self._covered: list[nn.Parameter] = []  # all of whose matrices have cores
        self._is_filling = False

    def check_holds(self, sites: Iterable[Site]) -> None:
        """Raise ConfigError if the optimizer lacks a site, or chooses its own rate where that is to be scaled."""
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        for site in sites:
            identity = id(site.parameter)
            if identity not in rates:
                raise ConfigError(
                    f"the optimizer does not hold {site.name}. Build it, and OverParameterization, after "
                    "get_peft_model and after fully_shard. To freeze a matrix during a run, leave it in the optimizer "
                    "and call requires_grad_(False) on it."
                )
            if rates[identity] is None and self.config.aux_lr_scale != 1:
                raise ConfigError(
                    f"attach: {type(self.optimizer).__name__} chooses its own learning rate, which aux_lr_scale = "
                    f"{self.config.aux_lr_scale} cannot scale; leave it at 1."
                )

    def gradients(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return the gradients (m, n) by name, complete in every process; a site without one is absent."""
        found = {site.name: site.gradient() for site in sites}
        return gathered({name: gradient for name, gradient in found.items() if gradient is not None})

    def state_of(self, site: Site) -> dict[str, Any]:
        """Return the optimizer's state of one matrix, by the optimizer's own keys."""
        return site.state(self.optimizer)

    def carry_moments(self, group: CoreGroup) -> None:
        """Convert the optimizer's state of the group's matrices into a state of their centre cores."""
        for i, site in enumerate(group.sites):
            if carried := _carried(self.state_of(site), group, i):
                group.load_core_state(group.centre, i, carried)
        group.join()

    def arranged(self, groups: Sequence[CoreGroup], followers: Followers) -> list[CoreGroup]:
        """Divide the groups, and their followers, by the parameter groups of their matrices, for the optimizer to see.

        The optimizer's state of parameters that it leaves alone from now on is dropped.
        """
        self._layout = self._present_layout()
        host = self._hosts()
        hosted: list[tuple[int, CoreGroup]] = []
        for group in groups:
            parts: dict[int, list[int]] = {}
            for i, site in enumerate(group.sites):
                parts.setdefault(host[id(site.parameter)], []).append(i)
            divided = [group]
            if len(parts) > 1:
                divided = group.divided(list(parts.values()))
                followers.divide(group, dict(zip(divided, parts.values(), strict=True)))
            hosted += zip(parts, divided, strict=True)
        self._hosted = hosted
        arranged = [group for _, group in hosted]
        sites = [site for group in arranged for site in group.sites]
        taken = Counter(id(site.parameter) for site in sites if site.part is not None)
        whole = [site for site in sites if site.part is None or taken[id(site.parameter)] == site.part.experts]
        self._stacks = [site.parameter for site in whole if site.part is not None and site.part.expert == 0]
        self._covered = list(dict.fromkeys(parameter for site in whole for parameter in site.holders()))
        self.empty_state()
        if type(self.optimizer) not in ELEMENTWISE:
            for group in arranged:
                group.split()
        for index, group in self._hosted:
            if any(self.optimizer.param_groups[index].get(option) for option in ("fused", "capturable")):
                group.move_step_counts()
        return arranged

    def _hosts(self) -> dict[int, int]:
        """Return the number of the parameter group that holds a parameter, by the parameter's identity."""
        return {identity: i for i, identities in enumerate(self._layout) for identity in identities}

    def shown(self) -> list[tuple[int, CoreGroup]]:
        """Return the cores that this step of the optimizer trains, each with the place of its parameter group."""
        return self._hosted

    def ends_step(self) -> bool:
        """Whether this step of the optimizer is the last one of a training step: always, since there is only one."""
        return True

    def is_filled_by_this_step(self) -> bool:
        """Whether the step that begins only fills an empty state, as `torch.distributed.checkpoint` does at a save.

        That step has gradients of zero and the rate 0. The matrices take it, which leaves them as they are; cores must
        not, since it would let their moments decay.
        """
        if self._is_filling:
            return True
        groups = self.optimizer.param_groups
        if self.optimizer.state or any(group["lr"] is None or group["lr"] > 0 for group in groups):
            return False
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        if any(p.grad is None for p in trained):
            return False
        has_gradient = any(bool(local(p.grad).any()) for p in trained)
        return not in_any_process([has_gradient], trained[0].device if is_sharded(trained[0]) else None)[0]

    def is_regrouped(self) -> bool:
        """Whether parameters have changed their groups, or the groups their order, since `arranged`."""
        return self._layout != self._present_layout()

    def _present_layout(self) -> list[list[int]]:
        return [list(map(id, group["params"])) for group in self.optimizer.param_groups]

    def empty_state(self) -> None:
        """Drop the optimizer's state of the parameters that it leaves alone."""
        for parameter in self._covered:
            self.optimizer.state.pop(parameter, None)

    def fill_state(self) -> None:
        """Make the state of parameters left alone: PyTorch loads a distributed checkpoint only where all have one."""
        if not any(group.state for _, group in self._hosted):
            return
        optimizer, left = self.optimizer, set(self._covered) - self.optimizer.state.keys()
        groups = list(optimizer.param_groups)
        gradients = [(p, p.grad) for group in groups for p in group["params"]]
        for parameter, _ in gradients:
            parameter.grad = torch.zeros_like(parameter) if parameter in left else None
        self._is_filling = True
        try:
            optimizer.param_groups[:] = [
                {
                    **group,
                    "params": [p for p in group["params"] if p in left],
                    "lr": None if group["lr"] is None else group["lr"] * 0,  # of the type that the optimizer holds
                }
                for group in groups
            ]
            step: Any = type(optimizer).step
            getattr(step, "__wrapped__", step)(optimizer)  # without hooks and schedulers, which count steps
        finally:
            self._is_filling = False
            optimizer.param_groups[:] = groups
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def clear_shared_gradients(self) -> None:
        """Set to None the gradients of expert stacks whose matrices all have cores; a site clears only its part."""
        for parameter in self._stacks:
            parameter.grad = None

    def enter(self) -> None:
        """Add the cores and their state to the optimizer, in twins of the parameter groups of their matrices."""
        self.leave()
        optimizer = self.optimizer
        twins: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for index, group in self.shown():
            for k in group.trained:
                twins.setdefault((index, k == group.centre), []).extend(group.parameters(k))
            optimizer.state.update(group.state)
        for (index, is_centre), parameters in twins.items():
            options = {k: v for k, v in optimizer.param_groups[index].items() if k not in ("params", "param_names")}
            if not is_centre:
                if self.config.aux_lr_scale != 1:
                    options["lr"] = options["lr"] * self.config.aux_lr_scale
                if "weight_decay" in options and not self.config.decay_auxiliary:
                    options["weight_decay"] = 0.0
            self._twins.append((index, {"params": parameters, **options}, options))
        optimizer.param_groups.extend(twin for _, twin, _ in self._twins)

    def check_written(self) -> None:
        """Raise ConfigError if the step has written into the twins alone, which are made anew for the next step."""
        for index, twin, before in self._twins:
            host = self.optimizer.param_groups[index]
            for key in twin.keys() - {"params", "lr", "weight_decay"}:
                if not any(twin[key] is kept.get(key) or is_alike(twin[key], kept.get(key)) for kept in (before, host)):
                    raise ConfigError(
                        f"{type(self.optimizer).__name__} cannot be used: its step computes {key!r} of a parameter "
                        "group from the group's parameters and keeps it there, where the cores are only during a "
                        "step. Use an optimizer that keeps such values in its state, such as AdamW."
                    )

    def leave(self) -> None:
        """Remove the cores and their state from the optimizer again, if they are there."""
        if not self._twins:
            return
        twins = {id(twin) for _, twin, _ in self._twins}
        self.optimizer.param_groups[:] = [group for group in self.optimizer.param_groups if id(group) not in twins]
        self._twins = []
        for _, group in self._hosted:
            for k in group.trained:
                for parameter in group.parameters(k):
                    if parameter in self.optimizer.state:
                        group.state[parameter] = self.optimizer.state.pop(parameter)


@torch.no_grad()
def _carried(state: Mapping[str, Any], group: CoreGroup, i: int) -> dict[str, Any]:
    """Return the state that a centre core would have, had it been trained with its auxiliary cores from the start.

    The core's gradient is linear in the matrix's, so a mean of gradients is converted exactly. A mean of squared
    gradients is converted as if the gradients of the matrix's elements were independent. The result is empty if the
    matrix's state has something that cannot be converted (8-bit blocks, factors of rows and columns, lists of tensors).
    """
    cores = [group.core(k, i).unsqueeze(0) for k in range(len(group.stacks))]
    carried: dict[str, Any] = {}
    moments: dict[str, Tensor] = {}
    for key, value in state.items():
        whole = full(value) if isinstance(value, Tensor) else value
        if isinstance(whole, PLAIN):
            carried[key] = whole
        elif not isinstance(whole, Tensor):
            return {}
        elif whole.ndim == 0:
            carried[key] = whole.clone()
        elif key in LINEAR | SQUARED and tuple(whole.shape) == group.shape and whole.is_floating_point():
            moments[key] = whole.to(group.dtype).unsqueeze(0)
        else:
            return {}

    def to_centre(moment: Tensor, squared: bool) -> Tensor:
        return group.decomposition.to_centre(cores, moment, *group.shape, squared=squared)[0]

    # Contiguous, as a fused optimizer makes them, which walks through memory.
    return carried | {key: moment.contiguous() for key, moment in converted(moments, to_centre).items()}


class FlatView(OptimizerView):
    """The cores in an optimizer whose parameter groups are a flat parameter each, with pieces of the matrices in it.

    A flat parameter takes every step, and what that makes of matrices which have cores is overwritten by their
    contraction. Every process steps all cores, alike. ZeRO steps one parameter group after another, and with each the
    cores of its matrices.
    """

    def __init__(self, optimizer: Optimizer, config: LoraOverConfig) -> None:
        super().__init__(optimizer, config)
        self._count = len(optimizer.param_groups)
        self._numbers = {id(group["params"][0]): i for i, group in enumerate(optimizer.param_groups) if group["params"]}
        self._groups: dict[int, int] = {}  # by the identity of the matrices' parameters

    def check_holds(self, sites: Iterable[Site]) -> None:
        """Find the sites' parameter groups; raise ConfigError if there are several and all gradients are needed."""
        if self._count > 1 and (self.config.schedule == "dynamic" or not self.config.make_decomposition().trains_all):
            raise ConfigError(
                f"attach: DeepSpeed's ZeRO steps the {self._count} parameter groups of this optimizer one after "
                "another, and a dynamic schedule, or bases that follow gradients, need the gradients of all groups at "
                "once. Give all trained parameters one group (no LoRA+, and weight decay for all or none), or train "
                "with DDP or FSDP2."
            )
        pieces = _pieces(sites)
        if pieces:
            numbers = torch.tensor([piece.group for _, piece in pieces], device=pieces[0][1].values.device)
            numbers = all_reduced(numbers, ReduceOp.MAX)  # a process without a piece does not know its group
            self._groups |= dict(zip((id(site.parameter) for site, _ in pieces), numbers.tolist(), strict=True))

    def gradients(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return the gradients (m, n) of the stepped parameter group by name, summed from all processes' pieces."""
        (place, number), held = self._present(), _pieces(sites)
        gradient = self._flat(place).grad
        here = [(site, piece) for site, piece in held if self._groups[id(site.parameter)] == number]
        return summed({site.name: piece.spread(piece.of(gradient)) for site, piece in here})

    def state_of(self, site: Site) -> dict[str, Any]:
        """Return the optimizer's state of one matrix, by the optimizer's own keys."""
        flat = self._flat(self._present()[0])
        state = self.optimizer.state.get(flat, {})
        ((_, piece),) = _pieces([site])
        moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape}
        return {**state, **summed({key: piece.spread(piece.of(value)) for key, value in moments.items()})}

    def _hosts(self) -> dict[int, int]:
        """Return the number of the parameter group that holds a parameter, by the parameter's identity."""
        return self._groups

    def shown(self) -> list[tuple[int, CoreGroup]]:
        """Return the cores that this step of the optimizer trains, each with the place of its parameter group."""
        place, number = self._present()
        return [(place, group) for index, group in self._hosted if index == number]

    def ends_step(self) -> bool:
        """Whether this step of the optimizer is the last one of a training step."""
        return self._present()[1] == self._count - 1

    def is_regrouped(self) -> bool:
        """Whether parameters have changed their groups: never, ZeRO keeps its own lists."""
        return False

    def is_filled_by_this_step(self) -> bool:
        """Whether the step that begins only fills an empty state: never, ZeRO has filled it before cores are there."""
        return False

    def fill_state(self) -> None:
        """Leave the state as it is: no parameter's is missing."""

    def empty_state(self) -> None:
        """Leave the state as it is: it belongs to other parameters, too."""

    def _present(self) -> tuple[int, int]:
        """Return place and number of the group that is stepped: ZeRO 2 shows no other, ZeRO 3 leaves others empty."""
        place = next(i for i, group in enumerate(self.optimizer.param_groups) if group["params"])
        return place, self._numbers.get(id(self._flat(place)), place)

    def _flat(self, place: int) -> Any:
        parameters: list[nn.Parameter] = self.optimizer.param_groups[place]["params"]
        return parameters[0]


def _pieces(sites: Iterable[Site]) -> list[tuple[Site, Piece]]:
    return [(site, site.piece) for site in sites if site.piece is not None]
