"""Files that are no checkpoints of this model, or of none: one line each, nothing half loaded."""

import collections
import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from iou_balanced_d2.engine.checkpoint import LossState, RobustCheckpointer
from iou_balanced_d2.engine.main import evaluate
from iou_balanced_d2.engine.optimizer import WeightsAverage
from iou_balanced_d2.engine.safe_load import weights_of
from iou_balanced_d2.engine.train_step import StepTrainer
from iou_balanced_d2.engine.trainer import Trainer
from iou_balanced_d2.errors import UserError

from ..toy import toy_config, toy_model


def refusal(function, *args, **kwargs):
    """The message of the UserError, checked to be one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "PyTorch's advice to run a file's code"
    return str(caught.value)


def trained(folder=""):
    """A checkpointer of all that a training has, and its trainer."""
    model = nn.Linear(2, 2)
    trainer = StepTrainer(model, [], torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    model(torch.ones(1, 2)).sum().backward()
    trainer.optimizer.step()
    trainer.iter = 7
    average = WeightsAverage(model, 0.9)
    average.start()
    return RobustCheckpointer(
        model, str(folder), trainer=trainer, iou_balanced=LossState(model), ema=average
    )


def good():
    """What :func:`trained` saves."""
    checkpointer = trained()
    states = {key: x.state_dict() for key, x in checkpointer.checkpointables.items()}
    return {"model": dict(checkpointer.model.state_dict()), **states, "iteration": 7}


W = torch.ones(2, 2)
WIDE = {"weight": torch.ones(5, 2), "bias": torch.ones(5)}
# The content of a file -> what the line says.
CONTENTS = {
    "none": (None, "is not a dict of weights"),
    "a number": (3, "is not a dict of weights"),
    "a text": ("weights", "is not a dict of weights"),
    "a tensor": (W, "is not a dict of weights"),
    "a list": ([W, W], "is not a dict of weights"),
    "an empty dict": ({}, "has 0 of the model's"),
    "no weights": ({"model": {}}, "has 0 of the model's"),
    "model none": ({"model": None}, "NoneType instead of weights"),
    "model a list": ({"model": [W]}, "list instead of weights"),
    "model a tensor": ({"model": W}, "Tensor instead of weights"),
    "model of models": ({"model": {"model": {"weight": W}}}, "'model' is a dict, not a tensor"),
    "state_dict": ({"state_dict": {"weight": W}}, "'state_dict' is a dict, not a tensor"),
    "numbers as names": ({"model": {1: W}}, "the name 1 is not a text"),
    "none as name": ({None: W}, "the name None is not a text"),
    "a tuple as name": ({"model": {("weight",): W}}, "the name ('weight',) is not a text"),
    "a number as weight": ({"model": {"weight": 1.0}}, "'weight' is a float, not a tensor"),
    "a list of numbers": ({"weight": [[1.0, 2.0]]}, "'weight' is a list, not a tensor"),
    "sparse": ({"weight": W.to_sparse(), "bias": W[0]}, "'weight': "),
    "quantized": ({"weight": torch.quantize_per_tensor(W, 1.0, 0, torch.qint8)}, "'weight': "),
    "meta": ({"weight": torch.ones(2, 2, device="meta")}, "'weight': "),
    "expanded": ({"weight": torch.ones(1).expand(2**20, 2**20)}, "larger than its data"),
    "nan": ({"weight": torch.tensor([[1.0, np.nan]] * 2)}, "'weight': it holds NaN"),
    "other names": ({"fc.weight": W}, "its names are 'fc.weight', ..., the model's weight, bias"),
    "all of other shapes": (WIDE, "has 0 of the model's"),
}  # fmt: skip


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("case", CONTENTS)
def test_odd_contents_are_named(tmp_path, case):
    content, said = CONTENTS[case]
    path = write(tmp_path / "x.pth", content)
    checkpointer = trained()
    before = checkpointer.model.weight.detach().clone()
    assert said in (message := refusal(checkpointer.resume_or_load, path, resume=False))
    assert repr(path) in message
    assert torch.equal(checkpointer.model.weight, before)


# Of other projects' layouts: the file's suffix, its content, and what the line says.
OTHERS = [
    (".pkl", {"blobs": [1, 2]}, "list instead of weights"),
    (".pkl", {"blobs": None}, "NoneType instead of weights"),
    (".pkl", {1: np.ones(2)}, "the name 1 is not a text"),
    (".pkl", {"blobs": {1: np.ones(2)}}, "the name 1 is not a text"),
    (".pyth", {"model_state": [1]}, "list instead of weights"),
    (".pyth", {"model_state": {1: W}}, "the name 1 is not a text"),
]


@pytest.mark.parametrize(("suffix", "content", "said"), OTHERS)
def test_odd_contents_of_other_layouts_are_named(tmp_path, suffix, content, said):
    path = write(tmp_path / f"x{suffix}", content)
    assert said in refusal(trained().resume_or_load, path, resume=False)


def test_torchvisions_vgg16_for_ssd_may_hold_nan_where_ssd_has_no_layers():
    nan = torch.full((2, 2), np.nan)
    weights = {"features.0.weight": W, "classifier.0.weight": nan}
    assert weights_of("vgg.pth", dict(weights)).keys() == weights.keys()
    with pytest.raises(UserError, match=r"'features.*weight': it holds NaN"):
        weights_of("vgg.pth", {**weights, "features.0.weight": nan})


# Parts of a checkpoint -> what is in their place.
PARTS = {
    "trainer none": ("trainer", None),
    "trainer empty": ("trainer", {}),
    "trainer a list": ("trainer", [1, 2]),
    "no optimizer": ("trainer", {"iteration": 7}),
    "optimizer none": ("trainer", {"iteration": 7, "optimizer": None}),
    "optimizer empty": ("trainer", {"iteration": 7, "optimizer": {}}),
    "ema none": ("ema", None),
    "ema of other weights": ("ema", {"other": W}),
    "ema of other shapes": ("ema", WIDE),
    "losses none": ("iou_balanced", None),
    "losses empty": ("iou_balanced", {}),
}


@pytest.mark.parametrize("case", PARTS)
def test_odd_states_of_a_training_are_named(tmp_path, case):
    key, value = PARTS[case]
    write(tmp_path / "model_0000007.pth", {**good(), key: value})
    message = refusal(trained(tmp_path).resume_or_load, "", resume=True)
    assert "model_0000007.pth': its '" + key in message


def test_the_optimizer_of_other_parameters_is_refused(tmp_path):
    content = good()
    content["trainer"]["optimizer"]["state"][0]["momentum_buffer"] = torch.ones(5, 2)
    write(tmp_path / "model_0000007.pth", content)
    message = refusal(trained(tmp_path).resume_or_load, "", resume=True)
    assert "its 'trainer' can't be loaded: momentum_buffer has shape" in message


@pytest.mark.parametrize("iteration", [None, "7", -1, 7.5])
def test_odd_iterations_are_named(tmp_path, monkeypatch, iteration):
    trainer = object.__new__(Trainer)
    with pytest.raises(ValueError, match="iteration"):
        trainer.load_state_dict({"iteration": iteration})


def test_a_checkpoint_without_a_training_is_not_resumed(tmp_path):
    """Before, it started at iteration 1, whatever its own."""
    write(tmp_path / "model_0000007.pth", {"model": good()["model"], "iteration": 7})
    message = refusal(trained(tmp_path).resume_or_load, "", resume=True)
    assert "has no state of a training ('trainer') to resume" in message
    checkpointer = RobustCheckpointer(nn.Linear(2, 2), str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 7}, "to evaluate"


def test_nan_in_the_newest_falls_back_to_the_one_before(tmp_path):
    trained(tmp_path).save("model_0000003", iteration=3)
    content = good()
    content["model"]["bias"] = torch.full((2,), np.nan)
    write(tmp_path / "model_0000007.pth", content)
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    assert trained(tmp_path).resume_or_load("", resume=True) == {"iteration": 3}


def archive(compression, names=("x/data.pkl",), size=10):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as f:
        for name in names:
            f.writestr(name, b"\0" * size)
    return buffer.getvalue()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compressed(content):
    """What torch.save writes, deflated."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(content))) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


