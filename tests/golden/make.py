"""What older commits gave, for test_golden.py. Of 31b420e the losses of 20 steps of every row, and a run that was
stopped; of 1051d40 a segmentation, its state half-way, and a prediction by it.

    git worktree add ../old 31b420e
    python tests/golden/make.py losses ../old
    OMP_NUM_THREADS=1 python tests/golden/make.py run ../old
    git worktree add ../later 1051d40
    OMP_NUM_THREADS=1 python tests/golden/make.py segmentation ../later

Run at 31b420e, in which each group of `--bn-group` images was a forward and backward of its own. Its step in float64:
where its sources say `.float()` or float32 in moco.py and local_loss.py, they are read as saying double.
"""

import json
import shutil
import sys
import tempfile
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

HERE = Path(__file__).parent
COMMIT, STEPS = "31b420e", 20
SEGMENTED = "random-linear-finetune-100-0-labelled"  # the segmentation run
NAME = "moco-local-zca-aligned"  # of the run
FLAGS = ("--data . --init random --arch resnet_basic --image-size 64 --size 128 --batch-size 8 --bn-group 4 --queue 32 "
         "--epochs 2 --lr 0.03 --ema 0.9")
LOCAL, ZCA, ALIGNED = " --local", " --zca --zca-group 4", " --geometric"
ROWS = {"moco": "", "moco-local": LOCAL, "moco-zca": ZCA, "moco-local-zca": LOCAL + ZCA,
        "moco-nogeo": " --no-geometric", "moco-zca-nogeo": ZCA + " --no-geometric",
        "moco-local-aligned": LOCAL + ALIGNED, "moco-local-zca-aligned": LOCAL + ZCA + ALIGNED}


def in_double(folder: Path) -> None:
    """Import the old local_loss.py and moco.py with what they compute in float32 in float64."""
    for name in ("local_loss", "moco"):
        source = (folder / f"{name}.py").read_text().replace(".float()", ".double()").replace("float32", "float64")
        sys.modules[name] = module = types.ModuleType(name)
        exec(compile(source, name, "exec"), module.__dict__)


def losses() -> None:
    """Write 20 steps of each row: all that `Trainer.step` returns."""
    import narrow

    patch = pytest.MonkeyPatch()
    narrow.register(patch)
    narrow.dyadic_boxes(patch)
    narrow.plain_views(patch)
    for row in ROWS:
        args = narrow.settings(FLAGS + ROWS[row])
        assert args.name == row
        trainer = narrow.trainer(args)
        steps = [trainer.step(t, narrow.slices(args, t)).tolist() for t in range(STEPS)]
        lines = ",\n".join(map(json.dumps, steps))
        told = f'{{"commit": "{COMMIT}", "flags": "{FLAGS + ROWS[row]}", "steps": [\n{lines}\n]}}\n'
        (HERE / f"{row}.json").write_text(told)


def run() -> None:
    """Write what the command left of a run that was stopped at step 3, and what it made of one that went on to 6."""
    import narrow

    import train_ssl
    from engine import runs

    narrow.register(pytest.MonkeyPatch())
    with tempfile.TemporaryDirectory() as folder:
        for out, steps in (("stopped", 3), ("whole", 6)):
            train_ssl.main([*narrow.ct_flags(Path(folder)), "--out", f"{folder}/{out}", "--steps", str(steps)])
        stopped, whole = (Path(folder) / out / NAME for out in ("stopped", "whole"))
        (HERE / NAME).mkdir(exist_ok=True)
        for name in ("config.json", "log.jsonl", "checkpoint.pt"):
            shutil.copy(stopped / name, HERE / NAME / name)
        after = {"commit": COMMIT, "log": runs.read_log(whole / "log.jsonl")[3:],
                 "weights": narrow.projections(runs.load(whole / "checkpoint.pt")["model"])}
        (HERE / "continued.json").write_text(json.dumps(after, indent=0) + "\n")


def segmentation() -> None:
    """Write what a segmentation left, but for its checkpoint that of half-way; and what that one predicts of a volume.
    """
    import narrow

    import train_seg
    from engine import runs

    patch = pytest.MonkeyPatch()
    narrow.register(patch)
    narrow.without_dropout(patch)
    with tempfile.TemporaryDirectory() as folder:
        train_seg.main([*narrow.labelled_flags(Path(folder)), "--out", f"{folder}/out"])
        run = Path(folder) / "out/seg" / SEGMENTED
        weights = narrow.projections(runs.load(run / "checkpoint.pt")["model"])
        (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
        train_seg.main(["--predict", f"{folder}/labelled/images/a.nii.gz", "--run", SEGMENTED, "--out", f"{folder}/out",
                        "--predict-out", f"{folder}/predicted"])
        (HERE / SEGMENTED).mkdir(exist_ok=True)
        for name in ("config.json", "log.jsonl", "validation.jsonl", "result.json", "checkpoint.pt"):
            shutil.copy(run / name, HERE / SEGMENTED / name)
        (HERE / SEGMENTED / "after.json").write_text(json.dumps({"commit": "1051d40", "weights": weights}) + "\n")
        labels = np.asarray(nib.load(f"{folder}/predicted/a.nii.gz").dataobj)
        np.savez_compressed(HERE / SEGMENTED / "prediction.npz", labels)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    sys.path[:0] = [str(folder), str(HERE.parent)]
    if what == "losses":
        in_double(folder)
        losses()
    else:
        segmentation() if what == "segmentation" else run()
