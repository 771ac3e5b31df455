"""Reading protocols: what they say, and one line for what is wrong with them."""

from pathlib import Path

import pytest
import yaml

from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.experiments.protocol import load_protocol, references

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "description": "what for",
    "config": "detector.yaml",
    "data_sets": {"toy": {"DATASETS.TRAIN": ["{data}/a", ["{data}/b"]]}},
    "variants": {"baseline": {"MODEL.IOU_BALANCED.CLS_ETA": 0.0}},
    "seeds": [1, 2],
    "memory_gib": 1,
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        (tmp_path / "detector.yaml").write_text("VERSION: 2\n")
        content = {k: v for k, v in (MINIMAL | changes).items() if v is not None}
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return str(tmp_path / "toy.yaml")

    return write


def test_a_protocol_is_read(write, tmp_path):
    protocol = load_protocol(write(), data=str(tmp_path / "sets"), weights="w.pkl")
    assert (protocol.name, protocol.seeds, protocol.held_out) == ("toy", [1, 2], 0.0)
    assert protocol.config == tmp_path / "detector.yaml"
    assert protocol.data_sets["toy"] == {
        "DATASETS.TRAIN": [f"{tmp_path}/sets/a", [f"{tmp_path}/sets/b"]],
        "MODEL.WEIGHTS": str(Path("w.pkl").resolve()),
    }


def test_a_value_may_be_another_variants_mean(write):
    control = {"KEY": {"mean_of": "scalar", "variant": "baseline"}}
    protocol = load_protocol(write(variants=MINIMAL["variants"] | {"control": control}))
    assert protocol.variants["control"] == control
    assert references(protocol.variants["control"]) == [control["KEY"]]


def test_variants_take_turns_and_some_have_fewer_seeds(write):
    variants = {"baseline": {}, "loc": {}, "cls": {}}
    protocol = load_protocol(write(variants=variants, fewer_seeds={"loc": 1}))
    assert protocol.order() == [
        (1, "baseline"), (1, "loc"), (1, "cls"), (2, "baseline"), (2, "cls")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, r"toy.yaml: seeds: expected different whole numbers, got \[1, 1\]"),
        ({"seeds": []}, "seeds: expected different"),
        ({"seeds": 3}, "seeds: Invalid value"),
        ({"seeds": [1.5]}, r"seeds\[0\]: Value '1.5' of type 'float' could not be converted"),
        ({"memory_gib": "much"}, "memory_gib: Value 'much' of type 'str' could not be converted"),
        ({"held_out": 1.0}, "held_out: expected a share"),
        ({"description": None}, "description: .* missing mandatory value"),
        ({"sedes": [1]}, "sedes: Key 'sedes' not in 'Protocol'"),
        ({"config": "other.yaml"}, "config: .*other.yaml not found"),
        ({"variants": {}}, "variants: expected at least one"),
        ({"variants": {"a": 3}}, "variants.a: Value 3"),
        ({"variants": {"a": {"K": {"mean_of": "s", "variant": "b"}}}}, "variants.a: 'b' is not a"),
        (
            {"variants": {"a": {"K": {"mean_of": "s", "variant": "b"}}, "b": {}}},
            "variants.a: 'b' is not a variant above it, with as many seeds",
        ),
        (
            {
                "variants": {"b": {}, "a": {"K": {"mean_of": "s", "variant": "b"}}},
                "fewer_seeds": {"b": 1},
            },
            "variants.a: 'b' is not a variant above it, with as many seeds",
        ),
        ({"fewer_seeds": {"none": 1}}, "fewer_seeds.none: expected a variant with"),
        ({"fewer_seeds": {"baseline": 3}}, "fewer_seeds.baseline: .* 1 to 2 seeds, got 3"),
        ({"fewer_seeds": {"baseline": 0}}, "fewer_seeds.baseline: .* 1 to 2 seeds, got 0"),
        ({"extra": 1}, "extra: Key 'extra' not in 'Protocol'"),
    ],
)
def test_what_is_wrong_is_named(write, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_protocol(write(**changes))
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: can't be read: No such file"):
        load_protocol(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"bad.yaml: while parsing"):
        load_protocol(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match=r"list.yaml: expected a mapping"):
        load_protocol(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("tools/protocols/*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_protocols_set_keys_that_exist(path):
    protocol = load_protocol(str(path))
    for data_set in protocol.data_sets.values():
        for variant in protocol.variants.values():
            settings = {k: v for k, v in (data_set | variant).items() if not isinstance(v, dict)}
            options = [
                x for k, v in settings.items() for x in (k, v if isinstance(v, str) else repr(v))
            ]
            load_config(str(protocol.config), options)