BYTES = {
    "empty": (b"", "it is empty"),
    "text": (b"config:\n  model: x\n", "it is not a file of torch.save"),
    "text like a pickle": (b"cos\nsystem\n(S'x'\ntR.", "it is not a file of torch.save"),
    "html": (b"<!DOCTYPE html><html>Not found</html>", "it is not a file of torch.save"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "it is not a file of torch.save"),
    "zeros": (bytes(1000), "it is not a file of torch.save"),
    "another archive": (archive(zipfile.ZIP_STORED, ["readme.txt"]), "can't be read: "),
    "an archive cut off": (saved({"weight": W})[:200], "can't be read: "),
    "an archive's start": (b"PK\3\4", "can't be read: "),
    "a broken pickle in an archive": (archive(zipfile.ZIP_STORED), "can't be read: "),
    "a legacy file cut off": (
        b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.", "can't be read: "),
    "a pickle cut off": (pickle.dumps({"weight": np.ones(100)})[:80], "can't be read: "),
    "a bomb": (compressed({"weight": torch.zeros(2**20)}), "would expand to 4"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
@pytest.mark.parametrize("case", BYTES)
def test_odd_files_are_named(tmp_path, case, suffix):
    content, said = BYTES[case]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    message = refusal(trained().resume_or_load, str(path), resume=False)
    assert message.startswith(f"checkpoint {str(path)!r} can't be read: ")
    assert said in message
    assert "--trust-checkpoint" not in message


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    for path in (tmp_path, tmp_path / "fifo.pth", "/dev/zero", tmp_path / "a\0b"):
        assert "can't be read: " in refusal(trained().load, str(path))
    (tmp_path / "model_0000003.pth").mkdir()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    message = refusal(trained(tmp_path).resume_or_load, "", resume=True)
    assert "model_0000003.pth' can't be read: " in message
    assert message.endswith("--overwrite starts anew")


@pytest.mark.parametrize("tag", [b"\xff\xfe", b"a\0b", b"/etc/passwd", b"gone.pth", b"model_9.pth"])
def test_a_last_checkpoint_that_names_none_is_passed_over(tmp_path, caplog, tag):
    trained(tmp_path).save("model_0000003", iteration=3)
    (tmp_path / "last_checkpoint").write_bytes(tag)
    assert trained(tmp_path).resume_or_load("", resume=True) == {"iteration": 3}
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "can't be read: " in warning
    assert "\n" not in warning


def test_a_script_of_torch_is_named(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "x.pth")
    assert "can't be read: " in refusal(trained().load, str(tmp_path / "x.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("legacy", [False, True])
def test_good_layouts_are_loaded(tmp_path, suffix, legacy):
    """Of torch.save and of pickle, whatever the file is called; bare, wrapped, from DDP."""
    weights = {"weight": torch.full((2, 2), 5.0), "bias": torch.zeros(2)}
    arrays = {key: value.numpy() for key, value in weights.items()}
    path = tmp_path / f"x{suffix}"
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    for content in (weights, {"model": weights}, prefixed, collections.OrderedDict(weights)):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        checkpointer = trained()
        checkpointer.load(str(path), [])
        assert (checkpointer.model.weight == 5).all()
    for content in (arrays, {"model": arrays, "__author__": "x"}):
        path.write_bytes(pickle.dumps(content, protocol=2))
        checkpointer = trained()
        checkpointer.load(str(path), [])
        assert (checkpointer.model.weight == 5).all()


@pytest.mark.parametrize("array", [np.full((2, 2), np.nan), np.array([["a", "b"]])])
def test_odd_arrays_are_named(tmp_path, array):
    path = write(tmp_path / "x.pkl", {"weight": array, "bias": np.ones(2)})
    message = refusal(trained().resume_or_load, path, resume=False)
    assert "weight" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["MODEL.RETINANET.NUM_CLASSES", 5],
            "does not fit the model: the checkpoint has 3 classes and this model 5 (NUM_CLASSES): ",
        ),
        (
            ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]],
            "head.bbox_pred.bias has shape (36,), not (12,), head.bbox_pred.weight has shape",
        ),
        (["MODEL.RETINANET.NUM_CONVS", 2], "head.bbox_subnet.2.bias is missing, "),
    ],
)
def test_weights_to_evaluate_are_all_there(tmp_path, options, said):
    path = write(tmp_path / "x.pth", {"model": toy_model().state_dict()})
    cfg = toy_config("OUTPUT_DIR", str(tmp_path), *options, "MODEL.WEIGHTS", path)
    message = refusal(evaluate, cfg, resume=False)
    assert said in message
    assert message.endswith("use the config that it was trained with")
    RobustCheckpointer(Trainer.build_model(cfg)).load(path, [])  # to be fine-tuned


