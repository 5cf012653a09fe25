"""The project's measured claims as named commands: a preset and a number of GPUs in, arguments out.

What stands on the command line after the preset overrules it. Steps are few enough for ten minutes on four H200;
1m-whole, 2m-whole (a quarter of an hour; what is kept fills GPUs and host alike) and degrees-1m are for eight.
"""

from __future__ import annotations

from ultralong_ray.types import UserError


def arguments(name: str, gpus: int, verb: str = "train") -> list[str]:
    """The arguments of a preset of `verb`. Raises UserError for a name that there is not."""
    half = max(1, gpus // 2)
    mixed = f"{half}x{gpus // half}"
    warmup = "--warmup-length 65536"  # where a whole step would take minutes of all GPUs
    prefill = {
        "128k": "--length 131072 --decode 32",
        "1m": "--length 1048576 --decode 32",
        "1m-chunks": "--length 1048576 --decode 32 --prefill-chunk 262144",
    }
    train = {
        "128k": "--length 131072 --layers 32 --steps 3 --peers alst",
        "512k": "--length 524288 --layers 32 --steps 1 --peers alst --peer-layers 8",
        "512k-8": "--length 524288 --layers 8 --steps 2 --peers alst",
        "1m": "--length 1048576 --layers 16 --keep host --steps 1",
        "1m-whole": f"--length 1048576 --layers 32 --steps 1 {warmup}",
        "2m-whole": (
            "--length 2097152 --layers 32 --keep host --device-layers 18 --rows 0.75 --steps 1 --limit-seconds 1800 "
            f"{warmup}"
        ),
        "4m-layer": "--long 4194304 --layers 1",
        "degrees-256k": f"--length 262144 --layers 2 --steps 3 --compare-degrees {gpus}x1,1x{gpus},{mixed}",
        "degrees-1m": f"--length 1048576 --layers 8 --steps 1 {warmup} --also degrees={mixed} --also degrees=2x{half}",
        "ring-256k": f"--length 262144 --layers 8 --steps 3 --also degrees=1x{gpus} --also degrees={mixed} --profile",
        "keep-512k": "--length 524288 --layers 8 --steps 2 --also keep=host --profile",
        "rows-512k": "--length 524288 --layers 4 --steps 2 --also rows=0.5 --also rows=0",
        "sweep": (
            f"--length 65536 --layers 32 --steps 2 --also length=131072,layers=16 "
            f"--also length=262144,layers=8,degrees=1x{gpus} --also length=524288,layers=4,keep=host "
            f"--also length=262144,layers=8,rows=0.5,degrees={mixed} --also length=131072,layers=32,keep=host,rows=0 "
            f"--also length=524288,layers=6,keep=host,rows=0.5"
        ),
    }
    presets = prefill if verb == "prefill" else train
    if name not in presets:
        raise UserError(f"--preset {name}: no such preset; there are {', '.join(presets)}")
    return presets[name].split()
