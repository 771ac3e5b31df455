"""A protocol: data sets x variants x seeds as a YAML file, the same settings for all variants.

::

    description: what is compared, how it is judged, and what it could show
    config: retinanet.yaml             # of detectron2; relative to the protocol's folder
    data_sets:                         # config keys of each data set
      vehicles:
        DATASETS.COCO_JSON: [[vehicles_train, "{data}/train.json", "{data}/train"], ...]
        DATASETS.TRAIN: [vehicles_train]
        DATASETS.TEST: [vehicles_test]
    held_out: 0.2                      # optional: judge on this part of TRAIN, never on TEST
    variants:                          # config keys of each variant; the first is compared with
      baseline: {MODEL.IOU_BALANCED.CLS_ETA: 0.0, MODEL.IOU_BALANCED.LOC_LAMBDA: 0.0}
      control:                         # a number that another variant's runs have logged
        MODEL.IOU_BALANCED.LOC_WEIGHT: {mean_of: iou_balanced/loc_mean_weight, variant: loc}
    seeds: [1, 2, 3]
    fewer_seeds: {loc: 2}              # optional: only the first two seeds of this variant
    memory_gib: 3                      # of one run: as many run at once as fit
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..engine import load_config
from ..errors import UserError
from ..files import read_yaml
from ..losses import LossOptions

Settings = dict[str, Any]  # config key -> value


@dataclass
class Protocol:
    """What is run; see the module's docstring, whose keys the attributes are."""

    name: str  #: the file's name
    description: str
    config: Path
    data_sets: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    seeds: list[int]
    memory_gib: float  #: what one run takes, on the GPU or of the machine
    #: The share of the training images to judge by; 0 judges on DATASETS.TEST.
    held_out: float = 0.0
    fewer_seeds: dict[str, int] = field(default_factory=dict)

    def seeds_of(self, variant: str) -> list[int]:
        """The seeds of a variant's runs."""
        return self.seeds[: self.fewer_seeds.get(variant)]

    def order(self) -> list[tuple[int, str]]:
        """Seed and variant of the runs of each data set, seed by seed."""
        return [(s, name) for s in self.seeds for name in self.variants if s in self.seeds_of(name)]


def references(settings: Settings) -> list[dict[str, str]]:
    """What other variants' runs the settings need: "mean_of" a scalar of "variant"."""
    return [value for value in settings.values() if isinstance(value, dict)]


def load_protocol(path: str, *, data: str = ".", weights: str = "") -> Protocol:
    """Read a protocol.

    Args:
        path: the YAML file.
        data: what "{data}" stands for in its values, the folder of one's data sets.
        weights: MODEL.WEIGHTS of all runs; "" for the config's.

    Returns:
        the protocol.

    Raises:
        UserError: naming the file and the entry.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UserError(f"protocol {path}: can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"protocol {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"protocol {path}: expected a mapping")
    content = _filled(content, str(Path(data).resolve())) | {"name": Path(path).stem}
    try:
        protocol: Any = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Protocol), content)
        )
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"protocol {path}: {error.full_key}: {reason}") from error
    protocol.config = (Path(path).parent / protocol.config).resolve()
    for settings in protocol.data_sets.values() if weights else ():
        settings["MODEL.WEIGHTS"] = _absolute(weights)
    for problem in _problems(protocol):
        raise UserError(f"protocol {path}: {problem}")
    load_config(str(protocol.config))  # raises for what is wrong there
    return protocol


def _absolute(weights: str) -> str:
    """Weights as a run in any folder finds them: a file's whole path, or an address."""
    return weights if "://" in weights else str(Path(weights).resolve())


def _filled(value: Any, folder: str) -> Any:
    """A value with "{data}" filled in."""
    if isinstance(value, str):
        return value.replace("{data}", folder)
    if isinstance(value, list):
        return [_filled(x, folder) for x in value]
    if isinstance(value, dict):
        return {key: _filled(x, folder) for key, x in value.items()}
    return value