def test_weights_of_a_deeper_network_are_not_evaluated(tmp_path):
    deeper = toy_model("MODEL.RETINANET.NUM_CONVS", 2)
    path = write(tmp_path / "x.pth", {"model": deeper.state_dict()})
    message = refusal(RobustCheckpointer(toy_model(), strict=True).load, path, [])
    assert "head.cls_subnet.2.weight is not of the model" in message
    more = {**toy_model().state_dict(), "mask_head.0.weight": W, "head.iou.weight": W}
    path = write(tmp_path / "y.pth", {"model": more})
    RobustCheckpointer(toy_model(), strict=True).load(path, [])  # parts that are not used
    RobustCheckpointer(toy_model()).load(path, [])  # to be fine-tuned


def test_a_training_of_other_classes_is_not_resumed(tmp_path):
    other = toy_model()
    RobustCheckpointer(other, str(tmp_path)).save("model_0000003", iteration=3)
    model = toy_model("MODEL.RETINANET.NUM_CLASSES", 5)
    message = refusal(RobustCheckpointer(model, str(tmp_path)).resume_or_load, "", resume=True)
    assert "the checkpoint has 3 classes and this model 5 (NUM_CLASSES): head.cls_score" in message


def test_weights_of_another_kind_are_refused_everywhere(tmp_path):
    """As torchvision's ResNet, whose names are others; AP was 0 with exit code 0."""
    weights = {"conv1.weight": torch.ones(64, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(1)}
    path = write(tmp_path / "x.pth", weights)
    for strict in (False, True):
        checkpointer = RobustCheckpointer(toy_model(), strict=strict)
        message = refusal(checkpointer.resume_or_load, path, resume=False)
        assert "parameters: its names are 'conv1.weight', 'layer1.0" in message


def test_a_few_like_names_do_not_make_the_weights_the_models(tmp_path):
    """Torchvision's ResNet has one of detectron2's names, as heuristics see it: the stem's."""
    own = toy_model().state_dict()
    stem = next(name for name in own if name.endswith("stem.conv1.weight"))
    content = {"model": {"layer1.0.x": W, stem: own[stem]}, "matching_heuristics": True}
    path = write(tmp_path / "x.pth", content)
    message = refusal(RobustCheckpointer(toy_model()).resume_or_load, path, resume=False)
    assert re.search(r"has 1 of the model's \d+ parameters", message)
    assert message.endswith("convert-torchvision-to-d2.py")


def test_the_average_of_other_weights_is_named(tmp_path, monkeypatch):
    content = {"model": toy_model().state_dict(), "ema": {"x": W}}
    path = write(tmp_path / "x.pth", content)
    cfg = toy_config("MODEL.EMA.ENABLED", True, "MODEL.WEIGHTS", path)
    monkeypatch.setattr(Trainer, "test", lambda *_: {})
    assert "'ema'" in refusal(evaluate, cfg, resume=False)
