"""Requests: one declaration gives the function's keywords, the command's options and the recorded command line."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover.common.request import (
    AnyNames,
    AnyNumbers,
    AnyPath,
    AnyPaths,
    Request,
    argument,
    as_written,
    option,
    written_as_flags,
)
from loraover.reporting.request_command import request_command
from loraover.sources.verb import perform, verb


def split(given: Iterable[str]) -> list[str]:
    """Numbers, of which one text may hold several with a "+" between them."""
    return [str(int(part)) for text in given for part in text.split("+")]


@dataclass(frozen=True)
class ToyRequest(Request):
    """Toy."""

    verb = "loraover toy"

    sources: AnyPaths = argument("Folders to read.", metavar="SOURCE...")
    output: AnyPath = option("New folder.", short="-o")
    mode: str = option("How to work.", default="fast", choices=("fast", "slow"), also={"quick": "fast"})
    steps: int | None = option("Number of steps.", default=None, least=1, default_text="all", former=("--rounds", "-n"))
    rate: float = option("Largest rate.", default=0.5, above=0)
    names: AnyNames = option("Name of a source.", default=(), flag="--name")
    weights: AnyNumbers | None = option("Weight of each source.", default=None, has_commas=True)
    check: bool = option("Check the result.", default=True)
    jobs: AnyNames = option("Jobs by number.", default=("01",), converts=split, writes=tuple, are_different=True)
    share: float = option("Share of jobs.", default=1, most=1, needs="steps")
    speaks: bool | None = option("Say what is done.", default=None, default_text="on a terminal")
    on_step: Callable[[int], None] | None = option("Function to call at each step.", default=None, is_hidden=True)
    force: bool = option("Replace the output.", default=False, is_recorded=False)
    words: AnyNames = option("Further words for the engine.", default=(), is_rest=True)
    added: int = option("Added by this one line.", default=3)

    def faults(self) -> Iterator[str]:
        if self.names and len(self.names) != len(self.sources):
            yield f"{self.named('names')} is given {len(self.names)} times for {len(self.sources)} sources."
        if self.names and self.mode == "slow":
            yield f"{self.named('names')}: for {self.named('mode', 'fast')} only."
        if "-x" in self.words:
            yield f"{self.named('words')} hold -x; use {self.named('mode', 'slow')}."


@verb(ToyRequest)
def toy(request: ToyRequest) -> ToyRequest:
    """Return the request.

    Raises:
        ConfigError: A request of which no toy can be made.
    """
    return request


made: list[ToyRequest] = []
COMMAND = request_command(ToyRequest, lambda request, as_json: made.append(request))


def parsed(*words: str) -> ToyRequest:
    assert run(COMMAND, words) == 0
    return made.pop()


def test_one_line_adds_an_option_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.signature(toy).parameters["added"].default == 3
    assert "    added: Added by this one line. Default: 3." in str(toy.__doc__)
    assert "Raises:" in str(toy.__doc__).partition("Args:")[2]
    assert toy(["a"], "b", added=4).command() == "loraover toy a -o b --added 4"
    assert parsed("a", "-o", "b", "--added", "4").added == 4
    assert run(COMMAND, ["--help"]) == 0
    assert "Added by this one line.  [default: 3]" in " ".join(capsys.readouterr().out.split("\n"))


def test_the_recorded_command_line_makes_the_same_request() -> None:
    asked = toy(
        ["a", Path("b c")],
        "out",
        mode="quick",
        steps=2,
        names=("x", "y"),
        weights=[-1, 0.5],
        jobs=["2+3"],
        share=0.5,
        check=False,
        speaks=False,
        words=["--dtype", "float32"],
    )
    assert (asked.sources, asked.output, asked.mode) == ((Path("a"), Path("b c")), Path("out"), "fast")
    words = shlex.split(asked.command())[2:]
    assert words[-3:] == ["--", "--dtype", "float32"]
    assert parsed(*words) == asked
    assert parsed("a", "-o", "b", "--mode", "quick") == toy("a", "b") == perform(toy, toy("a", "b"))
    assert toy("a", "b", force=True, on_step=print, jobs=["1"]).command() == "loraover toy a -o b"
    assert parsed("a", "-o", "b", "--jobs", "2", "--jobs", "3+4").jobs == ("2", "3", "4")
    assert (asked.weights, toy("a", "b").weights) == ((-1.0, 0.5), None)
    assert asked.given("steps", "rate", "check") == "steps, check"


@pytest.mark.parametrize(
    ("keywords", "words", "message"),
    [
        ({"mode": "odd"}, ["--mode", "odd"], "'odd'"),
        ({"steps": 0}, ["--steps", "0"], "0"),
        ({"rate": 0.0}, ["--rate", "0"], "0"),
        ({"rate": float("nan")}, ["--rate", "nan"], "nan"),
        ({"steps": "2"}, ["--steps", "x"], "x"),
        ({"weights": ["x"]}, ["--weights", "x"], "'x'"),
        ({"names": ["x"], "mode": "slow"}, ["--name", "x", "--mode", "slow"], "--name: for --mode fast only."),
        ({"jobs": ["2+2"]}, ["--jobs", "2+2"], "names one twice: 2, 2"),
        ({"jobs": ["x"]}, ["--jobs", "x"], "invalid literal for int"),
        ({"share": 2}, ["--share", "2"], "2"),
        ({"share": 0.5}, ["--share", "0.5"], "missing"),
        ({"names": ["x", "y"]}, ["--name", "x", "--name", "y"], "given 2 times for 1 sources"),
    ],
)
def test_both_callers_are_refused_in_their_own_words(
    keywords: dict[str, object], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(keywords))
    with pytest.raises(ConfigError, match=rf"\b{name}\b") as found:
        toy("a", "b", **keywords)  # type: ignore[arg-type]
    assert "--" not in str(found.value)
    assert run(COMMAND, ["a", "-o", "b", *words]) == 2
    shown = capsys.readouterr().err
    assert words[0] in shown
    assert message in shown


def test_all_faults_of_single_values_are_named_together() -> None:
    with pytest.raises(
        ConfigError, match=r"mode is 'odd', expected one of fast, slow\. steps is 0, expected 1 or more\."
    ):
        toy("a", "b", mode="odd", steps=0)
    with pytest.raises(ConfigError, match=r"sources is empty, expected one or more\."):
        toy([], "b")
    with pytest.raises(ConfigError, match=r"jobs is empty"):
        toy("a", "b", jobs=[])
    with pytest.raises(TypeError, match="unexpected keyword argument 'stpes'"):
        toy("a", "b", stpes=1)  # type: ignore[call-arg]


def test_a_remedy_is_in_the_callers_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="words hold -x; use mode='slow'"):
        toy("a", "b", words=["-x"])
    assert run(COMMAND, ["a", "-o", "b", "--", "-x"]) == 2
    assert 'the words after "--" hold -x; use --mode slow.' in capsys.readouterr().err


def test_a_lower_room_names_an_argument_in_the_callers_words() -> None:
    assert (as_written("compute_dtype"), as_written("device", "cpu")) == ("compute_dtype", "device='cpu'")
    with written_as_flags():
        assert (as_written("compute_dtype"), as_written("device", "cpu")) == ("--compute-dtype", "--device cpu")


def test_an_earlier_name_of_an_option_works_and_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert [parsed("a", "-o", "b", *words).steps for words in (["--rounds=2"], ["-n", "2"], ["-n2"])] == [2, 2, 2]
    assert toy("a", "b", steps=2).command() == "loraover toy a -o b --steps 2"
    assert run(COMMAND, ["a", "-o", "b", "--rounds", "0"]) == 2
    assert "'--steps'" in capsys.readouterr().err
    assert run(COMMAND, ["--help"]) == 0
    assert "--rounds" not in capsys.readouterr().out


def test_usage_shows_what_may_be_left_out() -> None:
    @dataclass(frozen=True)
    class OneRequest(Request):
        """One."""

        verb = "loraover one"
        source: AnyPath | None = argument("Folder to read.", default=None)

        def faults(self) -> Iterator[str]:
            if self.source is None:
                yield f"give {self.named('source')}."

    def usage(command: click.Command) -> str:
        return command.get_usage(click.Context(command, info_name="toy"))

    assert usage(request_command(OneRequest, lambda request, as_json: 0)) == "Usage: toy [OPTIONS] [SOURCE]"
    assert usage(COMMAND) == "Usage: toy [OPTIONS] SOURCE... [-- WORDS]"
    with written_as_flags(), pytest.raises(ConfigError, match="give SOURCE"):
        OneRequest()


def test_a_command_takes_what_it_must() -> None:
    assert run(COMMAND, ["-o", "b"]) == 2
    assert run(COMMAND, ["a"]) == 2
    options = {option.opts[-1]: option for option in COMMAND.params if isinstance(option, click.Option)}
    assert not {"--words", "--on-step"} & options.keys()
    assert [*options["--speaks"].opts, *options["--speaks"].secondary_opts] == ["--speaks", "--no-speaks"]
    assert options["--name"].multiple
