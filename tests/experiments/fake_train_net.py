"""Stands in for train_net.py: writes what an experiment reads, in milliseconds.

Of a test set that exists it finds every object; CLS_ETA makes its boxes better.
"""

import argparse
import json
import random
from pathlib import Path

import yaml

parser = argparse.ArgumentParser()
parser.add_argument("--config-file", required=True)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()


def load(path):
    """The config with what it is based on."""
    config = yaml.safe_load(Path(path).read_text())
    merged = load(config.pop("_BASE_")) if "_BASE_" in config else {}
    for section, values in config.items():
        merged[section] = merged.get(section, {}) | values if isinstance(values, dict) else values
    return merged


config = load(args.config_file)
output = Path(config["OUTPUT_DIR"])
with open(output / "calls.txt", "a") as calls:
    calls.write("resumed\n" if args.resume else "started\n")
broken = config.get("MODEL", {}).get("IOU_BALANCED", {}).get("LOC_WEIGHT") == 666.0
if broken and not args.resume:
    (output / "last_checkpoint").write_text("model_0000001.pth")
    raise SystemExit("it broke")
rate = config.get("SOLVER", {}).get("BASE_LR", 0.01)
entries = [
    {"iteration": 19, "iou_balanced/loc_mean_weight": 9.0},
    # Logged again after a resume.
    {"iteration": 19, "iou_balanced/loc_mean_weight": 1.0 + config["SEED"]},
    {"iteration": 39, "iou_balanced/loc_mean_weight": 2.0 + config["SEED"]},
    {"iteration": 39, "bbox/AP": 50 - abs(rate - 0.02) * 1000},
]
with open(output / "metrics.json", "a") as log:
    log.writelines(json.dumps(entry) + "\n" for entry in entries)

(output / "config.yaml").write_text(yaml.safe_dump(config))
dice = random.Random(config["SEED"])
noise = 10 - 4 * config.get("MODEL", {}).get("IOU_BALANCED", {}).get("CLS_ETA", 0.0)
for name, file, _ in config.get("DATASETS", {}).get("COCO_JSON", []):
    if name in config["DATASETS"]["TEST"]:
        truth = json.loads(Path(file).read_text())
        found = [
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "bbox": [a["bbox"][0] + dice.gauss(0, noise), *a["bbox"][1:]],
                "score": dice.random(),
            }
            for a in truth["annotations"]
        ]
        folder = output / "inference" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "coco_instances_results.json").write_text(json.dumps(found))
