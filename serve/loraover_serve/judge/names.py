"""Names of the faults, as reports have them."""

from __future__ import annotations

NOT_APPLIED = "served as base"
SCALED = "wrong scaling"
TRANSPOSED = "transposed"
PERMUTED = "rows of q and k in another order"
LEFT_OUT = "modules left out"
ROUNDED = "adapter rounded"
OTHER_BASE = "another base model"
TEMPLATE = "another chat template"
BASE_OR_TEMPLATE = "another base model or chat template"
IN_BASE = "adapter in the base model"
LEAKS = "adapter leaks into the base model's answers in a mixed batch"
CHANGED = "the adapter's answers change in a mixed batch"
CHANGED_BY_OTHER = "the adapter's answers change in a batch with another adapter"
TEMPERATURE = "logprobs at another temperature"
PENALTY = "logprobs with a repetition penalty"
EXTRA_TOKEN = "a token added to each prompt"
POSITIONS = "positions of the base model (rope_theta)"
WINDOW = "attention window of the base model"
BASE_LAYERS = "layers of the base model missing or swapped"
INTERMITTENT = "some answers are the base model's"
DISAGREE = "answers to one question disagree"
SILENT = "some answers have no logprobs"
CACHED = "some answers come from a cache"
ENDS_EARLY = "answers end early"
DECODED = "generated answers lack the adapter"
UNLIKE = "base model answered by something else"
LAYERS = "layers of the adapter missing or swapped"
ANOTHER = "another adapter"
STALE = "stale adapter"
STALE_OF_BASE = "stale cache of the base model"
STALE_OF_EARLIER = "stale cache of an earlier version"
STALE_OF_LATER = "stale cache of a later version"
STALE_OF_ADAPTER = "stale cache of the adapter"
STALE_OF_OTHERS = "stale cache of other weights"
STALE_CACHES = (STALE_OF_BASE, STALE_OF_EARLIER, STALE_OF_LATER, STALE_OF_ADAPTER, STALE_OF_OTHERS)
"""Faults of a cache of keys and values: the server answers right where it has kept nothing."""
OF_EARLIER_WEIGHTS = (STALE, STALE_OF_LATER)
"""Faults of a server that still has, or has again, the weights of an earlier version."""
CROSSED = "answers of another model"
NO_KNOWN_WEIGHTS = "answers of no known weights"
CACHE_OF_RESPONSES = "a cache of responses"
SERVER_ENDED = "the server ended"
IN_CHURN = (CROSSED, NO_KNOWN_WEIGHTS, CACHE_OF_RESPONSES, SERVER_ENDED)
"""Faults of a server whose adapters come and go."""

POOLING = "another pooling"
RAW = "vectors not normalised"
FLIPPED = "vectors normalised"
DIMENSION = "another dimension"
PREFIX = "prefix of the input missing"
ADDED_PREFIX = "a prefix added to the input"
SPECIAL = "special tokens of the input missing"
CUT = "input cut off"
HEAD = "head of the adapter left out"
ONLY_HEAD = "only the head of the adapter applied"
LABELS = "labels in another order"
ENCODING = "numbers in base64 are others"
OF_VECTORS = (POOLING, RAW, FLIPPED, DIMENSION, PREFIX, ADDED_PREFIX, SPECIAL, CUT, LABELS, ENCODING)
"""Faults of a server that computes vectors or classes otherwise, for every model alike."""

COARSE_CACHE = "KV cache in fp8"
"""Name of a coarse KV cache. It is not a fault if the declared format explains the rest of the noise."""

NOT_APPLIED_DETAIL = (
    "the adapter is not loaded, its tensors' names do not match, or the server takes it by another name (SGLang: "
    "BASE:ADAPTER)"
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn")
"""Last parts of the paths of attention's modules."""


def multiplied(factor: float) -> str:
    """The fault of an adapter with a factor, in words."""
    return f"every delta_W is multiplied by {factor:.3g}"
