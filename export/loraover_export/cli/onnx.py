"""The command `loraover export onnx`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.onnx.request import OnnxRequest

onnx = request_command(
    OnnxRequest,
    reporting("loraover_export.onnx.run:export_onnx", "loraover_export.onnx.show:show_report"),
    examples=[
        "loraover export onnx folded -o onnx-merged --mode merged --precision int4",
        "loraover export onnx adapter-a adapter-b -o onnx-swappable --mode swappable --name support --name sales",
        "loraover export onnx adapter-a adapter-b -o onnx-web --mode swappable --web",
        "loraover export onnx adapter-c -o more --mode swappable --web --graph onnx-web",
    ],
    help="""Write ONNX graphs with SOURCE merged into the weights, or with adapters to swap at run time.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA; swappable takes several. Decoder models
    become one onnxruntime-genai graph with a KV cache, T5 an encoder and a decoder, classifiers one graph.

    Exit code 1: ONNX Runtime's outputs are too far from the PyTorch reference's, and nothing was left at the
    output. Exit code 3: the export was written, but an adapter changes logits too little for the check to distinguish
    it from one that does nothing.
    """,
)