def _problems(protocol: Protocol) -> Iterator[str]:
    """What can't be carried out, each beginning with the entry."""
    if not protocol.config.is_file():
        yield f"config: {protocol.config} not found"
    if not 0 <= protocol.held_out < 1:
        yield f"held_out: expected a share from 0 to below 1, got {protocol.held_out}"
    if not protocol.memory_gib > 0:
        yield f"memory_gib: expected more than 0, got {protocol.memory_gib}"
    for key in ("data_sets", "variants"):
        if not getattr(protocol, key):
            yield f"{key}: expected at least one"
    if not protocol.seeds or len(set(protocol.seeds)) < len(protocol.seeds):
        yield f"seeds: expected different whole numbers, got {protocol.seeds}"
    for name, number in protocol.fewer_seeds.items():
        most = len(protocol.seeds)
        if name not in protocol.variants or number not in range(1, most + 1):
            yield f"fewer_seeds.{name}: expected a variant with 1 to {most} seeds, got {number}"
    yield from _problems_of_variants(protocol)


def _problems_of_variants(protocol: Protocol) -> Iterator[str]:
    usable: dict[str, int] = {}  # number of seeds of the variants above that need no others
    for name, settings in protocol.variants.items():
        seeds = len(protocol.seeds_of(name))
        for reference in references(settings):
            other = reference.get("variant", "")
            if set(reference) != {"mean_of", "variant"} or usable.get(other, 0) < seeds:
                yield (
                    f"variants.{name}: {other!r} is not a variant above it, with as many seeds, "
                    "whose settings are all numbers"
                )
        if not references(settings):
            usable[name] = seeds


def protocol_of_config(config_file: str, num_seeds: int, *, weights: str = "") -> Protocol:
    """Baseline and IoU-balanced losses of any config file, equal in all else.

    Args:
        config_file: of detectron2; a plain detector becomes the IoU-balanced one.
        num_seeds: runs of each variant, with seeds 1, 2, ...
        weights: MODEL.WEIGHTS of all runs; "" for the config's.

    Returns:
        the protocol: "baseline" with the plain losses, "both" with the config's, or with the
        default powers if those are the plain ones.

    Raises:
        UserError: if the file is broken, the detector has no IoU-balanced losses, or there is no
            test set or seed.
    """
    cfg = load_config(config_file)
    plain = cfg.MODEL.META_ARCHITECTURE.removeprefix("IoUBalanced")
    if f"IoUBalanced{plain}" not in META_ARCH_REGISTRY:
        raise UserError(
            f"{config_file}: MODEL.META_ARCHITECTURE {plain} has no IoU-balanced losses"
        )
    if not cfg.DATASETS.TEST:
        raise UserError(f"{config_file}: DATASETS.TEST is empty: there is nothing to judge by")
    if num_seeds < 1:
        raise UserError(f"--seeds {num_seeds}: expected 1 or more (3 is usual)")
    base = {"MODEL.META_ARCHITECTURE": f"IoUBalanced{plain}"}
    if weights:
        base["MODEL.WEIGHTS"] = _absolute(weights)
    options, default = cfg.MODEL.IOU_BALANCED, LossOptions()
    if plain == "FCOS" and options.LOC_WEIGHT_RULE == "anchors":  # the default; FCOS has none
        base["MODEL.IOU_BALANCED.LOC_WEIGHT_RULE"] = "running"
    # A rival and a fixed w_loc are parts of the method: the baseline is the plain detector.
    plain_losses = {
        "CLS_LOSS": default.cls_loss, "CLS_ETA": 0.0, "LOC_LAMBDA": 0.0, "LOC_WEIGHT": 0.0
    }  # fmt: skip
    method = {key: options[key] for key in plain_losses}
    if {**method, "LOC_WEIGHT": 0.0} == plain_losses:
        method |= {"CLS_ETA": default.cls_eta, "LOC_LAMBDA": default.loc_lambda}
    return Protocol(
        name=Path(config_file).stem,
        description=f"Does it help on this data? {Path(config_file).name}, with and without the "
        "IoU-balanced losses. Judged by AP on DATASETS.TEST.",
        config=Path(config_file).resolve(),
        data_sets={"+".join(cfg.DATASETS.TEST): base},
        variants={
            "baseline": {f"MODEL.IOU_BALANCED.{key}": x for key, x in plain_losses.items()},
            "both": {f"MODEL.IOU_BALANCED.{key}": x for key, x in method.items()},
        },
        seeds=list(range(1, num_seeds + 1)),
        memory_gib=math.inf,  # not known: one at a time, unless --at-once says more
    )
