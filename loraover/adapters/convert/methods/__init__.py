"""Every kind of adapter that PEFT has, with its way to a LoRA, or the reason why there is none.

A new kind is one class and one line here.
"""

from __future__ import annotations

from loraover.adapters.convert.methods.base import AnyMethod, Refused
from loraover.adapters.convert.methods.blocks import C3a, Gralora, Miss
from loraover.adapters.convert.methods.lora import Lora
from loraover.adapters.convert.methods.products import AdaLora, LoHa, LoKr, VbLora
from loraover.adapters.convert.methods.projections import Pvera, RandLora, UniLora, Vera
from loraover.adapters.convert.methods.rotations import Boft, Hra, Oft, Road
from loraover.adapters.convert.methods.scalings import Delora, Glora, Hira, Ia3
from loraover.adapters.convert.methods.sparse import FourierFt, Shira, Supertuning
from loraover.adapters.convert.methods.subspaces import Deft, Osf, Peanut
from loraover.adapters.convert.methods.tokens import TrainableTokens

PROMPT = "adds trained vectors to the prompt or the cache and changes no weight; serve it with PEFT."
ROUTED = "mixes its matrices by the input, so its change of the weights is not one delta; serve it with PEFT."
UNSAVED = "depends on what its files do not hold"
MERGE = "Merge it into the base model with PEFT's merge_and_unload."

METHODS: dict[str, AnyMethod | Refused] = {
    "ADALORA": AdaLora(),
    "ADAMSS": Refused(f"{UNSAVED}: the rows that each subspace changes, which PEFT finds by clustering. {MERGE}"),
    "ADAPTION_PROMPT": Refused(PROMPT),
    "BEFT": Refused("trains biases only, and changes no weight matrix; serve it with PEFT, or merge it."),
    "BOFT": Boft(),
    "C3A": C3a(),
    "CARTRIDGE": Refused(PROMPT),
    "CPT": Refused(PROMPT),
    "DEFT": Deft(),
    "DELORA": Delora(),
    "FOURIERFT": FourierFt(),
    "FROD": Refused(f"{UNSAVED}: one of the two bases that it decomposes all layers in together. {MERGE}"),
    "GLORA": Glora(),
    "GRALORA": Gralora(),
    "HIRA": Hira(),
    "HRA": Hra(),
    "IA3": Ia3(),
    "LILY": Refused(ROUTED),
    "LN_TUNING": Refused("trains norms only, and changes no weight matrix; serve it with PEFT, or merge it."),
    "LOHA": LoHa(),
    "LOKR": LoKr(),
    "LORA": Lora(),
    "MISS": Miss(),
    "MULTITASK_PROMPT_TUNING": Refused(PROMPT),
    "OFT": Oft(),
    "OSF": Osf(),
    "PEANUT": Peanut(),
    "POLY": Refused("mixes its matrices by the task, so its change of the weights is not one delta; use PEFT."),
    "PREFIX_TUNING": Refused(PROMPT),
    "PROMPT_TUNING": Refused(PROMPT),
    "PSOFT": Refused(f"{UNSAVED}: the signs of singular vectors, which depend on the machine. {MERGE}"),
    "PVERA": Pvera(),
    "P_TUNING": Refused(PROMPT),
    "RANDLORA": RandLora(),
    "ROAD": Road(),
    "SHADOW": Refused("runs a second network beside the model, and changes no weight; serve it with PEFT."),
    "SHIRA": Shira(),
    "SUPERTUNING": Supertuning(),
    "TINYLORA": Refused(f"{UNSAVED}: which of its trained vectors belongs to which module. {MERGE}"),
    "TRAINABLE_TOKENS": TrainableTokens(),
    "UNILORA": UniLora(),
    "VBLORA": VbLora(),
    "VERA": Vera(),
    "WAVEFT": Refused(f"needs tables of wavelets, which this version does not have. {MERGE}"),
    "XLORA": Refused(ROUTED),
}
"""Ways to a LoRA by PEFT's `peft_type`."""
