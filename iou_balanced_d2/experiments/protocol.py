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
    choose:                            # optional: settled first, for all variants alike
      variant: baseline
      held_out: 0.2
      seeds: [1]
      options: [{SOLVER.BASE_LR: 0.005}, {SOLVER.BASE_LR: 0.01}]
    variants:                          # config keys of each variant; the first is compared with
      baseline: {MODEL.IOU_BALANCED.CLS_ETA: 0.0, MODEL.IOU_BALANCED.LOC_LAMBDA: 0.0}
      control:                         # a number that another variant's runs have logged
        MODEL.IOU_BALANCED.LOC_WEIGHT: {mean_of: iou_balanced/loc_mean_weight, variant: loc}
    grids:                             # optional: one more variant for each combination
      powers: {MODEL.IOU_BALANCED.CLS_ETA: [0.5, 1.0], MODEL.IOU_BALANCED.LOC_LAMBDA: [0.0]}
    seeds: [1, 2, 3]
    fewer_seeds: {loc: 2}              # optional: only the first two seeds of this variant
    memory_gib: 3                      # of one run: as many run at once as fit
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.modeling import META_ARCH_REGISTRY

from ..engine import load_config
from ..errors import UserError
from ..losses import LossOptions

Settings = dict[str, Any]  # config key -> value


@dataclass(frozen=True)
class MeanOf:
    """The mean of a scalar over the training of another variant's run of the same seed.

    Attributes:
        scalar: its name in ``metrics.json``.
        variant: the other variant.
    """

    scalar: str
    variant: str


@dataclass(frozen=True)
class Choice:
    """Settings to be chosen on one variant, with a part of the training data held out.

    Attributes:
        variant: the variant that is trained.
        held_out: the share of the training images to judge by.
        seeds: of the runs of each option.
        options: what to choose from.
    """

    variant: str
    held_out: float
    seeds: list[int]
    options: list[Settings]


@dataclass(frozen=True)
class Protocol:
    """What is run; see the module's docstring.

    Attributes:
        name: the file's name.
        description: for the report.
        config: detectron2 config file that all runs start from.
        data_sets: settings of each data set.
        variants: settings of each variant; a value may be :class:`MeanOf`.
        seeds: of each variant's runs.
        memory_gib: what one run takes, on the GPU or of the machine.
        held_out: the share of the training images to judge by; 0 judges on DATASETS.TEST.
        choose: what is settled first.
        fewer_seeds: variant -> how many of the seeds it is run with, the first ones.
    """

    name: str
    description: str
    config: Path
    data_sets: dict[str, Settings]
    variants: dict[str, Settings]
    seeds: list[int]
    memory_gib: float
    held_out: float = 0.0
    choose: Choice | None = None
    fewer_seeds: dict[str, int] = field(default_factory=dict)

    def order(self) -> list[tuple[int, str]]:
        """Seed and variant of the runs of each data set, seed by seed."""
        return [
            (seed, variant)
            for i, seed in enumerate(self.seeds)
            for variant in self.variants
            if i < self.fewer_seeds.get(variant, len(self.seeds))
        ]


@dataclass
class _Reader:
    """Takes the entries of a mapping one by one, with errors that name the file and the entry."""

    path: Path
    content: dict[str, Any]
    prefix: str = ""
    known: set[str] = field(default_factory=set)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        self.known.add(key)
        value = self.content.get(key, default)
        if value is None or not isinstance(value, kind) or isinstance(value, bool):
            expected = " or ".join(
                k.__name__ for k in (kind if isinstance(kind, tuple) else [kind])
            )
            raise self.error(key, f"expected a {expected}, got {value!r}")
        return value

    def seeds(self) -> list[int]:
        seeds = self.take("seeds", list)
        if not seeds or len(set(seeds)) < len(seeds) or not all(type(s) is int for s in seeds):
            raise self.error("seeds", f"expected different whole numbers, got {seeds!r}")
        return seeds

    def share(self) -> float:
        share = float(self.take("held_out", (int, float), 0.0))
        if not 0 <= share < 1:
            raise self.error("held_out", f"expected a share from 0 to below 1, got {share}")
        return share

    def finish(self) -> None:
        unknown = sorted(set(self.content) - self.known)
        if unknown:
            raise self.error(unknown[0], f"unknown; known are {', '.join(sorted(self.known))}")

    def error(self, key: str, text: str) -> UserError:
        return UserError(f"{self.path}: {self.prefix}{key}: {text}")


def load_protocol(path: str, *, data: str = ".", weights: str = "") -> Protocol:
    """Read a protocol.

    Args:
        path: the YAML file.
        data: what "{data}" stands for in its values, the folder of one's data sets.
        weights: MODEL.WEIGHTS of all runs; "" for the config's.

    Returns:
        the protocol, with grids expanded.

    Raises:
        UserError: naming the file and the entry.
    """
    reader = _Reader(Path(path), _read_mapping(path))
    data_sets = _settings_by_name(reader, "data_sets", data)
    for settings in data_sets.values():
        if weights:
            settings["MODEL.WEIGHTS"] = str(Path(weights).resolve())
    protocol = Protocol(
        name=Path(path).stem,
        description=reader.take("description", str).strip(),
        config=(Path(path).parent / reader.take("config", str)).resolve(),
        data_sets=data_sets,
        variants=_settings_by_name(reader, "variants", data) | _grids(reader),
        seeds=reader.seeds(),
        memory_gib=float(reader.take("memory_gib", (int, float))),
        held_out=reader.share(),
        choose=_choice(reader),
        fewer_seeds=reader.take("fewer_seeds", dict, {}),
    )
    reader.finish()
    _check(protocol, reader)
    return protocol


