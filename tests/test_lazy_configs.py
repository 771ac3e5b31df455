"""LazyConfigs: the YAML configs' models, and training from them."""

import copy
import json
import sys

import lazyconfig_train_net
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from iou_balanced_d2 import model_zoo
from iou_balanced_d2.arguments import launch_argument_parser
from iou_balanced_d2.errors import UserError

from .command import forget_own_data
from .toy import toy_batch

NAMES = ["retinanet_R_50_FPN_1x", "fcos_R_50_FPN_1x"]
OWN = """
from detectron2.layers import ShapeSpec
from iou_balanced_d2.data import register_coco_json
from iou_balanced_d2.model_zoo import get_config

register_coco_json("own", {json!r}, {images!r})
_base = get_config("lazy/COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.py")
dataloader, lr_multiplier = _base.dataloader, _base.lr_multiplier
optimizer, model, train = _base.optimizer, _base.model, _base.train
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.bottom_up.stages.norm = model.backbone.bottom_up.stem.norm = "BN"
model.backbone.bottom_up.freeze_at = 0
model.backbone.out_channels = 16
model.backbone.top_block.in_channels = 512
model.head.conv_dims = [16]
model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.num_classes = 2
model.iou_balanced.loc_weight_steps = 1
for _part in (dataloader.train, dataloader.test):
    _part.dataset.names = "own"
    _part.num_workers = 0
    _part.mapper.augmentations[0].short_edge_length = [64, 64]
dataloader.train.total_batch_size = 2
train.init_checkpoint = ""
train.max_iter = 2
train.output_dir = "out"
"""


def names_of(name):
    yaml_name = f"COCO-Detection/{name}.yaml"
    if name.startswith("fcos"):
        yaml_name = f"FCOS/{yaml_name}"
    return yaml_name, f"lazy/COCO-Detection/{name}.py"


def both(name):
    """The model of the YAML config and that of the LazyConfig, on the CPU."""
    yaml_name, lazy_name = names_of(name)
    cfg = model_zoo.get_config(yaml_name)
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg), instantiate(model_zoo.get_config(lazy_name).model)


@pytest.mark.parametrize("name", NAMES)
def test_models_and_losses_are_those_of_the_yaml_config(name):
    from_yaml, from_lazy = both(f"{name}_iou_balanced")
    assert type(from_yaml) is type(from_lazy)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (from_yaml, from_lazy)]
    assert shapes[0] == shapes[1]
    trained = [[k for k, v in m.named_parameters() if v.requires_grad]
               for m in (from_yaml, from_lazy)]  # fmt: skip
    assert trained[0] == trained[1]
    from_lazy.load_state_dict(from_yaml.state_dict())
    losses = []
    for model in (from_yaml, from_lazy):
        with EventStorage(0), torch.no_grad():
            losses.append(model(copy.deepcopy(toy_batch())))
    assert losses[0] == losses[1]
    assert all(value > 0 for value in losses[0].values())


@pytest.mark.parametrize("name", [f"{n}{v}" for n in NAMES for v in ("", "_iou_balanced")])
def test_settings_are_those_of_the_yaml_config(name):
    yaml_name, lazy_name = names_of(name)
    cfg, lazy = model_zoo.get_config(yaml_name), model_zoo.get_config(lazy_name)
    keys = cfg.MODEL.IOU_BALANCED
    power = 1.5 if name.endswith("iou_balanced") else 0.0
    options = lazy.model.iou_balanced
    assert (options.cls_eta, options.loc_lambda) == (power, power)
    assert (keys.CLS_ETA, keys.LOC_LAMBDA) == (power, power)
    assert options.loc_weight_rule == keys.LOC_WEIGHT_RULE
    assert (lazy.train.max_iter, lazy.optimizer.lr) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR)
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS


