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
_OUT_OF_DEFAULTS = "take it out of the server's defaults, which may come from the model's generation_config.json"

REMEDIES = {
    names.NOT_APPLIED: "load the adapter, look into the server's log for a reason why it is left out, and ask for it "
    "by the name under which the server lists it",
    names.SCALED: "compare lora_alpha, r and use_rslora in adapter_config.json with the server's, and see that the "
    "adapter is not merged and applied as well",
    names.TRANSPOSED: _ANEW,
    names.PERMUTED: f"{_ANEW}, since llama.cpp keeps these rows in another order than PEFT",
    names.LEFT_OUT: "look into the server's log for modules that it leaves out, or merge the adapter into the base "
    "model",
    names.LAYERS: _ANEW,
    names.ROUNDED: "serve the adapter in the number format in which it was trained",
    names.ANOTHER: "load the right adapter under this name",
    names.STALE: "load the newest version of the adapter",
    names.OTHER_BASE: _BASE,
    names.BASE_OR_TEMPLATE: f"{_BASE}, and with the chat template that lies beside the adapter",
    names.TEMPLATE: "give the server the tokenizer and the chat template that lie beside the adapter, and no system "
    "prompt",
    names.IN_BASE: "load the adapter for its own requests alone, and ask for the base model by its own name",
    names.UNLIKE: "name the server's base model, so that requests without the adapter reach it",
    names.BASE_LAYERS: "load the base model anew from its published files",
    names.POSITIONS: "serve the base model with the rope_theta and rope_scaling of its config.json",
    names.WINDOW: "serve the base model with the sliding_window of its config.json",
    names.TEMPERATURE: f"let the server return logprobs at temperature 1: {_OUT_OF_DEFAULTS}",
    names.PENALTY: _OUT_OF_DEFAULTS,
    names.EXTRA_TOKEN: "let the server read token ids as they are, without a token in front of them",
    names.INTERMITTENT: "load the adapter on each server behind this address",
    names.DISAGREE: "give each server behind this address the same adapter, base model and number format",
    names.SILENT: "let each server behind this address return logprobs",
    names.CACHED: "let requests pass the cache of responses by",
    names.ENDS_EARLY: "take stop words and limits of the length out of the server's defaults",
    names.DECODED: "update the engine, since it reads prompts with the adapter, and generates without it",
    names.STALE_OF_BASE: _RELOAD,
    names.STALE_OF_EARLIER: _RELOAD,
    names.STALE_OF_LATER: _RELOAD,
    names.STALE_OF_ADAPTER: _RELOAD,
    names.STALE_OF_OTHERS: _RELOAD,
    names.CROSSED: "ask for no adapter while one is loaded or unloaded, or update the server",
    names.NO_KNOWN_WEIGHTS: "ask for no adapter while one is loaded or unloaded, or update the server",
    names.CACHE_OF_RESPONSES: "empty the cache of responses when an adapter changes",
    names.SERVER_ENDED: "look into the server's log for why it ended",
    names.POOLING: "start the server with the pooling that was recorded",
    names.RAW: "let the server give vectors the length 1",
    names.FLIPPED: "let the server return vectors as they are, without giving them the length 1",
    names.DIMENSION: "serve the recorded model, with all of its numbers",
    names.PREFIX: "put the recorded prefix before each input",
    names.ADDED_PREFIX: "take the prefix away that the server puts before each input",
    names.SPECIAL: "let the server add the tokenizer's special tokens",
    names.HEAD: "load the head of the adapter as well (modules_to_save)",
    names.ONLY_HEAD: "load the matrices of the adapter as well as its head",
    names.LABELS: "serve the labels in the order of training (id2label in config.json)",
    names.ENCODING: "ask for vectors as lists of numbers, or update the server",
}
"""Remedy of each fault, as the end of a sentence that begins with "what to do"."""


def to_do(fault: str | None) -> list[str]:
    """Line below a verdict with the remedy of its fault; empty if there is no fault, or no known remedy."""
    known = None if fault is None else REMEDIES.get(fault)
    return [] if known is None else [f"what to do: {known}"]
