"""What killed writers and damaged disks have left in results, found and taken away, so that it is made again."""

from __future__ import annotations

from rich.console import Console
from safetensors import SafetensorError, safe_open

from flatmin.bucket import BucketPath
from flatmin.compact import forget
from flatmin.results import Results
from flatmin.scan import names


def heal(results: Results, console: Console) -> None:
    """Remove what cannot be read, so that it is made again, and what killed writers have left.

    A trial whose `epochs` or weights are lost is trained again; lost `sharpness` is measured from the weights.
    Only the owner of the lease may do this: a running worker's half-written file looks like a dead one's.
    """
    results.clear_temporary()
    for table, file in results.unreadable():
        console.print(f"[yellow]{file} cannot be read; what it held is made again", highlight=False)
        forget(results, table, [file.stem])
        if table == "epochs":  # of a merged file nobody knows any more whose they were
            forget(results, "models", names(results.path, "models") - names(results.path, "epochs"))
    left_out = results.check_schema().get("weights") is False
    forgotten = []
    for trial_id in lost_weights(results):
        if left_out and not results.weights_file(trial_id).exists():
            continue
        console.print(
            f"[yellow]{results.weights_file(trial_id)} cannot be read; its models are trained again", highlight=False
        )
        forgotten.append(trial_id)
    if forgotten:
        forget(results, "models", forgotten)


def lost_weights(results: Results) -> list[str]:
    """Return the committed trials whose weights are missing or damaged."""
    trial_ids = list(dict.fromkeys(results.table("models")["trial_id"].to_pylist()))
    if isinstance(results.path, BucketPath):  # where an object that is there is whole, and takes long to get
        there = {file.stem for file in (results.path / "checkpoints").glob("*.safetensors")}
        return [trial_id for trial_id in trial_ids if trial_id not in there]
    lost = []
    for trial_id in trial_ids:
        try:
            with safe_open(results.weights_file(trial_id), framework="numpy"):
                pass
        except (OSError, SafetensorError):
            lost.append(trial_id)
    return lost