@pytest.fixture
def command(tmp_path, own_data, monkeypatch):
    """Run the script in this process on a toy model and own data; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN.format(json=own_data[0], images=own_data[1]))

    def run(*args):
        forget_own_data()
        argv = ["lazyconfig_train_net.py", "--config-file", "own.py", *args]
        monkeypatch.setattr(sys, "argv", argv)
        return lazyconfig_train_net.run()

    return run


def test_it_trains_resumes_and_evaluates(command, tmp_path):
    assert command() == 0
    state = torch.load(tmp_path / "out/model_final.pth", weights_only=True)["iou_balanced"]
    assert command("--resume", "train.max_iter=3") == 0
    resumed = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    assert resumed["iteration"] == 2
    # w_loc was measured in the first training and kept.
    before, after = (s["losses"][0]["w_loc_measurement"] for s in (state, resumed["iou_balanced"]))
    assert before["w_loc"] == after["w_loc"] > 1
    assert torch.equal(before["sums"], after["sums"])
    weights = "train.init_checkpoint=out/model_final.pth"
    assert command("--eval-only", weights, "train.output_dir=evaluated") == 0
    results = tmp_path / "evaluated/inference/own/coco_instances_results.json"
    assert isinstance(json.loads(results.read_text()), list)


class OwnEvaluator(DatasetEvaluator):
    def evaluate(self):
        return {"bbox": {"AP": 7.0}}


def test_the_evaluator_is_that_of_the_config():
    target = f"{__name__}.{OwnEvaluator.__name__}"
    cfg = OmegaConf.create({"dataloader": {"evaluator": {"_target_": target}}})
    assert type(lazyconfig_train_net.build_evaluator(cfg, "own", "out")) is OwnEvaluator


def test_two_processes_train_on_the_cpu(command, tmp_path):
    assert command("--num-gpus", "2", "train.device=cpu") == 0
    state = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    assert state["iteration"] == 1
    assert "World size: 2" in (tmp_path / "out/log.txt").read_text()


def test_a_loss_that_is_not_finite_is_one_line(command, capsys):
    assert command("optimizer.lr=1e30", "train.max_iter=9") == 2
    out, err = capsys.readouterr()
    assert " at iteration " in err.splitlines()[-1]
    assert "Traceback" not in out + err


def test_mistakes_are_one_line(command, capsys):
    for args, words in (
        (["train.max_itr=3"], "unknown key 'train.max_itr'; did you mean 'train.max_iter'?"),
        (["model.iou_balanced.cls_et=3"], "did you mean 'model.iou_balanced.cls_eta'?"),
        (["model.iou_balanced.cls_eta=-3"], "CLS_ETA must be a finite number >= 0, got -3"),
        (["train.max_iter=3", "--eval-only"], "'--eval-only' is no KEY=VALUE pair"),
        (["train.init_checkpoint=no.pth"], "train.init_checkpoint 'no.pth' not found"),
        (["train.init_checkpoint='no.pth?matching_heuristics=True'"], "not found"),
        (["train.device=5"], "train.device must be a text, got 5"),
        (["model=3"], "model must have keys of its own, got 3"),
        (["train.amp=null"], "train.amp must have keys of its own, got None"),
        (["train.max_iter=[1"], "train.max_iter=[1: "),
        (["train.max_iter=100,200"], "train.max_iter=100,200: "),
        (["train.amp.enabled=True", "train.device=cpu"], "train.amp.enabled needs a GPU"),
        (["--eval-only"], "nothing to evaluate"),
        (["--config-file", "no.py"], "'no.py' not found"),
    ):
        assert command(*args) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("lazyconfig_train_net.py: error: ")
        assert words in err


def test_help_shows_the_keys(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("--help")
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for line in ("model.iou_balanced.cls_eta=1.5", "train.max_iter=90000", "train.output_dir="):
        assert f"\n  {line}" in out


def test_broken_files_are_named(tmp_path):
    for text, words in (("model = 1 +", "SyntaxError"), ("train = {}", "does not define model")):
        path = tmp_path / "broken.py"
        path.write_text(text)
        args = launch_argument_parser().parse_args(["--config-file", str(path)])
        with pytest.raises(UserError, match=words):
            lazyconfig_train_net.load(args)


def test_they_are_read_without_pkg_resources(monkeypatch):
    """detectron2.model_zoo imports it, which newer versions of setuptools do not have."""
    for name in [name for name in sys.modules if name.startswith("detectron2.model_zoo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    for name in NAMES:
        assert model_zoo.get_config(names_of(name)[1]).train.max_iter == 90000
    with pytest.raises(RuntimeError, match="available in the model zoo of detectron2"):
        model_zoo.get_detectron2_config("no.py")


def test_every_lazy_config_has_all_parts():
    for name in NAMES:
        for variant in ("", "_iou_balanced"):
            path = model_zoo.get_config_file(names_of(f"{name}{variant}")[1])
            assert set(lazyconfig_train_net.PARTS) <= set(LazyConfig.load(path))
