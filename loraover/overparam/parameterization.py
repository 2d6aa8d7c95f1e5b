"""Over-parameterization by hooks on `optimizer.step`.

The model and its `state_dict` only ever hold ordinary LoRA matrices M. The hook before a step turns dL/dM into the
gradients of the cores and shows the cores to the optimizer, which steps them in M's place. The hook after the step
contracts the cores, writes the result into M and removes the cores from the optimizer. Schedulers, gradient clipping,
GradScaler and `zero_grad` therefore see an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.core_group import CoreGroup
from loraover.overparam.importance import Probe
from loraover.overparam.moments import carried_moments
from loraover.overparam.optimizers import ordinary_optimizer, unwrapped
from loraover.overparam.schedule import Schedule
from loraover.overparam.sharding import gathered
from loraover.overparam.sites import Site, base_model_name, find_sites


class OverParameterization:
    """Training of a PEFT model's LoRA matrices through cores, in any training loop.

    A *site* is one A or B matrix of one module. During training, a chosen site is the contraction of several smaller
    tensors, its *cores*, which together have more parameters than the matrix. Your model only ever holds the matrix:
    the cores are kept here, and hooks on `optimizer.step` train them.

    Args:
        model: PEFT model with LoRA layers, on the device where it will train. It may be wrapped (DDP, torch.compile).
        config: Which sites get cores, when, and of which decomposition; the defaults of `LoraOverConfig` if absent.
        steps: Number of optimizer steps of the run. A dynamic schedule needs it.
        probe: Batches on which a schedule runs the model. A static schedule, and the score loss_impact, need them.
        inject: Whether to give the chosen sites cores now. False leaves every matrix plain until `inject` is called
            or a checkpoint is restored.

    Attributes:
        config: The configuration that was given.
        sites: Every trainable A and B matrix of the model, by name, with or without cores.
        groups: The cores, in groups of sites of one shape.
        schedule: The choice of sites, with the decisions made so far in `schedule.rounds`.
        step: Number of optimizer steps taken.
        steps: Number of optimizer steps of the run, or None.
        optimizer: The optimizer that is attached, or None.

    Raises:
        ConfigError: The model has no LoRA, or a LoRA variant that is not the product B A; a pattern matches no site;
            or the schedule does not fit the model or the run.

    Mutates:
        The chosen matrices are rewritten as the contraction of their cores, which equals them up to rounding.

    Example:
        ```python
        over = OverParameterization(model, LoraOverConfig())
        over.attach(optimizer)
        ...  # an ordinary training loop
        over.finish()
        model.save_pretrained("adapter")  # an ordinary LoRA adapter
        ```
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
        """The group of each site that has cores, and the site's index in that group, by the site's name."""
        return {site.name: (group, i) for group in self.groups for i, site in enumerate(group.sites)}

    def inject(self, names: Iterable[str], *, step: int = 0) -> None:
        """Give these sites cores from now on, without changing what the model computes, up to rounding.

        Schedules do this by themselves; call it only to choose sites by hand.

        Args:
            names: Names of sites that have no cores yet.
            step: Number of optimizer steps taken, which checkpoints record.

        Raises:
            ConfigError: A site is unknown or has cores already.

        Mutates:
            The optimizer's moments of a matrix are carried into its centre core, or dropped if `carry_moments` is
            false. The auxiliary cores start without moments.
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
        """Install the hooks by which `optimizer.step` trains the cores.

        Args:
            optimizer: PyTorch optimizer that holds the chosen matrices, or Accelerate's wrapper of one.

        Returns:
            This object.

        Raises:
            ConfigError: The optimizer's step is not an ordinary PyTorch step, the optimizer lacks a chosen matrix, or
                an optimizer is attached already.
        """
        if self.optimizer is not None:
            raise ConfigError("attach: an optimizer is attached already; make a new OverParameterization.")
        optimizer = ordinary_optimizer(optimizer)
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
        """Check that only the optimizer step has changed the matrices that have cores.

        Raises:
            ConfigError: A matrix differs from what the last step wrote into it.
        """
        changed = [site.name for group in self.groups for site in group.changed()]
        if changed:
            raise ConfigError(
                f"{len(changed)} over-parameterised matrices, first {changed[0]}, were changed outside the optimizer "
                "step, so their cores are out of date. Call adopt_matrices() to train on from the new values, or do "
                "not change these matrices during training."
            )

    def adopt_matrices(self) -> list[str]:
        """Make new cores for every matrix that was changed outside the optimizer step, from its present values.

        Returns:
            Names of the sites whose matrix had changed.

        Mutates:
            The optimizer's state of the old cores is dropped.
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
        """End the training of cores: check the matrices, then remove the hooks and the cores from the optimizer.

        The model keeps the LoRA matrices that it holds, and the cores stay readable in `groups`. No file is written or
        read. To contract the cores of a saved checkpoint in float64 and certify the result, use
        `loraover_export.fold_checkpoint` instead.

        Raises:
            ConfigError: A matrix was changed outside the optimizer step; see `adopt_matrices`.
        """
        if self.optimizer is None:
            return
        self.check_unchanged()
        self.detach()

    def detach(self) -> None:
        """Remove the hooks and the cores from the optimizer without checking the matrices, as `finish` does."""
        if self.optimizer is not None:
            self._leave(self.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles, self.optimizer = [], None

    def num_parameters(self) -> tuple[int, int]:
        """Count the parameters of the cores, and those of the matrices that they stand for.

        Returns:
            The two counts, cores first.
        """
        cores = sum(stack.numel() for group in self.groups for stack in group.stacks)
        matrices = sum(site.parameter.numel() for group in self.groups for site in group.sites)
        return cores, matrices

    def core_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return the optimizer's state of one core.

        Args:
            parameter: One of `groups[i].parameters[k]`.

        Returns:
            The state by the optimizer's own keys, such as "exp_avg"; empty before the core's first step.
        """
        return self._state.get(parameter, {})

    def load_core_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Put back the optimizer's state of one core.

        Args:
            parameter: One of `groups[i].parameters[k]`.
            state: What `core_state` returned.
        """
        self._state[parameter] = dict(state)

    def _check_hosts(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        """Raise ConfigError unless this object can train these sites, and scale their rate, through the optimizer."""
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
        """Sort the cores by the parameter group of their matrix, and apart into centre and auxiliary cores."""
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
        """Add the cores to the optimizer, in copies (twins) of the parameter groups of their matrices."""
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
        """Remove the cores and their state from the optimizer again."""
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
        """Let the schedule decide, and give the sites that it chooses cores."""
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
        if self._is_counted:  # a parent class's step, which this step called, has counted it
            return
        self._is_counted = True
        if not _is_skipped(optimizer):
            self.step += 1
        if self.schedule.is_due(self.step):
            self._hold_round()

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that evaluates the model at the cores' values and leaves its gradients on the cores."""

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
    """Whether a fused optimizer skips this step: GradScaler calls it even when it has found an infinite gradient."""
    return bool(getattr(optimizer, "found_inf", False))


def has_cores(optimizer: Any) -> bool:
    """Whether an OverParameterization is attached to this optimizer, or to the one in Accelerate's wrapper."""
    hooks = getattr(unwrapped(optimizer), "_optimizer_step_pre_hooks", {}).values()
    return any(isinstance(getattr(hook, "__self__", None), OverParameterization) for hook in hooks)
