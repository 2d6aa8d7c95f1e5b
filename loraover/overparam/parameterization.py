"""Over-parameterisation by hooks on `optimizer.step`.

The model and its `state_dict` only ever hold ordinary LoRA matrices M. The hook before a step turns dL/dM into the
gradients of the cores and shows the cores to the optimizer, which steps them in M's place. The hook after the step
contracts the cores, writes the result into M and removes the cores from the optimizer. Schedulers, gradient clipping,
GradScaler and `zero_grad` therefore see an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.overparam.block_bases import Bases
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.core_group import CoreGroup, grouped
from loraover.overparam.covariances import measured_bases, shared_columns
from loraover.overparam.eigenbases import Followers
from loraover.overparam.fingerprint import LateAnswer
from loraover.overparam.optimizer_view import FlatView, OptimizerView
from loraover.overparam.optimizers import (
    CopyGuard,
    StepGuard,
    check_outermost,
    is_skipped,
    ordinary_optimizer,
    unwrapped,
)
from loraover.overparam.probe import Probe, calibrating
from loraover.overparam.schedule import Schedule, runs_model
from loraover.overparam.sharding import in_any_process
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

    Raises:
        ConfigError: The model has no LoRA, or a LoRA variant that is not the product B A; a pattern matches no site;
            or the schedule does not fit the model or the run.

    Mutates:
        The chosen matrices are rewritten as the contraction of their cores, which equals them up to rounding.

    `write_checkpoint` has an example.
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
        self._is_cut_flat = any(site.piece is not None for site in self.sites.values())
        if self._is_cut_flat and runs_model(self.config):
            raise ConfigError(
                "DeepSpeed's ZeRO gives no gradients outside of a training step, so calibration batches cannot be "
                "measured. Choose schedule all or dynamic, or a score and bases without calibration, or train with "
                "DDP or FSDP2."
            )
        self.schedule = Schedule(self.config, self.sites, steps=steps, probe=probe)
        self.groups: list[CoreGroup] = []
        self.step = 0
        self._depth = 0  # of steps: that of a subclass calls its parent's
        self._is_observed = False
        self._is_filling = False
        self._has_stepped = False
        self.optimizer_class: str | None = None
        self.followers = Followers(self.decomposition, self.sites)
        self._late = LateAnswer()
        self._view: OptimizerView | None = None
        self._handles: list[Any] = []
        if inject and self.config.schedule != "dynamic":
            self.schedule.check_ready()
            self._hold_round()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that is attached, or None."""
        return None if self._view is None else self._view.optimizer

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
        if self._view is not None:
            self._view.check_holds([self.sites[name] for name in (*self.injected, *chosen)])
        self.check_unchanged()
        bases: dict[str, Bases] = {}
        if self.decomposition.bases is not None and self.decomposition.bases.calibrates:
            probe = self.schedule.probe
            if probe is None or not probe.batches:
                raise ConfigError(
                    "bases from calibration are measured on batches; give them with `probe`, or use the Trainer's "
                    "callback, which takes them from the training data."
                )
            with calibrating(probe, self.config.seed or 0):
                bases = measured_bases(probe, [self.sites[n] for n in chosen], self.sites, self.decomposition)
        owners = {} if self.decomposition.trains_all else shared_columns(bases)
        for sites in grouped([self.sites[name] for name in chosen], owners):
            decomposition = self.decomposition.of_site(sites[0].name)
            self._add(CoreGroup.initialised(sites, decomposition, self.config.seed or 0, step, bases))
        if self._view is not None:
            self.groups = self._view.arranged(self.groups, self.followers)
            self.followers.stop_unturned(self._view.optimizer)

    def inject_as(self, owners: Mapping[str, str], *, step: int) -> None:
        """Give sites cores as a checkpoint has them; the values of the cores are loaded afterwards.

        Args:
            owners: For each site, the site whose basis of columns it shares; itself if it shares none.
            step: Optimizer steps taken when they were injected.
        """
        for sites in grouped([self.sites[name] for name in owners], owners):
            decomposition = self.decomposition.of_site(sites[0].name)
            group = CoreGroup.initialised(sites, decomposition, self.config.seed or 0, step)
            self._add(group.sharing(len(sites) // len({owners[site.name] for site in sites})))

    def _add(self, group: CoreGroup) -> None:
        group.write()
        self.groups.append(group)
        self.followers.add(group)
        if self._view is not None and self.config.carry_moments:
            self._view.carry_moments(group)

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
            raise ConfigError(f"attach: the optimizer is {kind}; resume with {self.optimizer_class}, as trained.")
        self.schedule.check_ready()
        if has_cores(optimizer):
            raise ConfigError(
                "attach: another OverParameterization trains this optimizer's matrices already; one callback is enough."
            )
        view = (FlatView if self._is_cut_flat else OptimizerView)(optimizer, self.config)
        view.check_holds([self.sites[name] for name in dict.fromkeys([*self.injected, *self.schedule.candidates])])
        self.groups = view.arranged(self.groups, self.followers)
        self.followers.check_optimizer(optimizer)
        self._view, self.optimizer_class = view, kind
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda _: view.fill_state()),
            optimizer.register_state_dict_post_hook(lambda *_: view.empty_state()),
            StepGuard(optimizer, self._abandon_step),
            CopyGuard(optimizer),
        ]
        return self

    def check_unchanged(self) -> None:
        """Check that only the optimizer step has changed the matrices that have cores.

        Raises:
            ConfigError: A matrix differs from what the last step wrote into it.
        """
        self._refuse(self._late.settle())
        self._refuse([group.differs().tolist() for group in self.groups])

    def _refuse(self, differs: list[list[bool]] | None) -> None:
        """Raise ConfigError if a site of a group differs."""
        changed = [
            site.name
            for group, flags in zip(self.groups, differs or [], strict=False)  # later groups have no flags yet
            for site, differs_here in zip(group.sites, flags, strict=True)
            if differs_here
        ]
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
        self._late = LateAnswer()
        changed = []
        for group in self.groups:
            some = group.sites[0]
            flags = in_any_process(group.differs().tolist(), some.parameter.device if some.is_cut else None)
            places = [i for i, differs in enumerate(flags) if differs]
            if not places:
                continue
            changed += [group.sites[i].name for i in places]
            group.renew(places, self.config.seed or 0)
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
        """Remove the hooks and the cores from the optimizer; unlike `finish`, do not check the matrices."""
        if self._view is not None:
            self._view.leave()
        for handle in self._handles:
            handle.remove()
        self._handles, self._view = [], None

    def num_parameters(self) -> tuple[int, int]:
        """Count the trained parameters of the cores, and the parameters of the matrices that they stand for.

        Returns:
            The two counts, cores first. Auxiliary cores that follow statistics are not trained: `gauge_numbers`.
        """
        cores = sum(group.stacks[k].numel() for group in self.groups for k in group.trained)
        matrices = sum(site.size for group in self.groups for site in group.sites)
        return cores, matrices

    def gauge_numbers(self) -> int:
        """Count the numbers that are kept beside the trained ones: bases, and the statistics that they follow.

        Returns:
            The count; 0 for a decomposition whose cores are all trained.
        """
        kept = sum(s.numel() for group in self.groups for k, s in enumerate(group.stacks) if k not in group.trained)
        return kept + self.followers.numbers

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        view = self._attached()
        self._depth += 1
        if self._depth > 1:
            return None
        self._is_observed = False
        self._is_filling = view.is_filled_by_this_step()
        if self._is_filling:
            return None
        if not self._has_stepped:
            check_outermost(optimizer)
        if view.is_regrouped():
            view.check_holds([self.sites[name] for name in self.injected])
            self.check_unchanged()  # groups that are divided take the matrices as they are now
            self.groups = view.arranged(self.groups, self.followers)
        self._refuse(self._late.ask([group.differs() for group in self.groups]))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._pull_back(view)
            view.enter()
            return None
        view.enter()
        wrapped = self._wrap(view, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrap(self, view: OptimizerView, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that evaluates the model at the cores' values and leaves its gradients on the cores."""
        is_checked = self._has_stepped

        def evaluate() -> Any:
            nonlocal is_checked
            if not is_checked and any(bool(group.differs().any()) for group in self.groups):
                raise ConfigError(
                    f"{type(view.optimizer).__name__} cannot be used: its step moves the parameters by gradients from "
                    "before the step, and calls the closure only then. The cores have no gradients before the closure "
                    "is called: use an optimizer that calls it first."
                )
            is_checked = True
            for group in self.groups:
                group.write()
            loss = closure()
            view.leave()  # where a gradient is missing, a group is shown in another way from here on
            self._pull_back(view)
            view.enter()
            return loss

        return evaluate

    def _pull_back(self, view: OptimizerView) -> None:
        """Turn the gradients of matrices into those of cores, and pass them to scores and to bases that follow them."""
        is_seen = not self._is_observed and not is_skipped(view.optimizer)
        score = self.schedule.observed if is_seen else None
        self._is_observed = True
        candidates = [] if score is None else list(self.schedule.candidates)
        gradients = view.gradients([self.sites[name] for name in dict.fromkeys([*candidates, *self.injected])])
        if score is not None:
            score.observe({name: gradients[name] for name in candidates if name in gradients})
        pulled = {}
        for _, group in view.shown():
            dense = group.gather(gradients)
            for site in group.sites:  # so that all gradients are never held twice
                gradients.pop(site.name, None)
            if dense is not None:
                pulled[group] = group.pull_back(dense)[0]
            del dense
        view.clear_shared_gradients()
        if is_seen:
            self.followers.observe(pulled)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth or self._is_filling:
            return
        (view := self._attached()).check_written()
        view.leave()
        for _, group in view.shown():
            group.clear_gradients()
            if group in self.followers:
                self.followers[group].refresh()
            group.write()
        self._has_stepped = True
        if view.ends_step() and not is_skipped(optimizer):
            self.step += 1
        if self.schedule.is_due(self.step):
            self._hold_round()

    def _abandon_step(self) -> None:
        """Take the cores out of the optimizer after a step that raised an error."""
        self._depth = 0
        self._attached().leave()

    def _hold_round(self) -> None:
        """Let the schedule decide, and give cores to the sites that it chooses."""
        found = self.schedule.choose(self.step)
        if found is not None:
            self.inject(found.chosen, step=self.step)

    def _attached(self) -> OptimizerView:
        assert self._view is not None  # the hooks are there only while an optimizer is attached
        return self._view


def has_cores(optimizer: Any) -> bool:
    """Whether an OverParameterization is attached to this optimizer, or to the one in Accelerate's wrapper."""
    hooks = getattr(unwrapped(optimizer), "_optimizer_step_pre_hooks", {}).values()
    return any(isinstance(getattr(hook, "__self__", None), OverParameterization) for hook in hooks)
