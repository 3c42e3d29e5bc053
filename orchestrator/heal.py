"""What killed writers and damaged disks have left in results, found and taken away, so that it is made again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError, safe_open

from flatmin.bucket import BucketPath, Place
from flatmin.compact import forget
from flatmin.errors import ResultsError
from flatmin.results import Results
from flatmin.scan import names


def heal(results: Results, console: Console) -> None:
    """Remove what cannot be read, so that it is made again, and what killed writers have left.

    A trial whose `epochs` or weights are lost is trained again; lost `sharpness` is measured from the weights.
    Only the owner of the lease may do this: a running worker's half-written file looks like a dead one's.

    Raises:
        ResultsError: A file is there and the system does not give it, which says nothing of what it holds.
    """
    results.clear_temporary()
    unreadable = results.unreadable()
    for _, file, error in unreadable:
        if isinstance(error, OSError) and error.errno is not None:
            raise _kept(file, error)
    for table, file, _ in unreadable:
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
    """Return the committed trials whose weights are missing or damaged.

    Raises:
        ResultsError: A file is there and the system does not give it.
    """
    trial_ids = list(dict.fromkeys(results.table("models")["trial_id"].to_pylist()))
    if isinstance(results.path, BucketPath):  # where an object that is there is whole, and takes long to get
        there = {file.stem for file in (results.path / "checkpoints").glob("*.safetensors")}
        return [trial_id for trial_id in trial_ids if trial_id not in there]
    return [trial_id for trial_id in trial_ids if _is_lost(Path(str(results.weights_file(trial_id))))]


def _is_lost(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy"):
            return False
    except SafetensorError:
        return True
    except OSError as error:  # to safetensors, a file that it may not open is not there
        try:
            file.open("rb").close()
        except FileNotFoundError:
            return True
        except OSError as reason:
            raise _kept(file, reason) from None
        raise _kept(file, error) from None


def _kept(file: Place, error: OSError) -> ResultsError:
    return ResultsError(
        f"'{file}' cannot be read: {error.strerror or error}; nothing was removed. Launch again once it can be, or "
        "remove it to have what it held made again"
    )
