"""What can be counted without a clock: FLOPs, saved activations, an estimate of the full runs.

    python -m appendix.bench --estimate         prints it, writes results/estimate.json

Everything here lives on the `meta` device, where tensors have shapes and no numbers.
"""

import json
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model import DiER
from runs import DIER, Method, build_parser, model_config, parameter_counts, resolve

TRAINING_IMAGES = {  # of the official training sets
    "mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "tiny-imagenet": 100_000,
    "bccd": 9_957, "oct2017": 83_484,
}  # fmt: skip
ASSUMED = {
    "gpu": "one with 150 TFLOP/s of bf16 and 48 GB, such as the paper's RTX A6000",
    "peak_flops": 150e12,
    "mfu": 0.25,
    "all_reduce_bytes_per_s": 10e9,
    "formula": "hours = steps x (batch x flops_per_image / (gpus x mfu x peak_flops) "
    "+ 2 (gpus - 1) / gpus x 4 x parameters / all_reduce_bytes_per_s) / 3600; "
    "memory = 20 x parameters + batch / gpus x saved_bytes_per_image; "
    "batch = the preset's, or one image a GPU where that is more",
    "not_counted": "evaluation, loading, overlap of all-reduce with backward, allocator slack; "
    "saved bytes are counted in fp32, bf16 keeps about half",
}


def flops_per_image(settings: dict[str, Any], method: Method = DIER) -> int:
    """Floating point operations of forward and backward for one image, counted on `meta`."""
    with torch.device("meta"):
        model = method.build(settings)
        x = torch.empty(2, settings["channels"], settings["size"], settings["size"])
        t = torch.zeros(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        (model(x, t, x) if method.denoises else model(x, t)).mean().backward()
    return counter.get_total_flops() // 2


def saved_bytes(settings: dict[str, Any]) -> int:
    """Bytes that forward keeps for backward, for each image, in fp32; weights not counted. Nothing
    is computed: the tensors live on `meta`."""
    kept: dict[int, int] = {}
    with torch.device("meta"):
        model = DiER(model_config(settings))
        x = torch.empty(2, settings["channels"], settings["size"], settings["size"])
        t = torch.zeros(2, dtype=torch.int64)
    model.checkpoint_activations(settings["checkpoint_activations"])
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(y: Tensor) -> Tensor:
        """Note a saved tensor once for each storage."""
        storage = y.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        loss = model(x, t, x)
        total = sum(kept.values())
    del loss
    return total // 2


def estimate() -> dict[str, Any]:
    """Hours and memory of the Table 4 presets at 200 epochs on 1, 8 and 64 GPUs: arithmetic on
    FLOPs and stated assumptions, not a measurement."""
    rows: list[dict[str, Any]] = []
    counted: dict[str, tuple[int, int]] = {}  # cifar10 and cifar100 have one model
    for data, images in TRAINING_IMAGES.items():
        flags = ["--data", data, "--preset", "paper", "--device", "cpu"]
        settings = resolve(build_parser().parse_args(flags))
        key = json.dumps(settings["model"])
        if key not in counted:
            counted[key] = flops_per_image(settings), saved_bytes(settings)
        flops, saved = counted[key]
        parameters = sum(parameter_counts(settings).values())
        for gpus in (1, 8, 64):
            batch = max(gpus, settings["batch_size"])  # a GPU needs an image
            steps = settings["epochs"] * images / batch
            compute = batch * flops / (gpus * ASSUMED["mfu"] * ASSUMED["peak_flops"])
            reduce = 2 * (gpus - 1) / gpus * 4 * parameters / ASSUMED["all_reduce_bytes_per_s"]
            memory = 20 * parameters + batch / gpus * saved
            rows.append({
                "data": data, "gpus": gpus, "hours": steps * (compute + reduce) / 3600,
                "memory_gb": memory / 1e9, "steps": round(steps), "batch_size": batch,
                "parameters": parameters, "flops_per_image": flops,
                "saved_bytes_per_image": saved, "all_reduce_bytes_per_step": 4 * parameters,
            })  # fmt: skip
    return {"measured": False, "assumptions": ASSUMED, "rows": rows}