def protocol_of_config(config_file: str, num_seeds: int, *, weights: str = "") -> Protocol:
    """Baseline and IoU-balanced losses of any config file, equal in all else.

    Args:
        config_file: of detectron2; a plain detector becomes the IoU-balanced one.
        num_seeds: runs of each variant, with seeds 1, 2, ...
        weights: MODEL.WEIGHTS of all runs; "" for the config's.

    Returns:
        the protocol: "baseline" with both powers 0, "both" with the config's powers, or with the
        defaults if both are 0 there.

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
        base["MODEL.WEIGHTS"] = str(Path(weights).resolve())
    powers = {key: cfg.MODEL.IOU_BALANCED[key] for key in ("CLS_ETA", "LOC_LAMBDA")}
    if not any(powers.values()):
        powers = {key: getattr(LossOptions(), key.lower()) for key in powers}
    return Protocol(
        name=Path(config_file).stem,
        description=f"Does it help on this data? {Path(config_file).name}, with and without the "
        "IoU-balanced losses. Judged by AP on DATASETS.TEST.",
        config=Path(config_file).resolve(),
        data_sets={"+".join(cfg.DATASETS.TEST): base},
        variants={
            "baseline": {f"MODEL.IOU_BALANCED.{key}": 0.0 for key in powers},
            "both": {f"MODEL.IOU_BALANCED.{key}": value for key, value in powers.items()},
        },
        seeds=list(range(1, num_seeds + 1)),
        memory_gib=math.inf,  # not known: one at a time, unless --at-once says more
    )


def _read_mapping(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"protocol {path}: can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"protocol {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"protocol {path}: expected a mapping")
    return content


def _settings_by_name(reader: _Reader, key: str, data: str) -> dict[str, Settings]:
    named = reader.take(key, dict)
    for name, settings in named.items():
        if not isinstance(settings, dict):
            raise reader.error(f"{key}.{name}", f"expected config keys, got {settings!r}")
    folder = str(Path(data).resolve())
    return {str(name): _value(settings, folder) for name, settings in named.items()}


def _value(value: Any, folder: str) -> Any:
    """A value with "{data}" filled in, and references to other runs as such."""
    if isinstance(value, str):
        return value.replace("{data}", folder)
    if isinstance(value, list):
        return [_value(x, folder) for x in value]
    if isinstance(value, dict):
        if set(value) == {"mean_of", "variant"}:
            return MeanOf(value["mean_of"], value["variant"])
        return {key: _value(x, folder) for key, x in value.items()}
    return value


def _grids(reader: _Reader) -> dict[str, Settings]:
    """One variant for each combination, named after its values: "powers CLS_ETA=0.5"."""
    variants = {}
    for name, keys in reader.take("grids", dict, {}).items():
        if not isinstance(keys, dict) or not all(isinstance(v, list) for v in keys.values()):
            raise reader.error(f"grids.{name}", "expected config keys with lists of values")
        for values in itertools.product(*keys.values()):
            settings = dict(zip(keys, values, strict=True))
            label = " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in settings.items())
            variants[f"{name} {label}"] = settings
    return variants


def _choice(reader: _Reader) -> Choice | None:
    content = reader.take("choose", dict, {})
    if not content:
        return None
    inner = _Reader(reader.path, content, prefix="choose.")
    choice = Choice(
        variant=inner.take("variant", str),
        held_out=inner.share(),
        seeds=inner.seeds(),
        options=inner.take("options", list),
    )
    inner.finish()
    if not choice.held_out:
        raise inner.error(
            "held_out", "expected a share above 0: nothing is chosen on DATASETS.TEST"
        )
    if not choice.options or not all(isinstance(option, dict) for option in choice.options):
        raise inner.error("options", "expected a list of config keys with their values")
    return choice


def _check(protocol: Protocol, reader: _Reader) -> None:
    if not protocol.config.is_file():
        raise reader.error("config", f"{protocol.config} not found")
    for key, named in (("data_sets", protocol.data_sets), ("variants", protocol.variants)):
        if not named:
            raise reader.error(key, "expected at least one")
    if protocol.choose:
        chosen_on = protocol.variants.get(protocol.choose.variant)
        # It is run before any other variant, so that there are no numbers of others yet.
        if chosen_on is None or references(chosen_on):
            raise reader.error(
                "choose.variant",
                f"no variant {protocol.choose.variant!r} whose settings are all numbers",
            )
    above: dict[str, int] = {}  # number of seeds
    for name, settings in protocol.variants.items():
        seeds = protocol.fewer_seeds.get(name, len(protocol.seeds))
        for reference in references(settings):
            if above.get(reference.variant, 0) < seeds or references(
                protocol.variants[reference.variant]
            ):
                raise reader.error(
                    f"variants.{name}",
                    f"{reference.variant!r} is not a variant above it, with as many seeds, whose "
                    "settings are all numbers",
                )
        above[name] = seeds
    for name, number in protocol.fewer_seeds.items():
        if name not in protocol.variants or number not in range(1, len(protocol.seeds) + 1):
            raise reader.error(
                f"fewer_seeds.{name}",
                f"expected a variant with a number of seeds up to {len(protocol.seeds)}, got "
                f"{number!r}",
            )


def references(settings: Mapping[str, Any]) -> list[MeanOf]:
    """What other variants' runs the settings need."""
    return [value for value in settings.values() if isinstance(value, MeanOf)]
