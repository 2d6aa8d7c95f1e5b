"""The verdict of a study in plain sentences with its figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from loraover.reporting.html_page import Verdict
from loraover.reporting.palette import Tone
from loraover_lab.study.report import Standing, StudyReport, TaskResult, is_over, signed, standing

NOTHING = "Not known yet whether LoRA-Over beats a tuned plain LoRA: a comparison needs both, and two seeds."


@dataclass(frozen=True)
class PercentChange:
    """A method's difference to the baseline, in per cent of the baseline's test loss.

    Args:
        task: Name of the task.
        method: Name of the method.
        standing: How the method stands beside the baseline.
        doubt: Reason why its difference shows nothing; empty otherwise.
        mean: The difference.
        interval: Its 95 % interval.
        seen: Smallest true difference that the study would have shown.
    """

    task: str
    method: str
    standing: Standing
    doubt: str
    mean: float
    interval: tuple[float, float]
    seen: float

    def __str__(self) -> str:
        mean, low, high = self.texts
        return f"On {self.task}: {mean} %, 95 % interval {low} to {high}"

    @property
    def texts(self) -> list[str]:
        """The difference and the ends of its interval."""
        return signed((self.mean, *self.interval), 1)


def changes(report: StudyReport) -> list[PercentChange]:
    """Return the difference of every method to its task's baseline, for those that were compared."""
    found = []
    for task in report.tasks:
        loss = next((result.test_loss for result in task.methods if result.method == task.baseline), 0.0)
        for result in task.methods:
            gap = result.difference
            if gap is not None and loss > 0:
                mean, low, high, seen = (100 * value / loss for value in (gap.mean, *gap.interval, gap.detectable))
                found.append(PercentChange(task.task, result.method, *standing(task, result), mean, (low, high), seen))
    return found


@dataclass
class _Setting:
    """LoRA-Over with one setting, over all tasks."""

    name: str
    required: int  # tasks on which it has to be better
    below: list[PercentChange] = field(default_factory=list)
    above: list[PercentChange] = field(default_factory=list)
    same: list[PercentChange] = field(default_factory=list)
    doubtful: list[PercentChange] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        if self.below and (self.above or self.failed):
            return "better on some tasks, worse on others"
        if self.below:
            return "better" if len(self.below) >= self.required else "not shown"
        if self.doubtful:
            return "not shown"
        return "worse" if self.above or self.failed else "cannot be told apart"

    def sentence(self) -> str:
        """Say on which tasks the loss is below, above or neither, with all figures, and what would have shown."""
        name, plain = self.name, "a tuned plain LoRA"
        parts = [
            f"{side} {plain}'s on {_tasks(found)}"
            for side, found in (("below", self.below), ("above", self.above))
            if found
        ]
        found = [f"{name}'s loss is {' and '.join(parts)}."] if parts else []
        if self.same:
            both = f"On {_tasks(self.same)}, the two" if parts else f"{name} and {plain}"
            found.append(f"{both} cannot be told apart.")
        if self.failed:
            found.append(f"{name} failed at every rate on {_list(self.failed)}.")
        found += [f"{change}." for change in (*self.below, *self.above)]
        found += [f"{change}; {change.seen:.2g} % could have been seen." for change in self.same]
        found += [f"{change}. It shows nothing: {change.doubt}." for change in self.doubtful]
        return " ".join(found)


def _tasks(found: Iterable[PercentChange]) -> str:
    return _list(change.task for change in found)


def verdict_of(report: StudyReport) -> Verdict:
    """Return whether LoRA-Over's loss is below a tuned plain LoRA's, above it, or cannot be told apart.

    The verdict is good only of a finished study whose rule was written down before the first run.
    """
    settings = _settings(report)
    if not settings:
        return Verdict("open", "unknown", NOTHING)
    if len(settings) == 1:
        settings[0].name = "LoRA-Over"
    sentences = [setting.sentence() for setting in settings]
    if len(settings) > 1 and any(setting.below for setting in settings):
        sentences.append("Nothing corrects for the number of settings.")
    doubted = {change.task for setting in settings for change in setting.doubtful}
    baselines = ((task, one) for task in report.tasks for one in task.methods if one.method == task.baseline)
    at_end = [task.task for task, baseline in baselines if not baseline.sensitivity.is_bracketed]
    if edges := [name for name in at_end if name not in doubted]:
        sentences.append(f"The sweep did not bracket plain LoRA's best rate on {_list(edges)}.")
    if not report.is_whole:
        sentences.append("The study is not finished.")
    words = list(dict.fromkeys(setting.word for setting in settings))
    word = words[0] if len(words) == 1 else "depends on the setting"
    shows = words == ["better"] and report.is_whole and report.rule.was_first
    tone: Tone = "bad" if words == ["worse"] else "good" if shows else "open"
    return Verdict(tone, word, " ".join(sentences))


def _settings(report: StudyReport) -> list[_Setting]:
    settings: dict[str, _Setting] = {}
    by_name = {task.task: task for task in report.tasks}

    def setting_of(task: TaskResult, method: str) -> _Setting:
        return settings.setdefault(method, _Setting(task.shown(method), report.rule.required))

    for change in changes(report):
        task = by_name[change.task]
        if is_over(task, change.method):
            setting = setting_of(task, change.method)
            sorts = {"better": setting.below, "worse": setting.above, "not shown": setting.doubtful}
            sorts.get(change.standing, setting.same).append(change)
    for task in report.tasks:
        for method in task.failed if task.baseline is not None else ():
            if is_over(task, method):
                setting_of(task, method).failed.append(task.task)
    return [*settings.values()]


def _list(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
