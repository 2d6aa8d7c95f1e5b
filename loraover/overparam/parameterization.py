"""Over-parameterization beside the optimizer.

The model keeps plain LoRA matrices M. Before the optimizer steps, dL/dM is pulled back to the cores,
which are what the optimizer steps; afterwards their contraction is written into M. The cores are in the
optimizer only while it steps: schedulers, gradient clipping, GradScaler, `zero_grad` and `state_dict`
see an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from loraover.common.errors import ConfigError
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.core_group import CoreGroup
from loraover.overparam.importance import Probe
from loraover.overparam.moments import carried_moments
from loraover.overparam.schedule import Schedule
from loraover.overparam.sharding import gathered
from loraover.overparam.sites import Site, base_model_name, find_sites

REFUSED_OPTIMIZERS = {
    "LBFGS": "it keeps its own list of parameters, so it would never step the cores",
    "LayerWiseDummyOptimizer": "it steps inside the backward pass, before gradients can be pulled back",
    "Lomo": "it steps inside the backward pass, before gradients can be pulled back",
    "AdaLomo": "it steps inside the backward pass, before gradients can be pulled back",
    "AdamWScheduleFree": "its train and eval modes swap parameters outside of a step, where the cores are not",
    "SGDScheduleFree": "its train and eval modes swap parameters outside of a step, where the cores are not",
    "RAdamScheduleFree": "its train and eval modes swap parameters outside of a step, where the cores are not",
}


class OverParameterization:
    """Trains chosen LoRA matrices of a PEFT model through the cores of a decomposition.

        over = OverParameterization(model, LoraOverConfig())
        over.attach(optimizer)
        ...                       # an ordinary training loop
        over.finish()               # the model holds a plain LoRA, as it did at every step

    Args:
        model: holds PEFT LoRA layers, on the device where it will train. Wrappers (DDP, torch.compile)
            may be around it.
        config: which matrices, when, and how.
        steps: optimizer steps of the whole run, for a dynamic schedule.
        probe: batches for a schedule that runs the model; their model is this one.
        inject: False leaves every matrix plain until `inject` is called, or a checkpoint restored.

    Raises:
        ConfigError: no LoRA, a LoRA variant that is not B A, a pattern that matches no site, or a schedule that
            does not fit the model or the run.
    Mutates: the chosen matrices are rewritten as the contraction of their cores, which equals them up
        to rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraOverConfig | None = None,
        *,
        steps: int | None = None,
        probe: Probe | None = None,
        inject: bool = True,
    ) -> None:
        self.config = config or LoraOverConfig()
        self.decomposition = self.config.make_decomposition()
        self.base_model = base_model_name(model)
        self.steps = steps
        self.sites: dict[str, Site] = find_sites(model)
        self.schedule = Schedule(self.config, self.sites, steps=steps, probe=probe)
        self.groups: list[CoreGroup] = []
        self.step = 0
        self._is_counted = True
        self.optimizer: Optimizer | None = None
        self.optimizer_class: str | None = None
        self._state: dict[Tensor, dict[str, Any]] = {}
        self._twins: list[tuple[int, bool, list[nn.Parameter]]] = []
        self._plain_groups: int | None = None
        self._handles: list[Any] = []
        if inject and self.config.schedule != "dynamic":
            self.schedule.check_ready()
            self._hold_round()

    @property
    def injected(self) -> dict[str, tuple[CoreGroup, int]]:
        """Each over-parameterised site's group and its index in the group."""
        return {site.name: (group, i) for group in self.groups for i, site in enumerate(group.sites)}

    def inject(self, names: Iterable[str], *, step: int = 0) -> None:
        """Over-parameterise these sites from now on; the function of the model stays, up to rounding.

        Args:
            names: of sites that are plain so far.
            step: optimizer steps taken, for the record.

        Raises:
            ConfigError: an unknown site or one that already has cores.
        Mutates: the optimizer's moments of the sites' matrices are carried into their centre cores, or dropped
            (`carry_moments`); the auxiliary cores start afresh.
        """
        chosen = list(names)
        unknown = [name for name in chosen if name not in self.sites]
        if unknown:
            raise ConfigError(f"inject: no such site: {', '.join(unknown[:3])}; see OverParameterization.sites.")
        twice = sorted((self.injected.keys() & set(chosen)) | {n for n in chosen if chosen.count(n) > 1})
        if twice:
            raise ConfigError(f"inject: already over-parameterised: {', '.join(twice[:3])}.")
        if self.optimizer is not None:
            self._check_hosts(self.optimizer, chosen)
        by_shape: dict[Any, list[Site]] = {}
        for name in chosen:
            site = self.sites[name]
            key = (site.shape, site.parameter.device, site.parameter.dtype)
            by_shape.setdefault(key, []).append(site)
        for sites in by_shape.values():
            group = CoreGroup(sites, self.decomposition, self.config.seed or 0, step)
            group.write()
            self.groups.append(group)
            if self.optimizer is not None and self.config.carry_moments:
                self._carry_moments(self.optimizer, group)
        if self.optimizer is not None:
            self._join(self.optimizer)

    def attach(self, optimizer: Any) -> OverParameterization:
        """Install the hooks that make `optimizer.step` train the cores; returns self.

        Args:
            optimizer: a torch optimizer that holds the chosen matrices, or Accelerate's wrapper of one.

        Raises:
            ConfigError: an optimizer whose step is not an ordinary torch step, or one that lacks a
                chosen matrix.
        """
        if self.optimizer is not None:
            raise ConfigError("attach: an optimizer is attached already; make a new OverParameterization.")
        optimizer = _ordinary(optimizer)
        kind = type(optimizer).__name__
        if self.optimizer_class not in (None, kind):
            raise ConfigError(f"attach: the run was trained with {self.optimizer_class}, this optimizer is {kind}.")
        self.schedule.check_ready()
        self._check_hosts(optimizer, dict.fromkeys([*self.injected, *self.schedule.candidates]))
        self._join(optimizer)
        self.optimizer, self.optimizer_class = optimizer, kind
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def check_unchanged(self) -> None:
        """Raise ConfigError if something else than training has written an over-parameterised A or B."""
        changed = [site.name for group in self.groups for site in group.changed()]
        if changed:
            raise ConfigError(
                f"{len(changed)} over-parameterised matrices, first {changed[0]}, were written by something else than "
                "training since the last step, and their cores know nothing of it. Call adopt_matrices() to go on "
                "from the new values, or write none while training."
            )

    def adopt_matrices(self) -> list[str]:
        """Go on from A and B as they are now: cores whose matrix something else has written are made anew from it.

        Returns:
            Names of those sites.
        Mutates: the optimizer's state of their cores is dropped.
        """
        changed = []
        for group in self.groups:
            sites = group.changed(anywhere=True)
            if not sites:
                continue
            changed += [site.name for site in sites]
            fresh = CoreGroup(sites, self.decomposition, self.config.seed or 0, group.step)
            for i, site in enumerate(sites):
                at = group.sites.index(site)
                for stack, parameters, made in zip(group.stacks, group.parameters, fresh.stacks, strict=True):
                    stack[at].copy_(made[i])
                    self._state.pop(parameters[at], None)
            group.write()
        return changed

    def finish(self) -> None:
        """End over-parameterization: the model keeps the plain LoRA that it holds, the optimizer loses the cores.

        The cores stay readable in `groups` for as long as this object lives.

        Raises:
            ConfigError: A or B were written by something else; see `adopt_matrices`.
        """
        if self.optimizer is None:
            return
        self.check_unchanged()
        self.detach()

    def detach(self) -> None:
        """Take the cores and the hooks out of the optimizer, whatever the matrices hold."""
        if self.optimizer is not None:
            self._leave(self.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles, self.optimizer = [], None

    def num_parameters(self) -> tuple[int, int]:
        """Numbers in the cores, and in the matrices that they stand for."""
        cores = sum(stack.numel() for group in self.groups for stack in group.stacks)
        matrices = sum(site.parameter.numel() for group in self.groups for site in group.sites)
        return cores, matrices

    def core_state(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's state of one core, by the optimizer's own keys; empty before the first step."""
        return self._state.get(parameter, {})

    def load_core_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Restore what `core_state` gave."""
        self._state[parameter] = dict(state)

    def _check_hosts(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        """Raise ConfigError unless the optimizer holds these sites, for us alone, in groups whose rate can scale."""
        if self.optimizer is None and has_cores(optimizer):
            raise ConfigError(
                "attach: another OverParameterization trains this optimizer's matrices already; one callback is enough."
            )
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name in names:
            identity = id(self.sites[name].parameter)
            if identity not in rates:
                raise ConfigError(
                    f"attach: the optimizer does not hold {name}. Build it, and OverParameterization, after "
                    "get_peft_model and after fully_shard."
                )
            if rates[identity] is None and self.config.aux_lr_scale != 1:
                raise ConfigError(
                    f"attach: {type(optimizer).__name__} chooses its own learning rate, which aux_lr_scale = "
                    f"{self.config.aux_lr_scale} cannot scale; leave it at 1."
                )

    def _join(self, optimizer: Optimizer) -> None:
        """Sort the cores by the parameter group of their matrix, centre and auxiliary apart."""
        host = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        twins: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for group in self.groups:
            for i, site in enumerate(group.sites):
                for parameter in site.holders():
                    optimizer.state.pop(parameter, None)
                for k, parameters in enumerate(group.parameters):
                    key = (host[id(site.parameter)], k == group.centre)
                    twins.setdefault(key, []).append(parameters[i])
        self._twins = [(index, centre, parameters) for (index, centre), parameters in twins.items()]

    def _enter(self, optimizer: Optimizer) -> None:
        """Show the cores to the optimizer, in twins of their matrices' groups."""
        self._leave(optimizer)
        self._plain_groups = len(optimizer.param_groups)
        twins = []
        for index, centre, parameters in self._twins:
            options = {k: v for k, v in optimizer.param_groups[index].items() if k not in ("params", "param_names")}
            if not centre:
                if self.config.aux_lr_scale != 1:
                    options["lr"] = options["lr"] * self.config.aux_lr_scale
                if "weight_decay" in options and not self.config.decay_auxiliary:
                    options["weight_decay"] = 0.0
            twins.append({"params": parameters, **options})
        optimizer.param_groups.extend(twins)
        optimizer.state.update(self._state)

    def _leave(self, optimizer: Optimizer) -> None:
        """Take the cores and their state out of the optimizer again."""
        if self._plain_groups is None:
            return
        del optimizer.param_groups[self._plain_groups :]
        self._plain_groups = None
        for _, _, parameters in self._twins:
            for parameter in parameters:
                if parameter in optimizer.state:
                    self._state[parameter] = optimizer.state.pop(parameter)

    def _carry_moments(self, optimizer: Optimizer, group: CoreGroup) -> None:
        for i, site in enumerate(group.sites):
            carried = carried_moments(
                optimizer.state.get(site.parameter, {}),
                group.decomposition,
                [stack[i : i + 1] for stack in group.stacks],
                site.shape,
            )
            if carried:
                self._state[group.parameters[group.centre][i]] = carried

    def _hold_round(self) -> None:
        """Let the schedule decide, and inject what it has chosen."""
        found = self.schedule.choose(self.step)
        if found is not None:
            self.inject(found.chosen, step=self.step)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.check_unchanged()
        self._enter(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._pull_back()
            return None
        wrapped = self._wrap(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leave(optimizer)
        for group in self.groups:
            group.clear_gradients()
            group.write()
        if self._is_counted:  # by the step of a parent class that this step called
            return
        self._is_counted = True
        if not _is_skipped(optimizer):
            self.step += 1
        if self.schedule.is_due(self.step):
            self._hold_round()

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that evaluates at the cores' current values and leaves its gradients on the cores."""

        def evaluate() -> Any:
            for group in self.groups:
                group.write()
            loss = closure()
            self._pull_back()
            return loss

        return evaluate

    def _pull_back(self) -> None:
        is_seen = self._is_counted and not _is_skipped(self.optimizer)
        score = self.schedule.observed if is_seen else None
        self._is_counted = False
        candidates = [] if score is None else list(self.schedule.candidates)
        found = {name: self.sites[name].gradient() for name in dict.fromkeys([*candidates, *self.injected])}
        gradients = gathered({name: gradient for name, gradient in found.items() if gradient is not None})
        if score is not None:
            score.observe({name: gradients[name] for name in candidates if name in gradients})
        for group in self.groups:
            group.pull_back(gradients)


def _is_skipped(optimizer: Any) -> bool:
    """Whether a fused optimizer, which GradScaler lets step in any case, leaves this step out."""
    return bool(getattr(optimizer, "found_inf", False))


def has_cores(optimizer: Any) -> bool:
    """Whether some OverParameterization trains through this optimizer, or Accelerate's wrapper of one."""
    hooks = getattr(_unwrapped(optimizer), "_optimizer_step_pre_hooks", {}).values()
    return any(isinstance(getattr(hook, "__self__", None), OverParameterization) for hook in hooks)


def _unwrapped(optimizer: Any) -> Any:
    return optimizer.optimizer if type(optimizer).__module__.startswith("accelerate.") else optimizer


def _ordinary(optimizer: Any) -> Optimizer:
    """The torch optimizer itself, out of Accelerate's wrapper."""
    if type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
        raise ConfigError("attach: DeepSpeed steps in an engine of its own, past torch's hooks; train without it.")
    optimizer = _unwrapped(optimizer)
    kind = type(optimizer)
    if kind.__module__.startswith("deepspeed."):
        raise ConfigError(f"attach: {kind.__name__} of DeepSpeed steps in an engine of its own, past torch's hooks.")
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"attach: expected a torch.optim.Optimizer, found {kind.__module__}.{kind.__name__}.")
    for name in (base.__name__ for base in kind.__mro__):
        if name in REFUSED_OPTIMIZERS:
            raise ConfigError(f"attach: {kind.__name__} cannot be used: {REFUSED_OPTIMIZERS[name]}.")
    if isinstance(optimizer, Adagrad) and Version(torch.__version__) < Version("2.12"):
        raise ConfigError(
            f"attach: Adagrad of torch {torch.__version__} makes its states when it is built, so the cores would have "
            "none; upgrade to torch 2.12, or take another optimizer."
        )
    return optimizer
