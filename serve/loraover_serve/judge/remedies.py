"""Remedies: what the user of a server can do about each fault that has a name.

They stand below a verdict, on a line of their own. The sentence of a verdict names the remedy itself where it depends
on what was found, such as the option by which mixed batches are left out.
"""

from __future__ import annotations

from loraover_serve.judge import names

_ANEW = "export the adapter anew for this engine, and load the new files"
_RELOAD = (
    "load each version of the adapter from another path, or restart the server when it changes (llama-server: start it "
    "with --cache-ram 0)"
)
_BASE = "serve the base model that the adapter was trained with, in the same revision"
_OUT_OF_DEFAULTS = "remove it from the server's defaults, which may come from the model's generation_config.json"

REMEDIES = {
    names.NOT_APPLIED: "load the adapter, check the server's log for why it is not applied, and request it by the name "
    "that the server lists",
    names.SCALED: "compare lora_alpha, r and use_rslora with the server's, and make sure that the adapter is not both "
    "merged and applied",
    names.TRANSPOSED: _ANEW,
    names.PERMUTED: f"{_ANEW}, since llama.cpp keeps these rows in another order than PEFT",
    names.LEFT_OUT: "check the server's log for modules that it skips, or merge the adapter into the base model",
    names.LAYERS: _ANEW,
    names.ROUNDED: "serve the adapter in the number format in which it was trained",
    names.ANOTHER: "load the right adapter under this name",
    names.STALE: "load the newest version of the adapter",
    names.OTHER_BASE: _BASE,
    names.BASE_OR_TEMPLATE: f"{_BASE}, with the chat template from the adapter's folder",
    names.TEMPLATE: "give the server the tokenizer and the chat template from the adapter's folder, and no system "
    "prompt",
    names.IN_BASE: "apply the adapter only to requests that name it, and request the base model by its own name",
    names.UNLIKE: "name the server's base model, so that requests without the adapter reach it",
    names.BASE_LAYERS: "load the published files of the base model again",
    names.POSITIONS: "serve the base model with the rope_theta and rope_scaling of its config.json",
    names.WINDOW: "serve the base model with the sliding_window of its config.json",
    names.TEMPERATURE: f"make the server return logprobs at temperature 1: {_OUT_OF_DEFAULTS}",
    names.PENALTY: _OUT_OF_DEFAULTS,
    names.EXTRA_TOKEN: "make the server use token ids as they are, without adding a token before them",
    names.INTERMITTENT: "load the adapter on each server behind this address",
    names.DISAGREE: "give each server behind this address the same adapter, base model and number format",
    names.SILENT: "make every server behind this address return logprobs",
    names.CACHED: "bypass the response cache",
    names.ENDS_EARLY: "remove stop words and length limits from the server's defaults",
    names.DECODED: "update the engine, which reads prompts with the adapter but generates without it",
    names.STALE_OF_BASE: _RELOAD,
    names.STALE_OF_EARLIER: _RELOAD,
    names.STALE_OF_LATER: _RELOAD,
    names.STALE_OF_ADAPTER: _RELOAD,
    names.STALE_OF_OTHERS: _RELOAD,
    names.CROSSED: "send no requests for adapters while an adapter is loaded or unloaded, or update the server",
    names.NO_KNOWN_WEIGHTS: "send no requests for adapters while an adapter is loaded or unloaded, or update the "
    "server",
    names.CACHE_OF_RESPONSES: "clear the response cache whenever an adapter changes",
    names.SERVER_ENDED: "check the server's log for why it stopped",
    names.POOLING: "start the server with the pooling that was recorded",
    names.RAW: "make the server normalise vectors to length 1",
    names.FLIPPED: "make the server return vectors without normalising them",
    names.DIMENSION: "serve the recorded model, and return all dimensions of its output",
    names.PREFIX: "add the recorded prefix to each input",
    names.ADDED_PREFIX: "remove the prefix that the server adds to each input",
    names.SPECIAL: "make the server add the tokenizer's special tokens",
    names.HEAD: "load the head of the adapter as well (modules_to_save)",
    names.ONLY_HEAD: "load the adapter's A and B too, not only its head",
    names.LABELS: "serve the labels in the order of training (id2label in config.json)",
    names.ENCODING: "request vectors as lists of numbers, or update the server",
}
"""Remedy of each fault, as the end of a sentence that begins with "what to do"."""


def to_do(fault: str | None) -> list[str]:
    """Line below a verdict with the remedy of its fault; empty if there is no fault, or no known remedy."""
    known = None if fault is None else REMEDIES.get(fault)
    return [] if known is None else [f"what to do: {known}"]
