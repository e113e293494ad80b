"""What --resume reads: a checkpoint of Run.save(), and how a run goes on from it. Loaded only then."""

import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from common.cli import FORMAT, UserError


def load_checkpoint(path: Path) -> dict:
    """What Run.save() wrote, from the file or its run folder.

    Only tensors and plain values are unpickled. UserError: no checkpoint, or one that is damaged or too old.
    """
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():  # to open a pipe would take forever
        raise UserError(f"there is no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format {checkpoint['format']}, not {FORMAT}")
    except Exception as error:  # whatever a damaged file provokes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is damaged, no checkpoint, or of another version ({reason})") from error
    return checkpoint


def restore(run, path: Path, data: dict) -> None:
    """Go on where a checkpoint was written: the agent, its memory, the step, results and randomness of a run.

    UserError: the checkpoint is finished, or another run's, or does not fit what the arguments ask for.
    """
    saved, new, args = load_checkpoint(path), run.results, run.args
    if "optimizers" not in saved:  # a best.pt
        raise UserError(f"{path} is a policy without its optimizers; only a checkpoint.pt goes on")
    if path.is_file() and path.name != "checkpoint.pt" and (run.folder / "checkpoint.pt").exists():
        raise UserError(f"{run.folder} has a checkpoint.pt; copy {path.name} elsewhere to resume it")
    run.results, run.step = saved["results"], saved["step"]
    for name in ("script", "env_id", "seed"):
        if run.results[name] != new[name]:
            raise UserError(f"{path} is of {name} {run.results[name]}, not {new[name]}: start a new run")
    if run.step >= args.total_steps and not run.evaluation_due():
        run.write_results()  # a crash may have kept them back
        raise UserError(f"{path} is finished, at step {run.step:,}; larger --total-steps add more")
    old = saved["args"] | {"resume": args.resume}
    changed = {name: value for name, value in asdict(args).items() if value != old[name]}
    is_same = data["data_checksum"] == run.results["data_checksum"]
    if not is_same and not {"dataset", "action_bounds"} & changed.keys():
        raise UserError(f"the data of {data['data']} changed since the run in {run.folder} began")
    run.results |= data
    if changed:
        print("resumed with", ", ".join(f"{name} {old[name]} -> {new}" for name, new in changed.items()))
    try:
        run.agent.load_state_dict(saved["agent"])
        for name, optimizer in run.agent.optimizers.items():
            own = optimizer.state_dict()["param_groups"]  # of this device and these arguments
            optimizer.load_state_dict(saved["optimizers"][name] | {"param_groups": own})
        run.agent.set_step(run.step - 1)
        run.names, run.losses = saved["loss_names"], list(saved["losses"].to(run.agent.device))
        torch.set_rng_state(saved["rng"])
        if run.agent.device.type == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], run.agent.device)
        if run.memory:
            run.memory.load(run.folder, saved["memory"])
    except Exception as error:  # whatever other sizes provoke
        raise UserError(f"{path} does not fit: {str(error).splitlines()[-1].strip()}") from error
