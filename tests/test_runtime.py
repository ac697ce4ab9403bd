"""runtime.py: atomic checkpoints, the run folder, precision, backbones from files."""

import json
import math
import pickle

import pytest
import torch
import torchvision

import runtime
from runtime import BadInput, Run


def run(tmp_path, config=None, overwrite=False):
    return Run(tmp_path / "run", config or {"lr": 0.1}, overwrite, True)


def test_config_must_agree_and_overwrite_starts_over(tmp_path):
    first = run(tmp_path)
    first.checkpoint({"step": 3})
    first.log([{"step": 3}])
    first.lock.close()
    with pytest.raises(BadInput, match="lr: 0.1 there, 0.2 here"):
        run(tmp_path, {"lr": 0.2})
    again = run(tmp_path, {"lr": 0.2}, overwrite=True)
    assert again.resume() is None and json.loads((tmp_path / "run/config.json").read_text()) == {"lr": 0.2}


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    r = run(tmp_path)
    r.log([{"step": s, "loss": s / 2} for s in (1, 2)])
    r.checkpoint({"step": 2})
    r.log([{"step": s, "loss": s / 2} for s in (3, 4)])
    with open(r.folder / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    assert r.resume()["step"] == 2
    assert [x["step"] for x in runtime.read_log(r.folder / "log.jsonl")] == [1, 2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys):
    r = run(tmp_path)
    r.checkpoint({"step": 1, "x": torch.ones(1000)})
    r.checkpoint({"step": 2, "x": torch.ones(1000)})
    raw = r.path.read_bytes()
    r.path.write_bytes(raw[: len(raw) // 2])
    assert r.resume()["step"] == 1 and "checkpoint.pt" in capsys.readouterr().err
    r.previous.write_bytes(b"")
    with pytest.raises(BadInput, match="--overwrite"):
        r.resume()


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match="x.pt"):
        runtime.load(tmp_path / "x.pt")
    torch.save({"a": Evil()}, tmp_path / "y.pt")
    with pytest.raises(BadInput, match="more than tensors"):
        runtime.load(tmp_path / "y.pt")


def test_streams_of_random_numbers_differ_by_seed_purpose_and_step():
    drawn = {runtime.rng(s, p, t).random() for s in (0, 1) for p in (0, 1) for t in (0, 1)}
    assert len(drawn) == 8 and runtime.rng(1, 0, 0).random() == runtime.rng(1, 0, 0).random()


def test_non_finite_losses_name_step_and_slices(tmp_path):
    r = run(tmp_path)
    records = [{"step": 4, "loss": 1.0}, {"step": 5, "loss": math.nan}]
    with pytest.raises(BadInput, match="step 5.*Case_7 slice 3.*no checkpoint"):
        runtime.refuse_non_finite(records, lambda step: ["Case_7 slice 3"], r)


def test_backbones_from_files(tmp_path, capsys):
    net = torchvision.models.resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
                | {"module.queue": torch.ones(3)}}, tmp_path / "moco.pth")
    for name in ("plain", "moco"):
        loaded = runtime.build_backbone(str(tmp_path / f"{name}.pth"), "resnet18")
        for (k, a), b in zip(net.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert k.startswith("fc.") or torch.equal(a, b)
    assert "matched" in capsys.readouterr().out
    for arch in ("resnet34", "resnet50"):
        with pytest.raises(BadInput, match=f"plain.pth: not a backbone of architecture {arch}"):
            runtime.build_backbone(str(tmp_path / "plain.pth"), arch)
    with pytest.raises(BadInput, match="no such file"):
        runtime.build_backbone(str(tmp_path / "none.pth"), "resnet18")
    with pytest.raises(BadInput, match="--arch vgg16"):
        runtime.build_backbone("random", "vgg16")


def test_a_failed_download_names_the_choices(monkeypatch):
    def offline(*args, **kw):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(BadInput, match="--init random, or --init FILE"):
        runtime.build_backbone("imagenet", "resnet18")
